"""The memory estimate against what was measured, what is published, and the rules it is made of."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from nemo_bench.config import TrainConfig, load
from nemo_bench.memory import GIB, estimate_memory

from ..composing import PROJECT, composed

H200 = PROJECT / "benchmarks/results/h200"


def plain(cfg: TrainConfig) -> TrainConfig:
    """Without what a configuration may have beside the sizes: as the runs on the H200 were, which had none of it."""
    vars(cfg.model).update(recompute_granularity=None, cross_entropy_fusion_impl="native")
    vars(cfg.model.optim).update(use_precision_aware_optimizer=False)
    return cfg


def point(*overrides: str) -> TrainConfig:
    return plain(composed(*overrides))


def changed(cfg: TrainConfig, **changes: Any) -> TrainConfig:
    result = copy.deepcopy(cfg)
    for name, value in changes.items():
        setattr(result.model, name, value)
    return result


@pytest.fixture(scope="module")
def seventy() -> TrainConfig:
    """The published 70B on 64 GPUs: TP4 PP4 VP5 CP2."""
    return point("scale=64gpu")


@pytest.mark.parametrize("name", ["bf16_4layers_77b5", "fp8_4layers_2140"])
def test_four_layers_of_the_70b_on_an_h200(name: str) -> None:
    steps = (H200 / name / "steps.jsonl").read_text().splitlines()
    measured_gib = max(json.loads(line)["peak_memory_gib"] for line in steps)
    estimate = estimate_memory(plain(load(H200 / name / "config.yaml")))
    # The parts are known to the byte where the optimizer's step is the peak.
    assert estimate.total_bytes / GIB == pytest.approx(measured_gib, rel=0.01)
    assert estimate.optimizer_step_bytes > estimate.activations_bytes + estimate.logits_bytes


GPU_SPEED = PROJECT / "benchmarks/results/gpu_speed"


@pytest.mark.parametrize("name", sorted(config.parent.name for config in GPU_SPEED.glob("*/config.yaml")))
def test_what_runs_on_h200s_took(name: str) -> None:
    ranks = json.loads((GPU_SPEED / name / "ranks.json").read_text())["ranks"]
    measured_gib = max(rank["peak_memory_gib"] for rank in ranks)
    estimate = estimate_memory(load(GPU_SPEED / name / "config.yaml"))
    assert estimate.total_bytes / GIB == pytest.approx(measured_gib, rel=0.06)


def test_what_parameter_remainders_save() -> None:
    """The run of variants.json took 86.39 GiB."""
    cfg = load(GPU_SPEED / "bf16_gbs4/config.yaml")
    cfg.model.optim.store_param_remainders = True
    assert estimate_memory(cfg).total_bytes / GIB == pytest.approx(86.39, rel=0.06)


@pytest.mark.parametrize(
    ("overrides", "memory_gib"),
    [
        (["scale=64gpu"], 80),
        (["scale=64gpu", "precision=fp8"], 80),
        (["scale=2048gpu"], 80),
        (["model=405b", "scale=576gpu"], 80),
        (["model=405b", "scale=576gpu", "precision=fp8"], 80),
        (["model=8b", "scale=8gpu"], 80),
    ],
)
def test_what_nvidia_published_fits_into_its_h100s(overrides: list[str], memory_gib: float) -> None:
    total = estimate_memory(point(*overrides)).total_bytes
    # and fills a good part of them: nobody splits a model further than it needs
    assert 0.5 * memory_gib * GIB < total < memory_gib * GIB - 4 * GIB


def test_the_70bs_parts_by_hand(seventy: TrainConfig) -> None:
    estimate = estimate_memory(seventy)
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
    tokens = 4096 / 4
    assert estimate.activations_bytes == pytest.approx(tokens * (92 * 33.5 * 8192 + 6 * 28672))


def test_the_last_stage_has_the_logits_and_the_fewest_activations(seventy: TrainConfig) -> None:
    # so much vocabulary that it outweighs the first stage
    estimate = estimate_memory(changed(seventy, vocab_size=1_048_576, num_layers=20))
    assert estimate.stage == 3 and estimate.logits_bytes == 4096 * 1_048_576 / 4 * 6


@pytest.mark.parametrize(
    "change",
    [
        {"tensor_model_parallel_size": 8},
        {"pipeline_model_parallel_size": 8, "virtual_pipeline_model_parallel_size": 5},
        {"context_parallel_size": 4},
        {"num_layers": 40},
    ],
)
def test_what_is_said_to_take_less_takes_less(seventy: TrainConfig, change: dict[str, int]) -> None:
    assert estimate_memory(changed(seventy, **change)).total_bytes < 0.95 * estimate_memory(seventy).total_bytes


@pytest.mark.parametrize(
    "change", [{"micro_batch_size": 2}, {"sequence_parallel": False}, {"seq_length": 16384}, {"num_layers": 160}]
)
def test_what_takes_more_takes_more(seventy: TrainConfig, change: dict[str, Any]) -> None:
    assert estimate_memory(changed(seventy, **change)).total_bytes > 1.05 * estimate_memory(seventy).total_bytes


def test_few_micro_batches_are_no_more_in_flight_than_there_are(seventy: TrainConfig) -> None:
    # one micro-batch of one sequence a copy of the model: its 20 layers, not 92
    one = estimate_memory(changed(seventy, global_batch_size=2))
    many = estimate_memory(seventy)
    working = 4096 / 4 * 6 * 28672
    assert (one.activations_bytes - working) / (many.activations_bytes - working) == pytest.approx(20 / 92)


def test_without_the_distributed_optimizer_every_copy_holds_all_of_it(seventy: TrainConfig) -> None:
    whole = copy.deepcopy(seventy)
    whole.model.optim.use_distributed_optimizer = False
    assert estimate_memory(whole).optimizer_bytes == 4 * estimate_memory(seventy).optimizer_bytes


def test_gradients_in_fp32_need_no_copy_in_the_step(seventy: TrainConfig) -> None:
    wide = copy.deepcopy(seventy)
    wide.model.optim.grad_reduce_in_fp32 = True
    assert estimate_memory(wide).gradients_bytes == 2 * estimate_memory(seventy).gradients_bytes
    assert estimate_memory(wide).optimizer_step_bytes == 0


def test_the_precision_aware_optimizer_keeps_less_and_copies_nothing(seventy: TrainConfig) -> None:
    usual = estimate_memory(seventy)
    aware = copy.deepcopy(seventy)
    aware.model.optim.use_precision_aware_optimizer = True
    assert estimate_memory(aware).optimizer_bytes == usual.optimizer_bytes
    aware.model.optim.store_param_remainders = True
    assert estimate_memory(aware).optimizer_bytes == pytest.approx(usual.optimizer_bytes * 10 / 12)
    assert estimate_memory(aware).optimizer_step_bytes == 0
    # Adam in fp8 with other scalings than delayed takes the usual way
    aware.precision.fp8, aware.precision.fp8_recipe = "hybrid", "tensorwise"
    assert estimate_memory(aware).optimizer_bytes == usual.optimizer_bytes


def test_transformer_engines_loss_works_in_place(seventy: TrainConfig) -> None:
    wide = changed(seventy, vocab_size=1_048_576, num_layers=20)
    in_place = changed(wide, cross_entropy_fusion_impl="te")
    assert estimate_memory(in_place).total_bytes < estimate_memory(wide).total_bytes


def test_recomputed_layers_keep_their_input_alone(seventy: TrainConfig) -> None:
    """Of the fields that a configuration may have: set as they are there."""
    seventy = changed(seventy, vocab_size=512)
    seventy.model.optim.grad_reduce_in_fp32 = True  # so that the activations decide, not logits or the optimizer's step
    full = changed(seventy, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    tokens = 4096 / 4
    kept = 92 * tokens * 2 * 8192 + tokens * 33.5 * 8192 + tokens * 6 * 28672
    assert estimate_memory(full).activations_bytes == pytest.approx(kept)
    half = changed(seventy, recompute_granularity="full", recompute_method="block", recompute_num_layers=2)
    assert kept < estimate_memory(half).activations_bytes < estimate_memory(seventy).activations_bytes
    mlp = changed(seventy, recompute_granularity="selective", recompute_modules=["mlp"])
    assert estimate_memory(mlp).activations_bytes < 0.5 * estimate_memory(seventy).activations_bytes


def test_fp32_on_one_process() -> None:
    cfg = point()
    estimate = estimate_memory(cfg)
    parameters = estimate.parameters_bytes / 4
    assert estimate.optimizer_bytes == 8 * parameters and estimate.gradients_bytes == 4 * parameters
    assert estimate.optimizer_step_bytes == 0
