"""The memory estimate against what was measured, what is published, and the rules it is made of."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from nemo_bench.config import TrainConfig, load
from nemo_bench.memory import GIB, MemoryEstimate, estimate_memory

from ..composing import PROJECT, composed

H200 = PROJECT / "benchmarks/results/h200"
GPU_SPEED = PROJECT / "benchmarks/results/gpu_speed"
PLAIN = {"recompute_granularity": None, "cross_entropy_fusion_impl": "native", "use_precision_aware_optimizer": False}


def changed(cfg: TrainConfig, **changes: Any) -> TrainConfig:
    result = copy.deepcopy(cfg)
    for name, value in changes.items():
        sections = (result.model, result.model.optim, result.precision)
        setattr(next(section for section in sections if hasattr(section, name)), name, value)
    return result


def published(point: str = "scale=64gpu", /, **changes: Any) -> MemoryEstimate:
    """Estimate a point without the savings that were added to the published ones; the 70B is TP4 PP4 VP5 CP2."""
    return estimate_memory(changed(composed(*point.split()), **PLAIN | changes))


@pytest.mark.parametrize("name", ["bf16_4layers_77b5", "fp8_4layers_2140"])
def test_four_layers_of_the_70b_on_an_h200(name: str) -> None:
    steps = (H200 / name / "steps.jsonl").read_text().splitlines()
    measured_gib = max(json.loads(line)["peak_memory_gib"] for line in steps)
    estimate = estimate_memory(changed(load(H200 / name / "config.yaml"), **PLAIN))
    # The parts are known to the byte where the optimizer's step is the peak.
    assert estimate.total_bytes / GIB == pytest.approx(measured_gib, rel=0.01)
    assert estimate.optimizer_step_bytes > estimate.activations_bytes + estimate.logits_bytes


@pytest.mark.parametrize("run", [path.parent for path in sorted(GPU_SPEED.glob("*/config.yaml"))], ids=lambda p: p.name)
def test_runs_on_h200s(run: Path) -> None:
    ranks = json.loads((run / "ranks.json").read_text())["ranks"]
    measured_gib = max(rank["peak_memory_gib"] for rank in ranks)
    assert estimate_memory(load(run / "config.yaml")).total_bytes / GIB == pytest.approx(measured_gib, rel=0.06)


def test_the_70bs_parts_by_hand() -> None:
    estimate = published()
    assert estimate.stage == 0  # with the most micro-batches in flight
    embedding = 128512 * 8192 / 4  # the vocabulary padded to a multiple of 128 * 4
    matrices = 20 * (8192**2 * 2.25 + 3 * 8192 * 28672) / 4
    norms = 20 * 2 * 8192
    assert estimate.parameters_bytes == 2 * (matrices + norms + embedding)
    assert estimate.gradients_bytes == estimate.parameters_bytes
    # 12 bytes a parameter over the 4 GPUs (DP2 CP2) that hold the same weights
    assert estimate.optimizer_bytes == 6 * estimate.parameters_bytes / 4
    # 33.5 s b h bytes a layer (q, k, v 2.5; attention's output, two norms in and out 10; the MLP 6 f/h = 21) on a
    # sequence of 4096 over TP4; 4 micro-batches of 20 layers, times 1 + 3/20; and 6 f bytes a token for the layer at
    # work
    tokens, working = 4096 / 4, 4096 / 4 * 6 * 28672
    assert estimate.activations_bytes == pytest.approx(tokens * 92 * 33.5 * 8192 + working)
    # One micro-batch of one sequence a copy of the model: its 20 layers, not 92.
    few = published(global_batch_size=2)
    assert few.activations_bytes == pytest.approx(tokens * 20 * 33.5 * 8192 + working)


def test_the_last_stage_has_the_logits_and_the_fewest_activations() -> None:
    wide: dict[str, Any] = {"vocab_size": 1_048_576, "num_layers": 20}  # outweighs the first stage
    estimate = published(**wide)
    assert estimate.stage == 3 and estimate.logits_bytes == 4096 * 1_048_576 / 4 * 6
    assert published(**wide, cross_entropy_fusion_impl="te").total_bytes < estimate.total_bytes  # works in place


@pytest.mark.parametrize(
    ("change", "optimizer", "optimizer_step", "gradients"),
    [
        ({"use_distributed_optimizer": False}, 4, 4, 1),  # every copy holds all of it
        ({"grad_reduce_in_fp32": True}, 1, 0, 2),  # no copy in the step
        ({"use_precision_aware_optimizer": True}, 1, 0, 1),
        ({"use_precision_aware_optimizer": True, "store_param_remainders": True}, 10 / 12, 0, 1),
    ],
)
def test_what_the_optimizer_keeps_and_copies(
    change: dict[str, Any], optimizer: float, optimizer_step: float, gradients: float
) -> None:
    usual, estimate = published(), published(**change)
    assert estimate.optimizer_bytes == pytest.approx(usual.optimizer_bytes * optimizer)
    assert estimate.optimizer_step_bytes == usual.optimizer_step_bytes * optimizer_step
    assert estimate.gradients_bytes == usual.gradients_bytes * gradients


def test_recomputed_layers_keep_their_input_alone() -> None:
    # So that the activations decide, not the logits or the optimizer's step.
    base: dict[str, Any] = {"vocab_size": 512, "grad_reduce_in_fp32": True}
    full = {**base, "recompute_granularity": "full", "recompute_num_layers": 1}
    tokens, whole = 4096 / 4, published(**base).activations_bytes
    kept = 92 * tokens * 2 * 8192 + tokens * 33.5 * 8192 + tokens * 6 * 28672
    assert published(**full, recompute_method="uniform").activations_bytes == pytest.approx(kept)
    assert kept < published(**full | {"recompute_num_layers": 2}, recompute_method="block").activations_bytes < whole
    mlp = published(**base, recompute_granularity="selective", recompute_modules=["mlp"])
    assert mlp.activations_bytes < 0.5 * whole


def test_megatron_fsdp_holds_its_share_and_two_whole_layers() -> None:
    point = "model=8b scale=8gpu model.context_parallel_size=1"
    usual, sharded = published(point), published(point, use_megatron_fsdp=True)
    layer, embeddings = 4096**2 * 2.5 + 3 * 4096 * 14336, 2 * 128256 * 4096
    whole, held = 32 * layer + embeddings, (32 * layer + embeddings) / 8 + 2 * layer + embeddings
    assert sharded.parameters_bytes / usual.parameters_bytes == pytest.approx(held / whole, rel=1e-4)
    assert sharded.gradients_bytes == sharded.parameters_bytes and sharded.optimizer_bytes == usual.optimizer_bytes
    states = published(point, use_megatron_fsdp=True, data_parallel_sharding_strategy="optim")
    assert states.total_bytes == usual.total_bytes
    offloaded = published(point, cpu_offloading_num_layers=16)
    assert 0.5 * usual.activations_bytes < offloaded.activations_bytes < 0.6 * usual.activations_bytes
