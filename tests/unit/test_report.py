"""Points, verdicts with their reasons, comparisons, and the report as JSON, CSV and Markdown."""

from __future__ import annotations

import csv
import io
import json
import math
import random
import shutil
from dataclasses import replace
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_bench.errors import BenchError
from nemo_bench.flops import Architecture
from nemo_bench.record import folder as record
from nemo_bench.record.node import NODE
from nemo_bench.report import model, points, tables
from nemo_bench.report.build import build_report
from nemo_bench.report.model import Point, Report, from_json, to_json
from nemo_bench.report.points import flatten
from nemo_bench.report.runs import Given

LOGS = Path(__file__).parents[1] / "logs"
RUNS = Path(__file__).parents[1] / "runs/nemo-2.7.3"
TINY = RUNS / "fp32/tiny"
GPU_SPEED = Path(__file__).parents[2] / "benchmarks/results/gpu_speed"
H100 = Given(gpu="h100")


def write_log(path: Path, step_time_s: float, *, batch: int, steps: int = 50, last_s: float | None = None) -> Path:
    """A log of NeMo 1 in the recipe's form, with a little noise; `steps` of 50."""
    rng, text = random.Random(path.name), ""
    for step in range(steps):
        time = step_time_s * (3 if step == 0 else 1) + rng.gauss(0, 0.002 * step_time_s)
        if step == 49 and last_s is not None:
            time = last_s
        text += (
            f"\rEpoch 0: : {2 * step + 2:3d}%|##| {step + 1}/50 [00:01<00:09, reduced_train_loss=6.370, "
            f"global_step={step}.0, consumed_samples={batch * (step + 1)}.0, train_step_timing in s={time:.3f}]"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")
    return path


def point_log(root: Path, precision: str, gpus: int, step_time_s: float, name: str = "a", **options: Any) -> Path:
    batch = options.pop("batch", 2 * gpus)
    return write_log(root / f"24.09/{precision}/70b/{gpus}/{name}.out", step_time_s, batch=batch, **options)


def copy_run(source: str, target: Path, changes: dict[str, Any] | None = None, factor: float = 1.0) -> Path:
    """A real run folder with some values of its configuration changed, and its steps made longer."""
    copied = Path(shutil.copytree(next(TINY.glob(f"*/*{source}")), target))
    if changes:
        config = (copied / record.CONFIG).read_text()
        for old, new in changes.items():
            assert old in config
            config = config.replace(old, new)
        (copied / record.CONFIG).write_text(config)
    rows, _ = record.read_lines(copied / record.STEPS)
    for row in rows:
        row["train_step_timing_s"] *= factor
    (copied / record.STEPS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return copied


def only(report: Report) -> Point:
    assert len(report.points) == 1
    return report.points[0]


# --- verdicts ---


@pytest.mark.parametrize(
    ("step_time_s", "verdict", "exit_code"),
    [(11.01, "PASS", 0), (11.5, "PASS", 0), (11.7, "FAIL", 1), (10.3, "FASTER THAN PUBLISHED", 0)],
)
def test_a_point_is_held_against_the_published_one(
    tmp_path: Path, step_time_s: float, verdict: str, exit_code: int
) -> None:
    report = build_report([point_log(tmp_path, "fp8", 64, step_time_s)], given=H100)
    point = only(report)
    assert (point.verdict.value, report.exit_code) == (verdict, exit_code)
    assert point.verdict.ratio == pytest.approx(11.01 / step_time_s, rel=5e-3)
    assert point.reference is not None and point.reference.step_time_s == 11.01
    assert point.numbers is not None and point.numbers.peak_tflops == 1979


def test_the_tolerance_is_the_users(tmp_path: Path) -> None:
    path = point_log(tmp_path, "bf16", 64, 15.2)
    assert only(build_report([path], tolerance=0.05)).verdict.value == model.PASS
    assert only(build_report([path], tolerance=0.01)).verdict.value == model.FAIL


def test_other_tables_and_none(tmp_path: Path) -> None:
    path = point_log(tmp_path, "fp8", 64, 11.01)
    assert only(build_report([path], reference="nvidia-24.12")).verdict.ratio == pytest.approx(10.46 / 11.01, rel=5e-3)
    report = build_report([path], reference=None)
    assert (only(report).verdict.value, report.references, report.exit_code) == (model.NO_REFERENCE, (), 0)


def test_a_point_without_a_finished_run_is_incomplete(tmp_path: Path) -> None:
    report = build_report([point_log(tmp_path, "fp8", 64, 11.0, steps=30)])
    point = only(report)
    assert (point.verdict.value, point.numbers, report.exit_code) == (model.INCOMPLETE, None, 1)
    assert "the log ends at step 30 of 50" in point.verdict.why
    # a finished repeat settles it
    point_log(tmp_path, "fp8", 64, 11.0, name="b")
    report = build_report([tmp_path])
    assert (only(report).verdict.value, len(only(report).runs), len(only(report).final_runs)) == (model.PASS, 2, 1)


def test_less_work_under_the_same_name_is_not_compared(tmp_path: Path) -> None:
    path = point_log(tmp_path, "fp8", 64, 1.0)
    report = build_report([path], given=replace(H100, seq_length=4096))
    assert only(report).verdict.value == model.NOT_COMPARABLE and report.exit_code == 0
    assert "seq_length=4096, published 8192" in only(report).verdict.why
    sizes = {"num_layers": 4, "hidden_size": 8192, "ffn_hidden_size": 28672, "vocab_size": 128256}
    layers = {**sizes, "num_attention_heads": 64, "num_query_groups": 8}
    report = build_report([path], given=Given(architecture=Architecture(**layers)))
    assert only(report).verdict.why == "other work: num_layers=4, published 80"


def test_reasons_that_the_record_shows(tmp_path: Path) -> None:
    changes = {
        "  name: tiny": "  name: 70b",
        "name: fp32": "name: fp8",
        "num_nodes: 1": "num_nodes: 8",
        "devices: 1": "devices: 8",
        "seq_length: 128": "seq_length: 8192",
        "global_batch_size: 32": "global_batch_size: 256",
        "num_layers: 4": "num_layers: 80",
        "hidden_size: 128": "hidden_size: 8192",
        "ffn_hidden_size: 448": "ffn_hidden_size: 28672",
        "num_attention_heads: 8": "num_attention_heads: 64",
        "num_query_groups: 4": "num_query_groups: 8",
        "vocab_size: 384": "vocab_size: 128256",
        "  name: local\n  kind": "  name: mock\n  kind",
        "  name: cpu": "  name: h200",
    }
    copied = copy_run("ecda", tmp_path / "run", changes, factor=40)
    node = json.loads((copied / NODE).read_text())
    node["gpus"] = [{"name": "NVIDIA H100 80GB HBM3", "clocks_event_reasons.sw_thermal_slowdown": "Active"}]
    (copied / NODE).write_text(json.dumps(node))
    point = only(build_report([copied]))
    assert point.reference is not None and point.verdict.value in (model.FAIL, model.PASS, model.FASTER)
    reasons = "\n".join(point.verdict.reasons)
    for text in (
        "no container: bare on the machine, published with nvidia+nemo+24.09.sqsh",
        "software: nemo-2.7.3, published with 24.09",
        "GPU: h200, published on h100",
        "configured as h200, and the driver calls it NVIDIA H100 80GB HBM3",
        "global batch size: 256, published with 128",
        "layout: TP1 PP1 VP1 CP1 MBS8 GA0, published with TP4 PP4 VP5 CP2 MBS1 GA64",
        "random tokens (data=mock), published with pile",
        "3 after a checkpoint",
        "steps spread by",
        "faster during the run",
        "clocks of GPU 0 held back: sw thermal slowdown",
    ):
        assert text in reasons


def test_a_reason_is_said_once_for_all_repeats(tmp_path: Path) -> None:
    for name, drift in (("a", 1.04), ("b", 1.06), ("c", 1.0)):
        path = point_log(tmp_path, "fp8", 64, 11.0, name=name)
        parts = path.read_bytes().decode().split("\r")
        for i, part in enumerate(parts[26:], 26):
            head, _, time = part.rpartition("=")
            parts[i] = f"{head}={float(time.strip().rstrip(']')) * drift:.3f}]"
        checkpoint = "\nSaving checkpoint\n"
        path.write_text("\r".join(parts[:20]) + checkpoint + "\r" + "\r".join(parts[20:]) + "\n")
    reasons = [text for text in only(build_report([tmp_path], given=H100)).verdict.reasons if "runs)" in text]
    assert reasons[0] == "disturbed steps, left out: 1 after a checkpoint (in all 3 runs)"
    assert len(reasons) == 2 and reasons[1].endswith(" slower during the run (in 2 of 3 runs)")
    low, _, high = reasons[1].removeprefix("steps became ").partition(" to ")
    assert low.startswith(("3.", "4.")) and high.startswith(("5.", "6.")), reasons


def test_a_model_of_another_size_under_a_known_name_says_so(tmp_path: Path) -> None:
    point_log(tmp_path, "fp8", 64, 11.0)
    report = build_report([RUNS / "bf16", RUNS / "fp8", tmp_path], given=H100)
    assert [point.name for point in report.points] == [
        "70b bf16 1gpu (num_layers=4)",
        "70b fp8 1gpu (num_layers=4)",
        "70b fp8 64gpu",
    ]
    # One point is no curve, and what is published of 80 layers does not stand beside 4.
    assert [(curve.precision, curve.gpus[0], curve.published) for curve in report.scaling] == [
        ("fp8", 64, False),
        ("fp8", 64, True),
    ]


def test_a_last_step_that_would_be_judged_otherwise_is_a_reason(tmp_path: Path) -> None:
    point = only(build_report([point_log(tmp_path, "fp8", 64, 11.0, last_s=14.0)]))
    assert point.verdict.value == model.PASS
    assert point.verdict.ratio_last == pytest.approx(11.01 / 14.0)
    assert any(
        "by the last step alone, as the recipe reads it: FAIL (21.4% slower)" in r for r in point.verdict.reasons
    )


def test_a_contradiction_in_what_was_published_is_shown(tmp_path: Path) -> None:
    point = only(build_report([point_log(tmp_path, "bf16", 2048, 14.98)]))
    assert any("belong to 14.92 s" in reason for reason in point.verdict.reasons)


@settings(max_examples=60, deadline=None)
@given(st.floats(0.2, 5), st.floats(0, 0.5))
def test_verdicts_follow_the_ratio(ratio: float, tolerance: float) -> None:
    from nemo_bench.report.points import _value

    value = _value(ratio, tolerance)
    assert (value == model.FAIL) == (ratio < 1 - tolerance)
    assert (value == model.FASTER) == (ratio > 1 + tolerance)


# --- repeats, points, scaling ---


def test_repeats_give_a_confidence_interval(tmp_path: Path) -> None:
    for name, time in (("a", 11.0), ("b", 11.2), ("c", 11.4)):
        point_log(tmp_path, "fp8", 64, time, name=name)
    point = only(build_report([tmp_path]))
    interval = point.step_time_interval
    assert interval is not None and (interval.n, interval.method) == (3, "repeats")
    assert point.numbers is not None and point.numbers.step_time_s == pytest.approx(11.2, abs=0.01)
    assert interval.high - interval.low == pytest.approx(2 * 4.3027 * 0.2 / math.sqrt(3), rel=0.05)
    single = build_report([tmp_path / "24.09/fp8/70b/64/a.out"]).points[0].step_time_interval
    assert single is not None and single.method == "batches of steps"


def test_real_repeats_are_one_point_and_other_configurations_are_not() -> None:
    report = build_report([TINY])
    names = {point.name: point for point in report.points}
    assert [*names] == ["tiny fp32 1gpu (data=mock)", "tiny fp32 1gpu (data=local)", "tiny fp32 2gpu"]
    # with and without checkpoints, 30 and 40 steps: the same point
    assert len(names["tiny fp32 1gpu (data=local)"].final_runs) == 3
    assert names["tiny fp32 1gpu (data=mock)"].numbers is None
    assert report.verdict == model.NO_REFERENCE and report.exit_code == 0
    curve = report.scaling[0]
    assert (curve.gpus, curve.published, curve.efficiency[0]) == ((1, 2), False, 1.0)


def test_what_changes_the_work_makes_another_point(tmp_path: Path) -> None:
    copy_run("d39a", tmp_path / "a")
    copy_run("d39a", tmp_path / "b", {"tensor_model_parallel_size: 1": "tensor_model_parallel_size: 2"})
    copy_run("d39a", tmp_path / "c", {"seed: 1234": "seed: 4321", "max_steps: 30": "max_steps: 25"})
    names = [point.name for point in build_report([tmp_path]).points]
    assert names == [f"tiny fp32 1gpu ({layout})" for layout in ("one GPU", "TP2")]


def test_a_name_says_what_most_others_do_not_share() -> None:
    report = build_report([GPU_SPEED])
    assert [point.name for point in report.points if point.model == "70b_slice"] == [
        "70b_slice bf16 1gpu (GBS 32)",
        "70b_slice bf16 1gpu (GBS 4)",
        "70b_slice bf16 2gpu (CP2)",
        "70b_slice bf16 2gpu (DP2)",
        "70b_slice bf16 2gpu (PP2 VP2)",
        "70b_slice bf16 2gpu (TP2)",
        "70b_slice fp8 1gpu (fp8_param_gather=false, fp8_dot_product_attention=true)",
        "70b_slice fp8 1gpu (fp8_param_gather=false)",
        "70b_slice fp8 1gpu (GBS 32, fp8_param_gather=true)",
        "70b_slice fp8 1gpu (fp8_param_gather=true)",
        "70b_slice fp8 2gpu (TP2)",
    ]


def test_names_of_logs_of_nodes_and_of_keys_with_the_same_end(tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        shutil.copytree(GPU_SPEED / "dp2_bf16", tmp_path / name)
    for name, changes in {
        "two": {"num_nodes: 1": "num_nodes: 2", "devices: 2": "devices: 1"},
        "three": {"  name: h200": "  name: h201", "memory_gib: 141.0": "memory_gib: 150.0"},
    }.items():
        config = tmp_path / name / record.CONFIG
        text = config.read_text()
        for old, new in changes.items():
            assert old in text
            text = text.replace(old, new)
        config.write_text(text)
    point_log(tmp_path, "bf16", 2, 11.0, name="log")  # of the 70b, whose layout nobody knows
    names = sorted(point.name for point in build_report([tmp_path]).points)
    assert names == [
        "70b bf16 2gpu",
        "70b_slice bf16 2gpu",
        "70b_slice bf16 2gpu (gpu=h201)",
        "70b_slice bf16 2gpu (nodes=2)",
    ]
    told = {"parallel": "TP2", "gpu.name": "x", "cluster.env.name": "y", "precision.fp8_param_gather": "True"}
    assert points._texts(told) == ["TP2", "gpu.name=x", "cluster.env.name=y", "fp8_param_gather=true"]


def test_the_table_of_the_readme_is_that_of_the_records() -> None:
    text = (GPU_SPEED.parents[2] / "README.md").read_text()
    lines = text[text.index("### On this machine's GPUs") :].splitlines()
    found = dropwhile(lambda line: not line.startswith("|"), lines)
    header, _, *rows = [
        [cell.strip() for cell in line.strip("| ").split("|")]
        for line in takewhile(lambda line: line.startswith("|"), found)
    ]
    table = tables.points_table(build_report([GPU_SPEED]))
    columns = [[name.lstrip(">") for name in table.header].index(name) for name in header]
    assert sorted(rows) == sorted([made[column] for column in columns] for made in table.rows)


def test_the_pipeline_bubble_of_a_layout() -> None:
    report = build_report([GPU_SPEED])
    bubbles = {point.name: point.pipeline_bubble for point in report.points if point.gpus == 2}
    assert bubbles.pop("70b_slice bf16 2gpu (PP2 VP2)") == pytest.approx(0.5 / 8.5)
    assert set(bubbles.values()) == {None}
    header, rows = tables.points_table(report).header, tables.points_table(report).rows
    assert {row[header.index(">bubble")] for row in rows} == {"", "5.9%"}
    assert "pp2_vp2_bf16" in tables.csv_text(report) and f",{0.5 / 8.5}," in tables.csv_text(report)


def test_the_scaling_curve_beside_the_published_one(tmp_path: Path) -> None:
    for gpus, time in ((64, 11.0), (128, 11.0), (256, 12.0)):
        point_log(tmp_path, "fp8", gpus, time)
    measured, published = build_report([tmp_path], given=H100).scaling
    assert measured.gpus == (64, 128, 256) and not measured.published
    assert measured.efficiency == pytest.approx((1.0, 1.0, 11 / 12), abs=5e-3)
    assert published.published and published.gpus == (64, 128, 256, 512, 1024, 2048)
    assert published.tokens_per_s[0] == pytest.approx(95239, abs=1)


# --- baselines ---


def test_a_difference_larger_than_the_noise(tmp_path: Path) -> None:
    for name in "abc":
        point_log(tmp_path / "new", "fp8", 64, 12.0, name=name)
        point_log(tmp_path / "old", "fp8", 64, 11.0, name=name)
    report = build_report([tmp_path / "new"], baseline=[tmp_path / "old"], reference=None)
    (found,) = report.comparisons
    assert (found.verdict, found.regression, report.exit_code) == (model.SLOWER, True, 1)
    assert found.ratio is not None and found.ratio == pytest.approx(11 / 12, rel=2e-3)
    assert found.low is not None and found.high is not None and found.low < found.ratio < found.high < 1
    assert "noise from repeats (3 runs, baseline 3)" in found.why
    (found,) = build_report([tmp_path / "old"], baseline=[tmp_path / "new"]).comparisons
    assert (found.verdict, found.regression) == (model.QUICKER, False)


def test_a_difference_within_the_noise(tmp_path: Path) -> None:
    for name, new, old in (("a", 11.0, 11.3), ("b", 11.5, 11.0), ("c", 11.2, 11.4)):
        point_log(tmp_path / "new", "fp8", 64, new, name=name)
        point_log(tmp_path / "old", "fp8", 64, old, name=name)
    # Its own steps would call this single run slower; the repeats of the other point know better.
    point_log(tmp_path / "new", "fp8", 128, 11.2)
    point_log(tmp_path / "old", "fp8", 128, 11.1)
    report = build_report([tmp_path / "new"], baseline=[tmp_path / "old"], reference=None)
    assert [found.verdict for found in report.comparisons] == [model.NO_DIFFERENCE, model.NO_DIFFERENCE]
    assert report.exit_code == 0
    single = [tmp_path / "new/24.09/fp8/70b/128"], [tmp_path / "old/24.09/fp8/70b/128"]
    (found,) = build_report(single[0], baseline=single[1], reference=None).comparisons
    assert found.verdict == model.SLOWER and not found.regression and "repeat the runs" in found.why


def test_runs_compared_with_themselves_are_told(tmp_path: Path) -> None:
    point_log(tmp_path, "fp8", 64, 11.0)
    report = build_report([tmp_path], baseline=[tmp_path], reference=None)
    assert report.comparisons[0].verdict == model.NO_DIFFERENCE
    assert "runs= and baseline= share 1 of 1 runs: compared with themselves" in report.warnings


def test_what_changed_is_named(tmp_path: Path) -> None:
    old = copy_run("d39a", tmp_path / "old")
    new = copy_run("d39a", tmp_path / "new", {"gc_interval: 25": "gc_interval: 5"}, factor=2)
    node = json.loads((new / NODE).read_text())
    node["packages"] |= {"torch": "2.14.0"}
    node["packages"].pop("triton", None)
    node["environment"] |= {"NCCL_DEBUG": "INFO", "SLURM_JOB_ID": "4712", "MASTER_PORT": "1"}
    node["cpu_cores"] = 4
    (new / NODE).write_text(json.dumps(node))
    (found,) = build_report([new], baseline=[old]).comparisons
    assert [(c.key, c.before, c.after) for c in found.configuration] == [("trainer.gc_interval", "25", "5")]
    assert [(c.key, c.after) for c in found.packages] == [("torch", "2.14.0")]
    assert [(c.key, c.before, c.after) for c in found.environment] == [("NCCL_DEBUG", None, "INFO")]
    assert [(c.key, c.after) for c in found.hardware] == [("cpu_cores", "4")]
    assert found.verdict == model.SLOWER


def test_the_baselines_nearest_point_is_taken(tmp_path: Path) -> None:
    copy_run("d39a", tmp_path / "new/a")
    copy_run("d39a", tmp_path / "old/a", {"tensor_model_parallel_size: 1": "tensor_model_parallel_size: 2"})
    copy_run("d39a", tmp_path / "old/b")
    copy_run("6def", tmp_path / "new/c")
    report = build_report([tmp_path / "new"], baseline=[tmp_path / "old"])
    (found,) = report.comparisons
    assert found.configuration == () and found.ratio == 1.0
    assert "tiny fp32 2gpu: the baseline has no such point" in report.warnings


def test_without_numbers_nothing_is_decided(tmp_path: Path) -> None:
    new, old = point_log(tmp_path / "new", "fp8", 64, 11.0, steps=30), point_log(tmp_path / "old", "fp8", 64, 11.0)
    (found,) = build_report([new], baseline=[old], reference=None).comparisons
    assert (found.verdict, found.ratio, found.why) == (model.UNDECIDED, None, "one of the two has no finished run")


# --- input ---


def test_one_bad_folder_hides_no_other(tmp_path: Path) -> None:
    copy_run("d39a", tmp_path / "good")
    (copy_run("d39a", tmp_path / "bad") / record.CONFIG).write_text("{")
    (tmp_path / "install.log").write_text("pip install\n")
    report = build_report([tmp_path])
    assert [run.name for run in report.runs] == ["good"]
    assert any("bad: the record cannot be read" in text for text in report.warnings)
    # The same file by its name: nothing tells that it is a run's log.
    with pytest.raises(BenchError, match=r"install\.log: no line with train_step_timing and a step"):
        build_report([tmp_path / "install.log"])
    crashed = tmp_path / "24.09/fp8/70b/64/a.out"
    crashed.parent.mkdir(parents=True)
    crashed.write_text("RuntimeError: out of memory\n")
    assert only(build_report([crashed])).verdict.value == model.INCOMPLETE
    assert "1 file holds no training step: install.log" in report.warnings


def test_nothing_to_report_is_said(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="no run folder and no log with train_step_timing there"):
        build_report([tmp_path])
    path = point_log(tmp_path, "fp8", 64, 11.0)
    with pytest.raises(BenchError, match=r"baseline=.*there is no such file or folder"):
        build_report([path], baseline=[tmp_path / "nowhere"])
    for options in ({"tolerance": -1.0}, {"tolerance": 1.0}, {"total_tokens": 0.0}, {"total_tokens": math.nan}):
        with pytest.raises(BenchError, match=next(iter(options))):
            build_report([path], **options)  # type: ignore[arg-type]


def test_an_unknown_log_is_in_no_point() -> None:
    report = build_report([LOGS / "nemo2.out"])
    assert report.points == () and report.exit_code == 0
    assert any("nemo2.out" in text for text in report.warnings)


# --- outputs ---


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Real runs and made-up logs, good and bad, with a baseline."""
    root = tmp_path_factory.mktemp("runs")
    for gpus, time, steps in ((64, 11.0, 50), (128, 12.0, 50), (256, 10.0, 50), (512, 11.0, 20)):
        point_log(root, "fp8", gpus, time, steps=steps)
    shutil.copy(LOGS / "nan.out", root / "24.09/fp8/70b/64/nan.out")
    return build_report([TINY, root], baseline=[TINY], given=H100)


def test_results_json_gives_the_report_back(everything: Report) -> None:
    text = to_json(everything)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    content = json.loads(text, parse_constant=refuse)
    assert content["schema_version"] == model.SCHEMA_VERSION
    again = from_json(text)
    assert to_json(again) == text
    assert again.points == everything.points and again.comparisons == everything.comparisons
    nan = next(run for run in again.runs if run.name == "nan.out")
    assert nan.steps.loss[-1] is not None and math.isnan(nan.steps.loss[-1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no results.json"),
        ("[]", "no results.json"),
        ('{"schema_version": 99}', "schema version 99"),
        ('{"schema_version": 1}', "damaged"),
    ],
)
def test_another_results_json_is_refused(text: str, message: str) -> None:
    with pytest.raises(BenchError, match=message):
        from_json(text)


def test_the_schema_is_documented_field_by_field() -> None:
    """Every field of every class is described in its docstring."""
    import dataclasses

    kinds = [kind for kind in vars(model).values() if isinstance(kind, type) and kind.__module__ == model.__name__]
    assert len(kinds) > 12
    for kind in kinds:
        for field in dataclasses.fields(kind):
            assert field.name in (kind.__doc__ or ""), f"{kind.__name__}.{field.name}"


def test_no_output_shows_a_result_of_a_run_that_is_none(everything: Report) -> None:
    rows = {row["run"]: row for row in csv.DictReader(io.StringIO(tables.csv_text(everything)))}
    assert len(rows) == len(everything.runs)
    shown = {row[0]: row for row in tables.runs_table(everything.runs).rows}
    for run in everything.runs:
        row = rows[run.name]
        results = [row[key] for key in ("step_time_median_s", "step_time_last_s", "tokens_per_s", "mfu", "verdict")]
        if run.final:
            assert run.times is not None and float(results[0]) == run.times.median_s
        else:
            assert results == [""] * 5 and row["why_not_final"] and run.numbers is None
            assert row["first_loss"] == row["last_loss"] == "" and {*shown[run.name][2:9]} == {""}
    table = dict((row[0], row) for row in tables.points_table(everything).rows)
    for point in everything.points:
        if not point.final_runs:
            assert {*table[point.name][2:9]} == {""}


def test_markdown_tables_are_whole(tmp_path: Path, everything: Report) -> None:
    odd = replace(everything.points[0], name="a | b\n*c* <d>")
    text = tables.markdown(replace(everything, points=(odd, *everything.points[1:])))
    lines = [line.replace("\\|", "") for line in text.splitlines() if line.startswith("|")]
    assert lines and {line.count("|") for line in lines} == {13, 11, 5}
    assert "a \\| b \\*c\\* &lt;d>" in text
    for heading in ("## Points", "## Runs", "## Against the baseline", "## How the numbers are computed"):
        assert heading in text


def test_flattened_configurations_keep_every_value() -> None:
    nested = {"a": {"b": 1, "c": {"d": None}}, "e": [1, 2], "f": {}}
    assert flatten(nested) == {"a.b": "1", "a.c.d": "null", "e": "[1, 2]", "f": "{}"}


def test_train_py_and_the_report_say_the_same() -> None:
    from nemo_bench.report.numbers import rows, summarise

    run = next(run for run in build_report([TINY / "1"]).runs if run.path.endswith("d39a"))
    assert rows(run) == rows(summarise(Path(run.path)))
