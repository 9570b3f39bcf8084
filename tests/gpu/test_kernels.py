"""The project's GPU kernels give the numbers of those they stand in for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytestmark = pytest.mark.gpu
SIZES = [1, 4095, 8192 * 31]


@pytest.fixture
def restored() -> Iterator[None]:
    """Put back what a patch replaces."""
    from megatron.core.optimizer import optimizer
    from megatron.core.tensor_parallel import layers
    from transformer_engine.pytorch.optimizers import fused_adam

    before = optimizer.clip_grad_by_total_norm_fp32, fused_adam.multi_tensor_applier, layers.F
    yield
    optimizer.clip_grad_by_total_norm_fp32, fused_adam.multi_tensor_applier, layers.F = before


@pytest.mark.parametrize("total_norm", [0.5, 8.0])
@pytest.mark.parametrize(
    "options", [{}, {"master_weights": True}, {"master_weights": True, "store_param_remainders": True}]
)
def test_adam_clips_and_updates_as_transformer_engine_does(
    options: dict[str, Any], total_norm: float, restored: None
) -> None:
    import torch
    from megatron.core.optimizer import optimizer
    from transformer_engine.pytorch.optimizers import FusedAdam

    from nemo_bench.training.gpu_kernels import adam_with_clipping

    dtype = torch.bfloat16 if options else torch.float32

    def trained() -> list[torch.Tensor]:
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(size, device="cuda", dtype=dtype)) for size in SIZES]
        adam = FusedAdam(params, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, use_decoupled_grad=True, **options)
        for _ in range(3):
            for param in params:
                param.decoupled_grad = torch.randn(param.shape, device="cuda")
            optimizer.clip_grad_by_total_norm_fp32(params, 1.0, total_norm, True)
            adam.step()
        moments = [adam.state[param][name].float() for param in params for name in ("exp_avg", "exp_avg_sq")]
        return [*(param.detach().float() for param in params), *moments]

    expected = trained()
    adam_with_clipping()
    for ours, theirs in zip(trained(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2 if options else 1e-5, atol=1e-6)


def test_the_embeddings_gradient_is_added_in_place(restored: None) -> None:
    import torch
    from megatron.core.tensor_parallel import layers

    from nemo_bench.training.gpu_kernels import embedding_gradient_in_place

    weight = torch.nn.Parameter(torch.randn(100, 16, device="cuda"))
    tokens, grad = torch.randint(0, 100, (4, 64), device="cuda"), torch.randn(4, 64, 16, device="cuda")
    layers.F.embedding(tokens, weight).backward(grad)
    expected, weight.grad = 1 + weight.grad, None
    weight.main_grad = torch.ones_like(weight)
    embedding_gradient_in_place()
    layers.F.embedding(tokens, weight).backward(grad)
    torch.testing.assert_close(weight.main_grad, expected)
    assert weight.grad_added_to_main_grad
