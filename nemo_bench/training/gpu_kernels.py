"""Adam's update with the clipping in it, and the embedding's gradient added in place: what one GPU's fp8 step spared.

Four layers of the 70B in fp8 on one H200, medians of 13 steps in one call: 1.125 s without, 1.108 s with Adam's kernel,
1.115 s with the embedding's gradient; both 1.104 s (benchmarks/results/gpu_speed/fp8_kernels.json).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl

BLOCK = tl.constexpr(2048)


@triton.jit  # type: ignore[untyped-decorator]
def _adam_kernel(  # type: ignore[no-untyped-def]
    grad, copy, exp_avg, exp_avg_sq, param, numel, lr, beta1, beta2, eps, bias1, bias2, decay, scale, COPY: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    g = tl.load(grad + at, inside).to(tl.float32) * scale
    m = beta1 * tl.load(exp_avg + at, inside) + (1 - beta1) * g
    v = beta2 * tl.load(exp_avg_sq + at, inside) + (1 - beta2) * g * g
    p = tl.load(param + at, inside)
    p -= lr * (m / bias1 / (tl.sqrt(v / bias2) + eps) + decay * p)
    tl.store(exp_avg + at, m, inside)
    tl.store(exp_avg_sq + at, v, inside)
    tl.store(param + at, p, inside)
    if COPY:
        tl.store(copy + at, p.to(copy.dtype.element_ty), inside)


def adam_with_clipping() -> None:
    """Have Transformer Engine's FusedAdam scale gradients as it reads them, where Megatron reads and writes them first.

    Its own kernels stay for fp8 parameters and parameter remainders; there the gradients are scaled before.
    """
    import transformer_engine_torch as tex
    from megatron.core.optimizer import optimizer
    from transformer_engine.pytorch.optimizers import fused_adam

    multi_tensor_applier = fused_adam.multi_tensor_applier
    clip = SimpleNamespace(coefficient=1.0)

    def note_clipping(_: Any, max_norm: float, total_norm: float, use_decoupled_grad: bool = False) -> None:
        clip.coefficient = min(1.0, max_norm / (total_norm + 1.0e-6))

    def apply(kernel: Any, overflow: Any, tensors: list[list[torch.Tensor]], *options: Any) -> None:
        """Update the lists of gradients, parameters, two moments and, for bf16 parameters, their fp32 weights."""
        if kernel is not tex.multi_tensor_adam:
            if clip.coefficient < 1:
                multi_tensor_applier(tex.multi_tensor_scale, overflow, [tensors[0], tensors[0]], clip.coefficient)
            multi_tensor_applier(kernel, overflow, tensors, *options)
            return
        lr, beta1, beta2, eps, step, adam_w, bias_correction, decay = options
        assert adam_w  # Megatron's choice
        bias1, bias2 = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
        numbers = (float(lr), beta1, beta2, eps, bias1, bias2, float(decay), clip.coefficient)
        for lists in zip(*tensors):
            *of_the_step, weight = lists if len(lists) == 5 else (*lists, lists[1])
            numel = weight.numel()
            grid = (triton.cdiv(numel, BLOCK.value),)
            _adam_kernel[grid](*of_the_step, weight, numel, *numbers, COPY=len(lists) == 5, num_warps=8)

    optimizer.clip_grad_by_total_norm_fp32 = note_clipping
    fused_adam.multi_tensor_applier = apply


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        ctx.weight = weight
        ctx.save_for_backward(tokens)
        return torch.nn.functional.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (tokens,), weight = ctx.saved_tensors, ctx.weight
        main_grad = weight.main_grad
        main_grad.index_add_(0, tokens.flatten(), grad.reshape(-1, grad.shape[-1]).to(main_grad.dtype))
        weight.grad_added_to_main_grad = True
        return torch.empty_like(weight), None  # Megatron's hooks want one, and do not read it


def embedding_gradient_in_place() -> None:
    """Add the rows of a micro-batch's tokens to the step's gradient, and no gradient of the whole vocabulary."""
    from megatron.core.tensor_parallel import layers

    functional = layers.F

    def embedding(tokens: torch.Tensor, weight: Any) -> torch.Tensor:
        in_place = weight.requires_grad and isinstance(getattr(weight, "main_grad", None), torch.Tensor)
        result: torch.Tensor = _Embedding.apply(weight, tokens) if in_place else functional.embedding(tokens, weight)
        return result

    layers.F = SimpleNamespace(**{**vars(functional), "embedding": embedding})
