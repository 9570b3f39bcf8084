"""Verdicts: nothing passes that is not the published run, measured well, with numbers that can be right."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_bench.record.node import NODE
from nemo_bench.report import model, references, tables
from nemo_bench.report.bare_logs import Given
from nemo_bench.report.build import build_report
from nemo_bench.report.model import to_json
from nemo_bench.report.verdict import must_agree

from ..reports import H100, SIZES, judged, log_text, published_run, write

TABLE = Path(references.__file__).parent / "published/nvidia-24.09.yaml"
# --- against the published number ---


@pytest.mark.parametrize(
    ("step_time_s", "tolerance", "verdict", "exit_code"),
    [
        (11.01, 0.05, "PASS", 0),
        (11.5, 0.05, "PASS", 0),
        (11.7, 0.05, "FAIL", 1),
        (11.4, 0.01, "FAIL", 1),
        (10.3, 0.05, "FASTER", 0),
    ],
)
def test_a_point_is_held_against_the_published_one(
    tmp_path: Path, step_time_s: float, tolerance: float, verdict: str, exit_code: int
) -> None:
    report, point = judged(tmp_path, log_text([step_time_s] * 50), tolerance=tolerance)
    assert (point.verdict.value, report.exit_code) == (verdict, exit_code)
    assert report.verdict == ("PASS" if verdict == "FASTER" else verdict)
    assert point.verdict.ratio == pytest.approx(11.01 / step_time_s) and point.verdict.statistic == "last step"
    assert point.verdict.why.endswith(
        "the log itself does not tell model, precision, gpus, seq_length, layout, data and environment"
    )


def test_other_tables_several_and_none(tmp_path: Path) -> None:
    text = log_text([10.5] * 50)
    assert judged(tmp_path, text, reference="nvidia-24.12")[1].verdict.ratio == pytest.approx(10.46 / 10.5)
    # The row of the run's own software is taken, and that is said.
    point = judged(tmp_path, text, reference=["nvidia-24.12", "nvidia-24.09"])[1]
    assert point.reference is not None and point.reference.reference == "nvidia-24.09"
    assert "of 2 tables, the row of nvidia-24.09 is taken" in point.verdict.remarks
    report, point = judged(tmp_path, text, reference=None)
    assert (point.verdict.value, report.references, report.exit_code) == (model.NO_REFERENCE, (), 0)


@pytest.mark.parametrize(
    ("statistic", "used", "time_s"),
    [
        ("mean of steps 35 to 44", "mean of steps 35 to 44", 11.4),
        ("last step", "last step", 11.2),
        ("mean", "mean of the steps that count", 11.104),
        ("mean of steps 45 to 60", "mean of the steps that count", 11.104),  # of a longer run
    ],
)
def test_the_references_own_statistic_is_judged(tmp_path: Path, statistic: str, used: str, time_s: float) -> None:
    ours = tmp_path / "ours.yaml"
    ours.write_text(TABLE.read_text().replace("statistic: last step", f"statistic: {statistic}"))
    times = [11.0] * 34 + [11.4] * 10 + [11.2] * 6
    verdict = judged(tmp_path, log_text(times), reference=str(ours))[1].verdict
    assert (verdict.value, verdict.statistic) == (model.PASS, used)
    assert verdict.ratio == pytest.approx(11.01 / time_s)
    assert f"by the {used}" in verdict.why


@pytest.mark.parametrize("release", ["24.11", "25.02", "25.04"])
def test_the_recipes_own_logs_are_judged_by_the_table_of_their_release(tmp_path: Path, release: str) -> None:
    """In its folders and by its names, whatever model: also shortened ones, and the 405B's own query groups."""
    (table,) = (table for name in references.names() if release in (table := references.load(name)).recipes)
    for row in table.points:
        folder = tmp_path / "results" / release / row.precision / row.model / str(row.gpus)
        folder.mkdir(parents=True)
        log = folder / f"log-nemo_llama3.1_{row.model}_{row.gpus}_1234.out"
        log.write_text(log_text([row.step_time_s] * 50, batch=row.global_batch_size))
    report = build_report([tmp_path / "results"], given=H100)
    assert [table.name for table in report.references] == [table.name] and len(report.points) == len(table.points)
    for point in report.points:
        assert (point.verdict.value, point.verdict.differences) == (model.PASS, ()), point.verdict.why
        assert point.reference is not None and point.reference.reference == table.name


# --- what must agree, and what may differ ---


@pytest.mark.parametrize(
    ("given_", "batch", "why"),
    [
        (Given(gpu="b200"), 128, "gpu=b200, published h100"),
        (Given(gpu="a100"), 128, "gpu=a100, published h100"),
        (Given(), 128, "not known: gpu; name it with gpu=..."),
        (H100, 256, "global_batch_size=256, published 128"),
        (H100, 64, "global_batch_size=64, published 128"),
        (replace(H100, seq_length=4096), 128, "seq_length=4096, published 8192"),
        (replace(H100, architecture=replace(SIZES, num_layers=4)), 128, "num_layers=4, published 80"),
        (replace(H100, architecture=replace(SIZES, hidden_size=4096)), 128, "hidden_size=4096, published 8192"),
        (replace(H100, architecture=replace(SIZES, num_query_groups=16)), 128, "num_query_groups=16, published 8"),
        (replace(H100, architecture=replace(SIZES, vocab_size=32000)), 128, "padded vocabulary=32256, published"),
    ],
)
def test_another_run_than_the_published_is_not_compared(tmp_path: Path, given_: Given, batch: int, why: str) -> None:
    report, point = judged(tmp_path, log_text([11.01 * batch / 128] * 50, batch=batch), given_)
    assert (point.verdict.value, report.exit_code) == (model.NOT_COMPARABLE, 1)
    assert why in point.verdict.why and point.verdict.ratio is None


def test_a_vocabulary_that_is_padded_to_the_same_size_agrees(tmp_path: Path) -> None:
    given_ = replace(H100, architecture=replace(SIZES, vocab_size=128300))
    assert judged(tmp_path, log_text([11.0] * 50), given_)[1].verdict.value == model.PASS


def test_differences_leave_the_verdict_standing_and_are_named_everywhere(tmp_path: Path) -> None:
    report = build_report([published_run(tmp_path / "run")])
    (point,) = report.points
    assert point.verdict.value == model.PASS and report.exit_code == 0
    assert point.verdict.text == f"PASS, {len(point.verdict.differences)} differences"
    for text in (
        "software: nemo-2.7.3 in no container, published with 25.02.01 in nvidia+nemo+25.02.01.sqsh",
        "layout: TP1 PP1 VP1 CP1 GA2, published with TP4 PP4 VP5 CP2 GA64",
    ):
        assert text in point.verdict.differences
    (environment,) = (text for text in point.verdict.differences if text.startswith("environment"))
    assert "NCCL_NVLS_ENABLE=1" in environment
    assert "of 4 tables, the row of nvidia-25.04 is taken" in point.verdict.remarks
    for output in (tables.markdown(report), tables.csv_text(report), to_json(report)):
        assert all(text.replace("*", "") in output.replace("*", "") for text in point.verdict.differences)
    # Another program's table judges where it is asked for.
    (point,) = build_report([tmp_path / "run"], reference="nvidia-24.09").points
    assert "data: random tokens (data=mock), published with pile" in point.verdict.differences


def test_settings_and_software_are_differences_whatever_the_folder_is_called(tmp_path: Path) -> None:
    """GSW_VERSION=24.09 names the folder; what trained is another thing."""
    run = published_run(tmp_path / "run", **{"results_version: nemo-2.7.3": "results_version: '24.09'"})
    (point,) = build_report([run], reference="nvidia-24.09").points
    assert any("software: nemo-2.7.3" in text for text in point.verdict.differences)
    differing = "model.rotary_base=500000, model.init_method_std=0.02, published with 10000, 0.008944"
    assert f"settings: {differing}" in point.verdict.differences


def test_the_drivers_name_of_the_gpu_counts(tmp_path: Path) -> None:
    run = published_run(tmp_path / "run")
    node = json.loads((run / NODE).read_text())
    (run / NODE).write_text(json.dumps({**node, "gpus": [{"name": "NVIDIA A100-SXM4-80GB"}]}))
    (point,) = build_report([run]).points
    assert point.verdict.value == model.NOT_COMPARABLE
    assert "gpu=NVIDIA A100-SXM4-80GB (configured as h100), published h100" in point.verdict.why


# --- one number is not enough ---


@pytest.mark.parametrize(
    ("times", "doubt"),
    [
        ([60.0 if i % 10 == 9 else 11.0 for i in range(50)], "FAIL by the mean, PASS by the median"),
        ([11.0] * 44 + [25.0] * 6, "PASS by the median, FAIL by the last step"),
        ([11.0] * 49 + [14.0], "FAIL by the last step"),
        ([11.0, 20.0] * 24 + [20.0, 11.0], "FAIL by the mean, FAIL by the median, PASS by the last step"),
        ([30.0] * 30 + [11.0] * 20, "by the mean"),
        ([12.5] * 15 + [11.0] * 35, "the first 15 of 50 steps are slower: no warm-up is so long"),
    ],
)
def test_a_run_whose_statistics_disagree_is_undecided(tmp_path: Path, times: list[float], doubt: str) -> None:
    report, point = judged(tmp_path, log_text(times))
    assert (point.verdict.value, report.exit_code) == (model.UNDECIDED, 1)
    assert doubt in point.verdict.why
    # Days and throughput come from the mean.
    counted = report.runs[0].times
    assert counted is not None and point.numbers is not None and point.numbers.step_time_s == counted.mean_s
    days = 1e12 / (8192 * 128 / counted.mean_s) / 86400
    assert point.numbers.days_to_train == pytest.approx(days)


def test_repeats_that_disagree_are_undecided(tmp_path: Path) -> None:
    for name, time_s in (("a", 11.0), ("b", 8.0)):
        write(tmp_path, log_text([time_s] * 50), name=name)
    (point,) = build_report([tmp_path], given=H100).points
    assert point.verdict.value == model.UNDECIDED and "exceeds the tolerance" in point.verdict.why


# --- the property ---


@settings(max_examples=60, deadline=None)
@given(
    times=st.lists(st.floats(5, 40), min_size=10, max_size=50),
    steady=st.booleans(),
    batch=st.sampled_from([64, 128, 256]),
    gpus=st.sampled_from([64, 128]),
    gpu=st.sampled_from(["h100", "h200", "a100", None]),
    seq_length=st.sampled_from([4096, 8192]),
    layers=st.sampled_from([4, 80]),
)
def test_a_verdict_means_that_all_that_must_agree_does(
    times: list[float], steady: bool, batch: int, gpus: int, gpu: str | None, seq_length: int, layers: int
) -> None:
    given_ = Given(gpu=gpu, seq_length=seq_length, architecture=replace(SIZES, num_layers=layers))
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), log_text([11.0] * 50 if steady else times, batch=batch), gpus=gpus)
        report = build_report([path], given=given_)
    (point,) = report.points
    verdict = point.verdict
    if verdict.value in (model.PASS, model.FAIL, model.FASTER, model.UNDECIDED):
        assert point.reference is not None
        assert all(change.before == change.after for change in must_agree(report.runs[0], point.reference))
        assert point.numbers is not None and (point.numbers.mfu_causal or 0) < 1
        assert (batch, gpus, gpu, seq_length, layers) in {(128, 64, "h100", 8192, 80), (256, 128, "h100", 8192, 80)}
    assert (report.exit_code == 0) == (verdict.value in model.SUCCESSES)
