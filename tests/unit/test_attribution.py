"""Where a point's seconds went: terms of the estimate beside a profile, or what ranks measured without one."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from nemo_bench.files import write_json
from nemo_bench.report import page
from nemo_bench.report import profile as step_profile
from nemo_bench.report.attribution import UNEXPLAINED
from nemo_bench.report.build import build_report
from nemo_bench.report.model import NO_EVIDENCE, Attribution, Term, to_json
from nemo_bench.report.tables import markdown

from ..traces import ADAM, ADD, ALL_GATHER, COPY, GEMM, Event, kernel, launched, mark, write

RECORDS = Path(__file__).parents[2] / "benchmarks/results/gpu_speed"
FP8 = {  # ms
    "matrix products": 512.3,
    "embedding, output layer, loss": 318.0,
    "attention": 144.6,
    "other kernels": 82.4,
    "optimizer": 62.1,
}


def of_group(event: Event, group: str, collective: str) -> Event:
    event["args"] |= {"Process Group Description": group, "Collective name": collective}
    return event


def test_kernels_belong_to_terms_by_class_operation_and_process_group(tmp_path: Path) -> None:
    reduce_scatter = ALL_GATHER.replace("AllGather", "ReduceScatter_Sum_bf16")
    operation = mark("autograd::engine::evaluate_function: IndexBackward0", 0, 1)
    head = {**mark("LinearWithGradAccumulationAndAsyncCommunicationBackward", 50, 60), "cat": "cpu_op"}
    events = [
        mark(f"{step_profile.STEP_MARK}1", 0, 200),
        operation,
        head,
        launched(1, 55),
        kernel(GEMM, 0, 10),
        kernel(GEMM, 10, 30, launch=1),
        kernel(ADD, 30, 33, launch=1),
        kernel(ADD, 40, 44),
        kernel(COPY, 44, 45),
        kernel(ADAM, 45, 51),
        of_group(kernel(ALL_GATHER, 25, 60, stream=9), "TENSOR_MODEL_PARALLEL_GROUP", "_allgather_base"),  # 17 exposed
        of_group(kernel(ALL_GATHER, 60, 67), "DATA_PARALLEL_GROUP_WITH_CP", "allgather_into_tensor_coalesced"),
        of_group(kernel(reduce_scatter, 70, 78), "DATA_PARALLEL_GROUP_WITH_CP", "_reduce_scatter_base"),
        of_group(kernel("ncclDevKernel_SendRecv", 80, 89), "PIPELINE_MODEL_PARALLEL_GROUP", "recv"),
        of_group(kernel("ncclDevKernel_SendRecv", 90, 100), "CONTEXT_PARALLEL_GROUP", "send"),
        of_group(kernel("ncclDevKernel_AllReduce", 100, 111), "TENSOR_AND_CONTEXT_PARALLEL_GROUP", "allreduce"),
        of_group(kernel("ncclDevKernel_AllReduce", 111, 123), "MODEL_PARALLEL_GROUP", "allreduce"),
        kernel("ncclDevKernel_AllReduce", 123, 136),
    ]
    profile = step_profile.measure(write(tmp_path / "t.json", events), 0)
    assert {term: round(ms * 1e3, 6) for term, ms in profile.terms.items()} == {
        "matrix products": 10,
        "embedding, output layer, loss": 23,
        "other kernels": 4,
        "optimizer": 6 + 12,
        "tensor parallel": 17,
        "parameter gathering": 7,
        "gradient reduction": 8,
        "pipeline bubble and p2p": 9,
        "context parallel": 10,
        "fp8 scaling factors": 11,
        "other communication": 13,
    }


def record(folder: Path, name: str, terms: dict[str, float] | None = None, **of_ranks: float) -> Path:
    """A kept record, with a profile of these terms, and with other facts of its ranks."""
    run = Path(shutil.copytree(RECORDS / name, folder))
    if terms:
        idle = 12.584
        times = {"step_ms": sum(terms.values()) + idle, "idle_ms": idle, "terms": terms}
        none = {"classes": (), "communication_ms": 0.0, "exposed_communication_ms": 0.0}
        profile = step_profile.StepProfile(rank=0, device="NVIDIA H200", steps=(9,), **times, **none)  # type: ignore[arg-type]
        (run / "profile").mkdir()
        write_json(run / "profile/rank0.json", asdict(profile))
    ranks = json.loads((run / "ranks.json").read_text())
    write_json(run / "ranks.json", {"ranks": [rank | of_ranks for rank in ranks["ranks"]]})
    return run


def attributed(run: Path, **options: Any) -> Attribution:
    return build_report([run], **options).attributions[-1]


def terms_of(way: Attribution) -> dict[str, Term]:
    assert way.measured_s == pytest.approx(way.expected_s + sum(term.more_s for term in way.terms))
    return {term.name: term for term in way.terms}


def test_a_profile_explains_a_step_of_the_fp8_slice_within_2_percent() -> None:
    way = attributed(RECORDS.parent / "attribution")
    terms = terms_of(way)
    assert abs(terms[UNEXPLAINED].more_s) < 0.02 * way.measured_s
    assert terms["optimizer"].measured_s == pytest.approx(0.0617, abs=1e-4)
    assert terms["optimizer"].evidence == terms["host"].evidence == "rank 0's profile"
    assert sum(term.expected_s or 0 for term in way.terms) == pytest.approx(way.expected_s)


def test_waits_stand_with_the_collective_that_ranks_wait_in(tmp_path: Path) -> None:
    bf16 = {"matrix products": 500.0, "tensor parallel": 100.0, "gradient reduction": 1.0}
    assert "tensor parallel, waits" in terms_of(attributed(record(tmp_path / "1", "tp2_bf16", bf16)))
    assert "gradient reduction, waits" in terms_of(attributed(record(tmp_path / "2", "dp2_bf16", bf16)))


def test_without_a_profile_a_term_has_evidence_by_what_ranks_measured_or_none(tmp_path: Path) -> None:
    terms = terms_of(attributed(record(tmp_path / "run", "dp2_bf16")))
    assert {(term.measured_s, term.evidence) for name, term in terms.items() if name != UNEXPLAINED} == {
        (None, NO_EVIDENCE)
    }
    way = attributed(record(tmp_path / "slow", "dp2_bf16", matrix_tflops=600.0, own_time_s=1.5))
    slow = terms_of(way)
    assert slow["attention"].measured_s == pytest.approx((terms["attention"].expected_s or 0) * 665.2 / 600, rel=0.001)
    assert slow["attention"].evidence == "slowest GPU's matrix rate"
    waited = next(term for name, term in slow.items() if name.startswith("waits in lockstep"))
    assert waited.measured_s == pytest.approx(way.measured_s - 1.5) and waited.evidence == "waits of 2 ranks"


def test_a_run_and_its_baseline_differ_by_their_profiles_terms(tmp_path: Path) -> None:
    old = record(tmp_path / "old", "fp8_bf16_parameters_gbs4", {**FP8, "optimizer": 52.1})
    new = record(tmp_path / "new", "fp8_bf16_parameters_gbs4", FP8)
    terms = terms_of(attributed(new, baseline=[old]))
    assert terms["optimizer"].more_s == pytest.approx(0.010) and terms["attention"].more_s == 0
    without = attributed(new, baseline=[RECORDS / "fp8_bf16_parameters_gbs4"])
    assert [term.name for term in without.terms] == [UNEXPLAINED]


def test_the_way_stands_in_every_form_of_the_report(tmp_path: Path) -> None:
    report = build_report([record(tmp_path / "run", "fp8_bf16_parameters_gbs4", FP8)])
    (way,) = json.loads(to_json(report))["attributions"]
    assert {"name": "optimizer", "measured_s": 0.0621}.items() <= way["terms"][-3].items()
    assert "| optimizer |" in markdown(report) and "rank 0's profile" in markdown(report)
    assert "Where the seconds went" in page.render(report) and "waterfall" in page.render(report)
