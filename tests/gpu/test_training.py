"""NeMo with Transformer Engine on real GPUs: every layout, number format and option trains the same model.

All short runs start from the weights of one checkpoint, on the same real text, so that their losses can be compared.
Tolerances are of losses near 6: bf16 rounds to three digits, and layouts add up in another order.
"""

from __future__ import annotations

import json
import math

import pytest

from nemo_bench.record.ranks import RANKS
from tests.gpu.conftest import LAYOUTS, OPTIONS, RECIPES, STARTS, Trained

pytestmark = pytest.mark.gpu
BF16_TOLERANCE = 0.02
FP8_TOLERANCE = 0.05
# Gradients that do not flow change the norm by several times; rounding to 8 bits does not.
GRAD_NORM_TOLERANCE, FP8_GRAD_NORM_TOLERANCE = 0.05, 0.4


def furthest(one: list[float], other: list[float]) -> float:
    assert len(one) == len(other) > 0
    return max(abs(a - b) for a, b in zip(one, other))


def follows(run: Trained, other: Trained, loss: float, grad_norm: float, first: int = 0) -> None:
    """Hold two runs' losses together, and the ratio of their gradient norms from step `first` on."""
    assert furthest(run.of("loss"), other.of("loss")) < loss
    for ours, others in list(zip(run.of("grad_norm"), other.of("grad_norm")))[first:]:
        assert ours / others == pytest.approx(1, abs=grad_norm)


def of(trained: dict[str, Trained], name: str) -> Trained:
    assert trained["whole"].error is None, trained["whole"].error  # the others start from its checkpoint
    if name not in trained:
        pytest.skip(f"{name} needs more GPUs")
    return trained[name]


@pytest.mark.parametrize("name", [*LAYOUTS, *OPTIONS])
def test_a_layout_and_an_option_have_the_losses_of_one_gpu(trained: dict[str, Trained], name: str) -> None:
    follows(of(trained, name), of(trained, "one_gpu"), BF16_TOLERANCE, GRAD_NORM_TOLERANCE)


def test_every_start_computes_with_its_weights(trained: dict[str, Trained]) -> None:
    """Without CUDA_DEVICE_MAX_CONNECTIONS=1, which is how one GPU runs (training/incompatibilities.py)."""
    first_losses = {trained[name].of("loss")[0] for name in STARTS}
    assert len(first_losses) == 1 and math.isfinite(first_losses.pop())


@pytest.mark.parametrize("name", RECIPES)
def test_fp8_follows_bf16(trained: dict[str, Trained], name: str) -> None:
    # Delayed scaling knows nothing of its tensors at the first step.
    follows(of(trained, name), of(trained, "one_gpu"), FP8_TOLERANCE, FP8_GRAD_NORM_TOLERANCE, first=1)


def test_the_loss_on_real_text_falls_and_fp8_follows(trained: dict[str, Trained]) -> None:
    bf16, fp8 = trained["long_bf16"].of("loss"), trained["long_fp8"].of("loss")
    assert sum(bf16[-5:]) / 5 < 0.8 * bf16[0]

    def smooth(losses: list[float]) -> list[float]:
        return [sum(losses[i : i + 5]) / 5 for i in range(len(losses) - 5)]

    assert furthest(smooth(bf16), smooth(fp8)) < 2 * FP8_TOLERANCE


@pytest.mark.parametrize("name", ["resumed", "resumed_tp2"])
def test_a_resumed_run_continues_where_it_stopped(trained: dict[str, Trained], name: str) -> None:
    run, whole = of(trained, name), trained["whole"]
    assert [step["step"] for step in run.steps] == list(range(8, 16))
    assert furthest(run.of("loss"), whole.of("loss")[8:]) < BF16_TOLERANCE
    assert run.of("lr") == pytest.approx(whole.of("lr")[8:])


def test_a_profile_tells_the_kernels_apart(trained: dict[str, Trained]) -> None:
    run = trained["profiled"]
    assert run.error is None, run.error
    profile = json.loads((run.run_dir / "profile" / "rank0.json").read_text())
    times = {each["name"]: each["ms"] for each in profile["classes"]}
    assert times["GEMM"] > 0 and times["attention"] > 0 and times["optimizer"] > 0
    assert sum(times.values()) + profile["idle_ms"] == pytest.approx(profile["step_ms"], rel=0.02)
    assert times.get("other", 0) < 0.05 * profile["step_ms"], profile["classes"]


def test_every_rank_was_measured(trained: dict[str, Trained]) -> None:
    rows = of(trained, "one_gpu").steps
    assert all(row["mfu"] > 0 and row["tflops_per_gpu"] > 0 and row["reserved_memory_gib"] > 0 for row in rows)
    ranks = json.loads((of(trained, "dp2").run_dir / RANKS).read_text())
    assert len(ranks["ranks"]) == 2


def test_the_gradient_of_swiglu_is_that_of_megatron(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from megatron.core.fusions import fused_bias_swiglu

    from nemo_bench.training import patches

    megatrons = fused_bias_swiglu.swiglu_back
    monkeypatch.setattr(fused_bias_swiglu, "swiglu_back", megatrons)  # and so put back behind the test
    both_halves, grad_output = (torch.randn(64, size, device="cuda", dtype=torch.bfloat16) for size in (512, 256))
    patches.te_swiglu_backward()
    ours = fused_bias_swiglu.SwiGLUFunction.apply(both_halves.requires_grad_(), False, False)
    ours.backward(grad_output)
    assert fused_bias_swiglu.swiglu_back is not megatrons
    torch.testing.assert_close(both_halves.grad, megatrons(grad_output, both_halves.detach()), rtol=0.02, atol=0.02)
