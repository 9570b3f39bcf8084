"""Where a point's seconds went: terms of the estimate beside a profile, or what ranks measured without one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from nemo_bench.files import write_json
from nemo_bench.record.machine import latest_path
from nemo_bench.report import page
from nemo_bench.report import profile as step_profile
from nemo_bench.report.attribution import UNEXPLAINED
from nemo_bench.report.build import build_report
from nemo_bench.report.model import Attribution, Term, to_json
from nemo_bench.report.tables import markdown

from ..traces import ADAM, ADD, ALL_GATHER, COPY, GEMM, Event, kernel, launched, mark, write

RECORDS = Path(__file__).parents[2] / "benchmarks/results"
BF16 = {"matrix products": 500.0, "tensor parallel": 100.0, "gradient reduction": 1.0}


def collective(name: str, begin: float, end: float, group: str = "", stream: int = 7) -> Event:
    event = kernel(f"ncclDevKernel_{name}", begin, end, stream=stream)
    event["args"] |= {"Process Group Description": f"{group}_PARALLEL_GROUP_WITH_CP", "Collective name": name}
    return event


def test_kernels_belong_to_terms_by_class_operation_and_process_group(tmp_path: Path) -> None:
    events = [
        mark(f"{step_profile.STEP_MARK}1", 0, 200),
        {**mark("LinearWithGradAccumulationAndAsyncCommunicationBackward", 50, 60), "cat": "cpu_op"},
        launched(1, 55),
        kernel(GEMM, 0, 10),
        kernel(GEMM, 10, 30, launch=1),
        kernel(ADD, 30, 33, launch=1),
        kernel(ADD, 40, 44),
        kernel(COPY, 44, 45),
        kernel(ADAM, 45, 51),
        collective("_allgather_base", 25, 60, "TENSOR_MODEL", stream=9),  # 17 of it alone
        collective("allgather_into_tensor_coalesced", 60, 67, "DATA"),
        collective("_reduce_scatter_base", 70, 78, "DATA"),
        collective("recv", 80, 89, "PIPELINE_MODEL"),
        collective("send", 90, 100, "CONTEXT"),
        collective("allreduce", 100, 111, "TENSOR_AND_CONTEXT"),
        collective("allreduce", 111, 123, "MODEL"),
        kernel(ALL_GATHER, 123, 136),
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
    """A kept record, with a profile of these terms (ms), and with other facts of its ranks."""
    run = Path(shutil.copytree(RECORDS / "gpu_speed" / name, folder))
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("stage_path: /stage", f"stage_path: {folder}"))
    if terms:
        profile = json.loads((RECORDS / "attribution/fp8_bf16_parameters/profile/rank0.json").read_text())
        (run / "profile").mkdir()
        write_json(run / "profile/rank0.json", profile | {"terms": terms})
    ranks = json.loads((run / "ranks.json").read_text())
    write_json(run / "ranks.json", {"ranks": [rank | of_ranks for rank in ranks["ranks"]]})
    return run


def attributed(run: Path, **options: Any) -> tuple[Attribution, dict[str, Term]]:
    way = build_report([run], **options).attributions[-1]
    assert way.measured_s == pytest.approx(way.expected_s + sum(term.more_s for term in way.terms))
    return way, {term.name: term for term in way.terms}


def test_a_profile_explains_a_step_of_the_fp8_slice_within_2_percent() -> None:
    way, terms = attributed(RECORDS / "attribution")
    assert abs(terms[UNEXPLAINED].more_s) < 0.02 * way.measured_s
    assert terms["optimizer"].measured_s == pytest.approx(0.0617, abs=1e-4)
    assert terms["optimizer"].evidence == terms["host"].evidence == "rank 0 profile"
    report = build_report([RECORDS / "attribution"])
    assert json.loads(to_json(report))["attributions"][0]["terms"][0]["name"] == "matrix products"
    assert "| optimizer |" in markdown(report)
    assert "Where the seconds went" in page.render(report) and "waterfall" in page.render(report)


@pytest.mark.parametrize(
    ("name", "row"), [("tp2_bf16", "tensor parallel, waits"), ("dp2_bf16", "gradient reduction, waits")]
)
def test_waits_stand_with_the_collective_that_ranks_wait_in(tmp_path: Path, name: str, row: str) -> None:
    assert row in attributed(record(tmp_path / "run", name, BF16))[1]


def test_without_a_profile_a_term_has_evidence_by_what_was_measured_or_none(tmp_path: Path) -> None:
    _, terms = attributed(record(tmp_path / "run", "dp2_bf16"))
    assert {term.evidence for name, term in terms.items() if name != UNEXPLAINED} == {"no evidence"}
    run = record(tmp_path / "slow", "dp2_bf16", matrix_tflops=600.0, own_time_s=1.5)
    finding = {"what": "power limit 500 W", "where": [{"host": "n07", "gpu": 3}]}
    for rate, source in ((600, "before the training"), (550, "machine check")):
        way, slow = attributed(run)
        assert slow["attention"].measured_s == pytest.approx((terms["attention"].expected_s or 0) * 665.2 / rate, 0.001)
        assert slow["attention"].evidence == f"slowest GPU's matrix rate, {source}"
        waited = next(term for name, term in slow.items() if name.startswith("waits in lockstep"))
        assert waited.measured_s == pytest.approx(way.measured_s - 1.5) and waited.evidence == "waits of 2 ranks"
        path = latest_path(str(run), "local", "h200")
        path.parent.mkdir(exist_ok=True)
        check = {"checked_at": "2026-11-28T18:00:00Z", "cluster": "local", "gpus": 8, "gpu": "h200"}
        rates = {"bf16_tflops": {"middle": 660.0, "least": 550.0}}
        write_json(path, {**check, "rates": rates, "findings": [finding]})
    assert "machine check of 2026-11-28T18:00:00Z: n07 GPU 3: power limit 500 W" in way.findings


def test_a_run_and_its_baseline_differ_by_their_profiles_terms(tmp_path: Path) -> None:
    old = record(tmp_path / "old", "dp2_bf16", {**BF16, "optimizer": 52.1})
    new = record(tmp_path / "new", "dp2_bf16", {**BF16, "optimizer": 62.1})
    _, terms = attributed(new, baseline=[old])
    assert terms["optimizer"].more_s == pytest.approx(0.010) and terms["matrix products"].more_s == 0
    assert [*attributed(new, baseline=[RECORDS / "gpu_speed/dp2_bf16"])[1]] == [UNEXPLAINED]
