"""The estimate: its schedule against Megatron's, its arithmetic, and its errors at every point that is known."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from statistics import fmean

import pytest

from nemo_bench.estimate.rates import Passes, interpolated, load_rates
from nemo_bench.estimate.schedule import Pipeline, stage_order
from nemo_bench.estimate.step import estimate_of
from nemo_bench.flops import pipeline_bubble

from ..composing import PROJECT, composed

SIZES = [(2, 2, 4), (2, 2, 8), (4, 2, 8), (4, 2, 4), (4, 1, 8)]


@pytest.mark.train
def test_the_order_of_passes_is_megatrons() -> None:
    names = ["x".join(map(str, size)) for size in SIZES]
    script = [sys.executable, str(PROJECT / "tests" / "megatron_schedule.py"), *names]
    traced = json.loads(subprocess.run(script, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    for name, size in zip(names, SIZES):
        for stage, order in enumerate(traced[name]):
            assert stage_order(*size, stage) == [tuple(call) for call in order], (name, stage)


@pytest.mark.parametrize(
    ("stages", "chunks", "micro_batches"), [(4, 1, 8), (4, 2, 8), (4, 5, 64), (8, 8, 64), (1, 1, 3)]
)
def test_equal_stages_wait_as_long_as_the_formula_says(stages: int, chunks: int, micro_batches: int) -> None:
    times = [[10.0] * chunks] * stages, [[20.0] * chunks] * stages
    pipeline = Pipeline(stages, chunks, micro_batches, *times)
    share = pipeline_bubble(pipeline_stages=stages, virtual_stages=chunks, micro_batches=micro_batches)
    assert 1 - pipeline.busy_ms(0) / pipeline.run().end_ms == pytest.approx(share)


def test_no_pass_starts_before_its_input_or_while_its_stage_works() -> None:
    forward, backward = [[1.0, 2.0], [3.0, 1.0], [2.0, 2.0]], [[2.0, 4.0], [5.0, 2.0], [4.0, 9.0]]
    timeline = Pipeline(3, 2, 6, forward, backward, p2p_ms=0.5, deferred=2, deferred_ms=3.0).run()
    events = {(e.forward, e.chunk * 3 + e.stage, e.micro_batch): e for e in timeline.events()}
    assert len(events) == 2 * 3 * 2 * 6
    for (is_forward, slot, micro_batch), event in events.items():
        before = (is_forward, slot - 1 if is_forward else slot + 1, micro_batch)
        if before in events:
            assert event.start_ms >= events[before].end_ms + 0.5 - 1e-9
    for stage in range(3):
        own = sorted((e.start_ms, e.end_ms) for e in events.values() if e.stage == stage)
        assert all(start >= end - 1e-9 for (_, end), (start, _) in pairwise(own))
    last = max(event.end_ms for event in events.values() if event.stage == 2)
    assert timeline.stage_ends_ms[2] == pytest.approx(last + 2 * 3.0)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("scale=128gpu", "precision=fp8"),
        ("scale=2048gpu", "precision=fp8", "precision.fp8_recipe=tensorwise"),
        ("scale=8gpu", "model=8b"),
        ("experiment=dgxc_26_06/llama31_70b_fp8_h100", "scale=1024gpu"),
        ("experiment=dgxc_26_06/llama31_405b_fp8_h100", "scale=1024gpu"),
        ("experiment=dgxc_26_06/llama31_8b_fp8_h100", "scale=8gpu"),
        ("scale=576gpu", "model=405b", "model.defer_embedding_wgrad_compute=true"),
        ("scale=1gpu", "model=70b_slice", "gpu=h200", "cluster.tp_comm_overlap=false"),
        tuple(f"model.recompute_{key}" for key in ("granularity=full", "method=block", "num_layers=2")),
        ("model.recompute_granularity=selective", "model.recompute_modules=[mlp,layernorm]"),
        ("model.sequence_parallel=false", "cluster.tp_comm_overlap=false"),
        ("model.optim.use_distributed_optimizer=false", "model.optim.overlap_param_gather=false"),
    ],
    ids=" ".join,
)
def test_the_breakdown_sums_to_the_step_and_no_part_is_negative(overrides: tuple[str, ...]) -> None:
    estimate = estimate_of(composed("scale=64gpu", *overrides, "data=mock"))
    assert sum(estimate.breakdown_s.values()) == pytest.approx(estimate.step_time_s, rel=1e-9)
    assert min(estimate.breakdown_s.values()) >= 0


@pytest.mark.parametrize(
    ("slower", "than"),
    [
        (("gpu=h100",), ("gpu=h200",)),
        (("cluster.tp_comm_overlap=false",), ()),
        (("cluster.nic_gb_s=5",), ()),
        (("cluster.nvlink_gb_s=50",), ()),
        (("model.virtual_pipeline_model_parallel_size=null",), ()),
        (("model.recompute_granularity=full", "model.recompute_method=uniform", "model.recompute_num_layers=1"), ()),
        (("model.optim.overlap_grad_reduce=false", "model.optim.overlap_param_gather=false"), ()),
        (("precision=bf16",), ("precision=fp8",)),
        (("precision=fp8", "precision.fp8_recipe=tensorwise"), ("precision=fp8",)),
    ],
    ids=lambda overrides: " ".join(overrides) or "default",
)
def test_what_costs_time_is_slower(slower: tuple[str, ...], than: tuple[str, ...]) -> None:
    times = [estimate_of(composed("scale=64gpu", "data=mock", *keys)).step_time_s for keys in (slower, than)]
    assert times[0] > times[1]


def total_ms(passes: Passes) -> float:
    return sum(sum(p.products_ms.values()) + p.attention_ms + sum(p.kernels_ms.values()) for p in passes.values())


def test_shapes_that_were_not_measured_are_interpolated_to_three_percent() -> None:
    layers, errors = load_rates("h200").layers, []
    for left_out, passes in layers.items():
        others = {shape: other for shape, other in layers.items() if shape != left_out}
        errors.append(abs(total_ms(interpolated(others, left_out)) / total_ms(passes) - 1))
    assert len(errors) == 20 and fmean(errors) < 0.013 and max(errors) < 0.03


def test_a_measured_shape_gives_its_own_times_and_another_is_marked() -> None:
    cfg = composed("scale=64gpu", "data=mock")
    assert estimate_of(cfg).measured_shape
    cfg.model.micro_batch_size, cfg.model.global_batch_size = 2, 256
    assert not estimate_of(cfg).measured_shape


@pytest.mark.parametrize(
    ("overrides", "limited"),
    [(("precision=fp8",), True), ((), False), (("precision=fp8", "model.cuda_graph_impl=local"), False)],
)
def test_a_point_whose_layers_are_shorter_than_their_launch_is_marked(
    overrides: tuple[str, ...], limited: bool
) -> None:
    assert estimate_of(composed("scale=64gpu", "data=mock", *overrides)).host_is_limit is limited
