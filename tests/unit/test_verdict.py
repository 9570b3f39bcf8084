"""Verdicts: nothing passes that is not the published run, measured well, with numbers that can be right."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from nemo_bench import flops
from nemo_bench.record import folder as record
from nemo_bench.record.node import NODE
from nemo_bench.report import model, references, tables
from nemo_bench.report.bare_logs import Given
from nemo_bench.report.build import build_report
from nemo_bench.report.model import Point, Report, to_json
from nemo_bench.report.terminal import print_report
from nemo_bench.report.verdict import must_agree

RUNS = Path(__file__).parents[1] / "runs/nemo-2.7.3"
H200 = RUNS / "bf16/70b/1/20261122-172402-5f1a"
TABLE = Path(references.__file__).parent / "published/nvidia-24.09.yaml"
H100 = Given(gpu="h100")
SIZES = flops.Architecture(80, 8192, 28672, 64, 8, 128256)


def log_text(times: list[float], *, batch: int = 128, of: int | None = None, end: str = "", **fields: Any) -> str:
    """A log of NeMo 1; each field is a value, or a function of the step."""
    text, of = "", of or len(times)
    for step, time_s in enumerate(times):
        values = {"reduced_train_loss": f"{9 - step / 100:.3f}", "grad_norm": "1.5", **fields}
        printed = ", ".join(f"{key}={value(step) if callable(value) else value}" for key, value in values.items())
        text += (
            f"Epoch 0: : 2%|#| {step + 1}/{of} [00:01<00:09, {printed}, global_batch_size={batch}, "
            f"global_step={step}.0, train_step_timing in s={time_s:.4g}]\n"
        )
    return text + end


def write(root: Path, text: str, precision: str = "fp8", gpus: int = 64, name: str = "a") -> Path:
    path = root / f"24.09/{precision}/70b/{gpus}/{name}.out"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def judged(tmp_path: Path, text: str, given: Given = H100, **options: Any) -> tuple[Report, Point]:
    report = build_report([write(tmp_path, text)], given=given, **options)
    (point,) = report.points
    return report, point


STEADY = [30.0, *[11.0, 11.05, 10.95] * 16, 11.0]


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


def published_run(folder: Path, **changes: str) -> Path:
    """A run folder that does what the 24.09 table's bf16 point of 64 GPUs did, at its step time."""
    run = Path(shutil.copytree(H200, folder))
    config = (run / record.CONFIG).read_text()
    for old, new in {
        "num_layers: 4": "num_layers: 80",
        "global_batch_size: 4\n": "global_batch_size: 128\n",
        "num_nodes: 1": "num_nodes: 8",
        "devices: 1": "devices: 8",
        "  name: h200": "  name: h100",
        **changes,
    }.items():
        assert old in config, old
        config = config.replace(old, new)
    (run / record.CONFIG).write_text(config)
    node = json.loads((run / NODE).read_text())
    node["gpus"] = [{"name": "NVIDIA H100 80GB HBM3"}]
    node["environment"]["NCCL_NVLS_ENABLE"] = "1"
    (run / NODE).write_text(json.dumps(node))
    (run / "rank0.out").unlink()  # of one GPU
    rows = record.read_lines(run / record.STEPS)[0]
    lines = [json.dumps({**row, "train_step_timing_s": 14.7 + 0.01 * (row["step"] % 3)}) for row in rows]
    (run / record.STEPS).write_text("\n".join(lines) + "\n")
    return run


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
    ours = tmp_path / "ours.yaml"
    ours.write_text(f"{TABLE.read_text()}settings: {{model.rotary_base: 10000, model.init_method_std: 0.02}}\n")
    (point,) = build_report([run], reference=str(ours)).points
    assert any("software: nemo-2.7.3" in text for text in point.verdict.differences)
    assert "settings: model.rotary_base=500000, published with 10000" in point.verdict.differences


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


def test_days_and_throughput_come_from_the_mean(tmp_path: Path) -> None:
    point = judged(tmp_path, log_text([60.0 if i % 10 == 9 else 11.0 for i in range(50)]))[1]
    assert point.numbers is not None and point.median_s == 11.0
    assert point.numbers.step_time_s == pytest.approx(15.9)
    assert point.numbers.days_to_train == pytest.approx(175, abs=1)


def test_repeats_that_disagree_are_undecided(tmp_path: Path) -> None:
    for name, time_s in (("a", 11.0), ("b", 8.0)):
        write(tmp_path, log_text([time_s] * 50), name=name)
    (point,) = build_report([tmp_path], given=H100).points
    assert point.verdict.value == model.UNDECIDED and "exceeds the tolerance" in point.verdict.why


# --- numbers that cannot be right ---


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"grad_norm": "inf"}, "the gradient norm is inf at step 0 and 49 more"),
        ({"grad_norm": lambda step: "nan" if step >= 48 else "1.0"}, "the gradient norm is nan at step 48"),
        ({"grad_norm": lambda step: "nan" if step == 49 else "1.0"}, "the gradient norm is nan at step 49"),
        ({"reduced_train_loss": "0.0"}, "the loss is 0 at step 0"),
        ({"reduced_train_loss": lambda step: "0.0" if step > 9 else "8.0"}, "the loss is 0 at step 10"),
        ({"reduced_train_loss": lambda step: f"{9 * 1.21**step:.4g}"}, "the loss grows from 9 to"),
        ({"reduced_train_loss": lambda step: "nan" if step > 20 else "6.0"}, "the loss is nan at step 21"),
        ({"reduced_train_loss": lambda step: "1e308" if step > 20 else "6.0"}, "the loss is 1e+308 at step 21"),
    ],
)
def test_training_that_broke_is_invalid(tmp_path: Path, fields: dict[str, Any], why: str) -> None:
    report, point = judged(tmp_path, log_text(STEADY, **fields))
    assert (point.verdict.value, report.exit_code, point.numbers) == (model.INVALID, 1, None)
    assert why in point.verdict.why


@pytest.mark.parametrize(
    ("fields", "remark"),
    [
        ({"grad_norm": lambda step: "inf" if step == 7 else "1.0"}, "step 7 has no finite gradient norm"),
        ({"reduced_train_loss": lambda step: f"{8 + step / 100:.2f}"}, "the loss does not fall: 8 to 8.47"),
        ({"reduced_train_loss": "8.0"}, "the loss does not fall: 8 to 8"),
        ({"reduced_train_loss": lambda step: f"{100 - step / 10}"}, "the first loss is 100; guessing gives 11.8"),
        ({"reduced_train_loss": lambda step: f"{8 - step / 1000:.3f}"}, None),
        ({"grad_norm": "0.0"}, "the gradient norm is 0 throughout"),
        ({"tokens_per_sec_per_gpu": "188"}, "the log prints 188 tokens/s a GPU, and this report finds 1,489"),
        ({"TFLOPS_per_GPU": "90"}, "the log prints 90 TFLOP/s a GPU"),
        ({"TFLOPS_per_GPU": "668"}, None),  # within 2% of the causal convention's
        ({"tokens_per_sec_per_gpu": "1490"}, None),
    ],
)
def test_what_is_only_worth_a_word(tmp_path: Path, fields: dict[str, Any], remark: str | None) -> None:
    report, point = judged(tmp_path, log_text([11.0] * 50, **fields))
    assert point.verdict.value == model.PASS
    texts = [text for text in report.runs[0].warnings if "not say" not in text]
    assert (not texts) if remark is None else any(remark in text for text in texts)


@pytest.mark.parametrize(
    ("time_s", "batch", "given_", "why"),
    [
        (11.0, 64, replace(H100, global_batch_size=640), "global_batch_size=640 is given, and the log has 64"),
        (2.0, 128, H100, "of the GPUs' peak is impossible: one of these is wrong: global_batch_size=128"),
    ],
)
def test_contradictions_and_more_than_a_gpu_can_do_are_invalid(
    tmp_path: Path, time_s: float, batch: int, given_: Given, why: str
) -> None:
    report, point = judged(tmp_path, log_text([time_s] * 50, batch=batch), given_)
    assert (point.verdict.value, report.exit_code) == (model.INVALID, 1)
    assert why in point.verdict.why


def lines(text: str, program: str = "NeMo 2") -> str:
    """The same steps as NeMo 2 or Megatron-LM writes them."""
    forms = {
        "NeMo 2": r"Training epoch 0, iteration \5/49 | global_batch_size: \4 | global_step: \5 | "
        r"reduced_train_loss: \3 | train_step_timing in s: \6",
        "Megatron-LM": r" iteration \1/ \2 | elapsed time per iteration (ms): \g<6>000.0 | global batch size: \4 | "
        r"lm loss: \3 | number of skipped iterations: 0 | number of nan iterations: 0 |",
    }
    pattern = r"Epoch.* (\d+)/(\d+) .*_loss=([^,]+), .*batch_size=(\d+), global_step=(\d+).0, .* in s=(\d+).*"
    return re.sub(pattern, forms[program], text)


WHOLE, HALF = log_text([11.0] * 50), log_text([11.0] * 25, of=50)
UNKNOWN = WHOLE.replace("/50 [", "/? [")
OUT_OF_MEMORY, REACHED = (
    "torch.OutOfMemoryError: CUDA out of memory\n",
    "`Trainer.fit` stopped: `max_steps=50` reached.\n",
)


@pytest.mark.parametrize(
    ("text", "given_", "verdict", "words"),
    [
        # whether it came to its end
        (UNKNOWN, H100, "PASS", "whether its log is complete is not known"),
        (UNKNOWN + OUT_OF_MEMORY, H100, "INCOMPLETE", "torch.OutOfMemoryError"),
        (WHOLE + REACHED + HALF + OUT_OF_MEMORY, H100, "INCOMPLETE", "step 25 of 50"),
        # what it prints of itself against its path and the command line
        ("num_layers ............ 40\n" + lines(WHOLE, "Megatron-LM"), H100, "INVALID", "num_layers=80 is given"),
        ("world_size ............ 64\n" + lines(WHOLE, "Megatron-LM"), H100, "PASS", "software: Megatron-LM"),
        ("fp8 ............ None\n" + WHOLE, H100, "INVALID", "precision=fp8 is given, and the log has fp8 None"),
        ("Starting with 8 processes\n" + WHOLE, H100, "INVALID", "gpus=64 is given, and the log has 8"),
        ("0  NVIDIA A100-SXM4-80GB  On |\n" + WHOLE, H100, "NOT COMPARABLE", "gpu=NVIDIA A100-SXM4-80GB"),
        ("0  NVIDIA H100 80GB HBM3  On |\n" + WHOLE, H100, "PASS", ""),
        ("".join(f"127: {line}\n0: {line}\n" for line in WHOLE.splitlines()), H100, "INVALID", "lines of rank 127"),
        (WHOLE, replace(H100, model="8b"), "NOT COMPARABLE", "model=8b is given, and its path says 70b"),
        (lines(WHOLE), H100, "PASS", "software: NeMo 2, published with 24.09"),
        # steps that Megatron-LM could not take
        (lines(WHOLE, "Megatron-LM").replace("nan iterations: 0", "nan iterations: 1"), H100, "INVALID", "norm is nan"),
        (
            lines(WHOLE, "Megatron-LM").replace("skipped iterations: 0", "skipped iterations: 1", 1),
            H100,
            "PASS",
            "step 1",
        ),
        # too little that counts
        (log_text([9.0, 11.6, 13.0, 10.4, 11.0]), H100, "UNDECIDED", "the 95% interval of the mean"),
        (log_text([11.0] * 39 + [0.0] * 11), H100, "UNDECIDED", "11 of 50 steps are left out"),
        (WHOLE.replace("\nEpoch", "\nSaving checkpoint\nEpoch", 43), H100, "UNDECIDED", "43 of 50 steps are left out"),
        ("activation checkpointing is on\n".join(WHOLE.splitlines(True)), H100, "PASS", ""),
        # one rank of four is slower: it ends the step, whoever wrote the line
        (
            "".join(f"{i % 4}: {line}\n" for line in WHOLE.splitlines() for i in range(3))
            + "".join(f"3: {line}\n" for line in log_text([12.5] * 50).splitlines()),
            H100,
            "FAIL",
            "12.5 s",
        ),
        ("".join(f"{i}:{line}\n" for i, line in enumerate(WHOLE.splitlines())), H100, "PASS", ""),  # grep -n
    ],
)
def test_what_misleads_in_a_log(tmp_path: Path, text: str, given_: Given, verdict: str, words: str) -> None:
    report, point = judged(tmp_path, text, given_)
    assert point.verdict.value == verdict, point.verdict.line
    assert words in f"{point.verdict.line} {point.verdict.remarks} {report.runs[0].warnings}"


def test_steps_of_a_batch_ramp_up_do_not_count(tmp_path: Path) -> None:
    text = log_text([2.75] * 28, batch=32, of=60) + "".join(log_text([11.0] * 60, of=60).splitlines(keepends=True)[28:])
    report, point = judged(tmp_path, text)
    assert point.verdict.value == model.PASS and report.runs[0].times is not None
    assert report.runs[0].times.excluded == {"other batch size": 28}
    assert any("28 steps have another global batch size than 128" in text for text in report.runs[0].warnings)


@pytest.mark.parametrize(
    ("changes", "formats"),
    [({"  name: bf16": "  name: fp8"}, "bf16"), ({"trainer_precision: bf16-mixed": "trainer_precision: '32'"}, "fp32")],
)
def test_a_precisions_name_agrees_with_its_formats(tmp_path: Path, changes: dict[str, str], formats: str) -> None:
    (point,) = build_report([published_run(tmp_path / "run", **changes)]).points
    assert point.verdict.value == model.INVALID and f"its number formats are {formats}'s" in point.verdict.why


# --- how a run ended ---


def test_an_error_after_the_last_step_is_a_warning(tmp_path: Path) -> None:
    end = "torch.OutOfMemoryError: CUDA out of memory\nsrun: error: node01: task 3: Exited with exit code 1\n"
    report, point = judged(tmp_path, log_text([11.0] * 50, end=end))
    assert point.verdict.value == model.PASS
    assert any("after its last step, the log ends in an error: srun: error" in text for text in report.runs[0].warnings)


def test_a_point_without_a_finished_run_is_incomplete(tmp_path: Path) -> None:
    report, point = judged(tmp_path, log_text([11.0] * 30, of=50))
    assert (point.verdict.value, point.numbers, report.exit_code) == (model.INCOMPLETE, None, 1)
    assert "the log ends at step 30 of 50" in point.verdict.why
    # a finished repeat settles it
    write(tmp_path, log_text([11.0] * 50), name="b")
    (point,) = build_report([tmp_path], given=H100).points
    assert (point.verdict.value, len(point.runs), len(point.final_runs)) == (model.PASS, 2, 1)


@pytest.mark.parametrize("length", [3000, 0])
def test_no_valid_run_is_no_success_where_nothing_is_published_either(tmp_path: Path, length: int) -> None:
    assert build_report([H200]).exit_code == 0
    run = Path(shutil.copytree(H200, tmp_path / "run"))
    (run / record.STEPS).write_text((run / record.STEPS).read_text()[:length])
    (run / "rank0.out").write_text("")
    assert build_report([run]).exit_code == 1


def test_remarks_are_said_once_for_all_repeats(tmp_path: Path) -> None:
    for name, drift in (("a", 1.03), ("b", 1.04), ("c", 1.0)):
        lines = log_text([11.0] * 25 + [11.0 * drift] * 25).splitlines(keepends=True)
        write(tmp_path, "".join(lines[:20]) + "Saving checkpoint\n" + "".join(lines[20:]), name=name)
    (point,) = build_report([tmp_path], given=H100).points
    assert point.verdict.remarks[:2] == (
        "steps left out: 1 (checkpoint) (in 3 of 3 runs)",
        "steps became 3.0% slower during the run (in 2 of 3 runs; numbers of the first)",
    )


def test_a_contradiction_in_what_was_published_is_shown(tmp_path: Path) -> None:
    path = write(tmp_path, log_text([14.98] * 50, batch=4096), "bf16", 2048)
    (point,) = build_report([path], given=H100).points
    assert any("belong to 14.92 s" in text for text in point.verdict.remarks)


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
def test_pass_means_that_all_that_must_agree_does_and_every_output_says_so(
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
    (content,) = json.loads(to_json(report))["points"]
    assert content["verdict"]["value"] == verdict.value
    (row,) = csv.DictReader(io.StringIO(tables.csv_text(report)))
    if point.numbers is not None:
        assert row["verdict"].startswith(verdict.value)
        assert float(row["tokens_per_s"]) == content["numbers"]["tokens_per_s"] == point.numbers.tokens_per_s
    markdown, terminal = tables.markdown(report), io.StringIO()
    print_report(Console(file=terminal, width=400), report)
    for text in (markdown, terminal.getvalue()):
        assert verdict.value in text and all(difference in text for difference in verdict.differences)
        if point.numbers is not None:
            assert f"{point.numbers.tokens_per_s:,.0f}" in text
