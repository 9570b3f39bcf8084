"""Points, verdicts with their reasons, comparisons, and the report as JSON, CSV and Markdown."""

from __future__ import annotations

import json
import math
import shutil
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import Any

import pytest

from nemo_bench.errors import BenchError
from nemo_bench.record import folder as record
from nemo_bench.record.node import NODE
from nemo_bench.report import model, tables
from nemo_bench.report.build import build_report
from nemo_bench.report.model import Report, point_name, to_json

from ..reports import H100, write_log

RUNS = Path(__file__).parents[1] / "runs/nemo-2.7.3"
TINY = RUNS / "fp32/tiny"
GPU_SPEED = Path(__file__).parents[2] / "benchmarks/results/gpu_speed"


def point_log(root: Path, gpus: int, step_time_s: float, name: str = "a") -> Path:
    """A log of NeMo 1 in fp8, in the recipe's layout."""
    path = root / f"24.09/fp8/70b/{gpus}/{name}.out"
    write_log(path, step_time_s, 2 * gpus)
    return path


def copy_run(source: str, target: Path, changes: dict[str, Any] | None = None, factor: float = 1.0) -> Path:
    """A real run folder with some values of its configuration changed, and its steps made longer."""
    copied = Path(shutil.copytree(next(TINY.glob(f"*/*{source}")), target))
    config = (copied / record.CONFIG).read_text()
    for old, new in (changes or {}).items():
        assert old in config
        config = config.replace(old, new)
    (copied / record.CONFIG).write_text(config)
    rows, _ = record.read_lines(copied / record.STEPS)
    for row in rows:
        row["train_step_timing_s"] *= factor
    (copied / record.STEPS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return copied


# --- repeats, points, scaling ---


def test_repeats_give_a_confidence_interval(tmp_path: Path) -> None:
    for name, time in (("a", 11.0), ("b", 11.2), ("c", 11.4)):
        point_log(tmp_path, 64, time, name=name)
    (point,) = build_report([tmp_path]).points
    mean = point.step_time
    assert mean is not None and mean.degrees_of_freedom == 2
    assert point.numbers is not None and point.numbers.step_time_s == pytest.approx(11.2, abs=0.01)
    assert mean.margin == pytest.approx(4.3027 * 0.2 / math.sqrt(3), rel=0.05)
    single = build_report([tmp_path / "24.09/fp8/70b/64/a.out"]).points[0].step_time
    assert single is not None and single.margin < mean.margin / 10  # over its steps, by batches


def test_real_repeats_are_one_point_and_other_configurations_are_not() -> None:
    report = build_report([TINY])
    names = {point.name: point for point in report.points}
    assert [*names] == ["tiny fp32 1gpu data=mock", "tiny fp32 1gpu", "tiny fp32 2gpu"]
    # with and without checkpoints, 30 and 40 steps: the same point
    assert len(names["tiny fp32 1gpu"].final_runs) == 3
    assert names["tiny fp32 1gpu data=mock"].numbers is None
    assert report.verdict == model.INCOMPLETE and report.exit_code == 1
    curve = report.scaling[0]
    assert (curve.gpus, curve.published, curve.efficiency[0]) == ((1, 2), False, 1.0)


def test_what_changes_the_work_makes_another_point(tmp_path: Path) -> None:
    copy_run("d39a", tmp_path / "a")
    copy_run("d39a", tmp_path / "b", {"tensor_model_parallel_size: 1": "tensor_model_parallel_size: 2"})
    copy_run("d39a", tmp_path / "c", {"seed: 1234": "seed: 4321", "max_steps: 30": "max_steps: 25"})
    names = [point.name for point in build_report([tmp_path]).points]
    # Their records name no override that tells them apart.
    assert names == ["tiny fp32 1gpu", "tiny fp32 1gpu #2"]


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ((), ""),
        (("precision=fp8", "scale=64gpu", "trainer.max_steps=30", "hydra/launcher=submitit_slurm"), ""),
        (("cluster.account=me", "stage_path=/x", "checkpoint.every_n_steps=5", "+experiment=x"), ""),
        (("data=mock", "cluster.env.NCCL_DEBUG=INFO"), " data=mock NCCL_DEBUG=INFO"),
        (("model.tensor_model_parallel_size=2", "model.virtual_pipeline_model_parallel_size=null"), " TP2 VP1"),
        (("model.num_layers=4", "precision.fp8=null", "model.num_layers=8"), " num_layers=8 fp8=null"),
    ],
)
def test_a_points_name_is_what_was_chosen_for_it(overrides: tuple[str, ...], name: str) -> None:
    assert point_name("70b", "fp8", 64, overrides) == f"70b fp8 64gpu{name}"


def test_a_point_has_the_same_name_in_every_report() -> None:
    together = {point.name for point in build_report([GPU_SPEED], reference=None).points}
    alone = {build_report([path], reference=None).points[0].name for path in GPU_SPEED.iterdir() if path.is_dir()}
    assert alone == together and len(alone) == 14


def test_the_table_of_the_gpus_page_is_that_of_the_records() -> None:
    text = (GPU_SPEED.parents[2] / "docs" / "gpus.md").read_text()
    lines = text[text.index("## Measured on H200s") :].splitlines()
    table_lines = dropwhile(lambda line: not line.startswith("|"), lines)
    header, _, *rows = [
        [cell.strip() for cell in line.strip("| ").split("|")]
        for line in takewhile(lambda line: line.startswith("|"), table_lines)
    ]
    table = tables.points_table(build_report([GPU_SPEED]))
    columns = [table.columns.index(name) for name in header]
    assert sorted(rows) == sorted([row[column] for column in columns] for row in table.rows)


def test_the_scaling_curve_beside_the_published_one(tmp_path: Path) -> None:
    for gpus, time in ((64, 11.0), (128, 11.0), (256, 12.0)):
        point_log(tmp_path, gpus, time)
    measured, published = build_report([tmp_path], given=H100).scaling
    assert (measured.published, published.published) == (False, True)
    assert measured.gpus == published.gpus == (64, 128, 256)
    assert measured.efficiency == pytest.approx((1.0, 1.0, 11 / 12), abs=5e-3)
    assert published.tokens_per_s[0] == pytest.approx(95239, abs=1)


# --- baselines ---


def test_a_difference_larger_than_the_noise(tmp_path: Path) -> None:
    for name in "abc":
        point_log(tmp_path / "new", 64, 12.0, name=name)
        point_log(tmp_path / "old", 64, 11.0, name=name)
    report = build_report([tmp_path / "new"], baseline=[tmp_path / "old"], reference=None)
    (comparison,) = report.comparisons
    assert (comparison.verdict, comparison.regression, report.exit_code) == (model.SLOWER, True, 1)
    assert comparison.ratio is not None and comparison.ratio == pytest.approx(11 / 12, rel=2e-3)
    assert comparison.interval is not None and comparison.interval[0] < comparison.ratio < comparison.interval[1] < 1
    assert "noise from repeats (3 runs, baseline 3)" in comparison.why
    (comparison,) = build_report([tmp_path / "old"], baseline=[tmp_path / "new"]).comparisons
    assert (comparison.verdict, comparison.regression) == (model.FASTER, False)
    report = build_report([tmp_path / "new"], baseline=[tmp_path / "new"], reference=None)
    assert report.comparisons[0].verdict == model.NO_DIFFERENCE
    assert "runs= and baseline= share 3 of 3 runs: compared with themselves" in report.warnings


def test_what_changed_is_named(tmp_path: Path) -> None:
    old = copy_run("d39a", tmp_path / "old")
    new = copy_run("d39a", tmp_path / "new", {"gc_interval: 25": "gc_interval: 5"}, factor=2)
    node = json.loads((new / NODE).read_text())
    node["packages"] |= {"torch": "2.14.0"}
    node["packages"].pop("triton", None)
    node["environment"] |= {"NCCL_DEBUG": "INFO", "SLURM_JOB_ID": "4712", "MASTER_PORT": "1"}
    node["cpu_cores"] = 4
    (new / NODE).write_text(json.dumps(node))
    (comparison,) = build_report([new], baseline=[old]).comparisons
    assert [(c.key, c.before, c.after) for c in comparison.changes["configuration"]] == [
        ("trainer.gc_interval", "25", "5")
    ]
    assert [(c.key, c.after) for c in comparison.changes["packages"]] == [("torch", "2.14.0")]
    assert [(c.key, c.before, c.after) for c in comparison.changes["environment"]] == [("NCCL_DEBUG", None, "INFO")]
    assert [(c.key, c.after) for c in comparison.changes["hardware"]] == [("cpu_cores", "4")]
    assert comparison.verdict == model.SLOWER


def test_the_baselines_nearest_point_is_taken(tmp_path: Path) -> None:
    copy_run("d39a", tmp_path / "new/a")
    copy_run("d39a", tmp_path / "old/a", {"tensor_model_parallel_size: 1": "tensor_model_parallel_size: 2"})
    copy_run("d39a", tmp_path / "old/b")
    copy_run("6def", tmp_path / "new/c")
    report = build_report([tmp_path / "new"], baseline=[tmp_path / "old"])
    (comparison,) = report.comparisons
    assert comparison.changes["configuration"] == () and comparison.ratio == 1.0
    assert "tiny fp32 2gpu: the baseline has no such point" in report.warnings


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
    assert build_report([crashed]).points[0].verdict.value == model.INCOMPLETE
    assert "files without a training step: 1 (install.log)" in report.warnings


def test_results_json_is_strict_json(report: Report) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    content = json.loads(to_json(report), parse_constant=refuse)
    assert content["schema_version"] == model.SCHEMA_VERSION
    assert [point["verdict"]["value"] for point in content["points"]] == [p.verdict.value for p in report.points]
    nan = next(run for run in content["runs"] if run["steps"]["loss"][-1] == "NaN")
    assert nan["invalid"] == "the loss is nan at step 20 and 29 more"
