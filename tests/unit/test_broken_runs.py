"""Runs whose numbers cannot be right, or that did not come to their end: no verdict hides it."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemo_bench.record import folder as record
from nemo_bench.report import model
from nemo_bench.report.bare_logs import Given
from nemo_bench.report.build import build_report

from ..reports import H100, H200, SIZES, STEADY, judged, log_text, published_run, write

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
        ({"reduced_train_loss": lambda step: "NAN" if step > 20 else "6.0"}, "the loss is nan at step 21"),
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
OUT_OF_MEMORY = "torch.OutOfMemoryError: CUDA out of memory\n"
REACHED = "`Trainer.fit` stopped: `max_steps=50` reached.\n"
EXITED = "srun: error: node01: task 3: Exited with exit code 1\n"
RAMP_UP = log_text([2.75] * 28, batch=32, of=60) + "".join(log_text([11.0] * 60).splitlines(keepends=True)[28:])


@pytest.mark.parametrize(
    ("text", "given_", "verdict", "words"),
    [
        # whether it came to its end
        (UNKNOWN, H100, "UNDECIDED", "does not say how many steps were meant"),
        (UNKNOWN, replace(H100, max_steps=50), "PASS", ""),
        (UNKNOWN, replace(H100, max_steps=100), "INCOMPLETE", "step 50 of 100"),
        (UNKNOWN + OUT_OF_MEMORY, H100, "INCOMPLETE", "torch.OutOfMemoryError"),
        (WHOLE + lines(log_text([22.0] * 50), "Megatron-LM"), H100, "FAIL", "22 s"),  # another program's run behind it
        (WHOLE + REACHED + HALF + OUT_OF_MEMORY, H100, "INCOMPLETE", "step 25 of 50"),
        (WHOLE + OUT_OF_MEMORY + EXITED, H100, "PASS", "after its last step, the log ends in an error: srun: error"),
        # more than a GPU can do, and a batch that grows
        (log_text([2.0] * 50), H100, "INVALID", "peak is impossible: one of these is wrong: global_batch_size=128"),
        (RAMP_UP, H100, "PASS", "28 steps have another global batch size than 128"),
        # what it prints of itself against its path and the command line
        (
            log_text([11.0] * 50, batch=64),
            replace(H100, global_batch_size=640),
            "INVALID",
            "global_batch_size=640 is given, and the log has 64",
        ),
        (
            re.sub(r"(step: (\d+) .*)", lambda m: f"{m[1]} | consumed_samples: {64 * int(m[2]) + 64}", lines(WHOLE)),
            H100,
            "INVALID",
            "the log prints a batch of 128, and consumes 64 samples a step",
        ),
        ("num_layers ............ 40\n" + WHOLE, H100, "NOT COMPARABLE", "num_layers=40, published 80"),
        ("world_size ............ 64\n" + lines(WHOLE, "Megatron-LM"), H100, "PASS", "software: Megatron-LM"),
        ("fp8 ............ None\n" + WHOLE, H100, "INVALID", "precision=fp8 is given, and the log has fp8 None"),
        ("Starting with 8 processes\n" + WHOLE, H100, "INVALID", "gpus=64 is given, and the log has 8"),
        ("|  0  NVIDIA A100-SXM4-80GB  On |\n" + WHOLE, H100, "NOT COMPARABLE", "gpu=NVIDIA A100-SXM4-80GB"),
        ("|  0  NVIDIA H100 80GB HBM3  On |\nFP8 needs at least NVIDIA H100 GPUs\n" + WHOLE, H100, "PASS", ""),
        (
            "GPU 0: NVIDIA H100 80GB HBM3 (UUID: x)\nGPU 1: NVIDIA A100-SXM4-80GB (UUID: y)\n" + WHOLE,
            H100,
            "NOT COMPARABLE",
            "A100",
        ),
        ("NVIDIA H100 80GB HBM3\nNVIDIA A100-SXM4-80GB\n" + WHOLE, H100, "NOT COMPARABLE", "A100"),
        ("padded_vocab_size ............ 256000\n" + WHOLE, H100, "INVALID", "the log has 256000, padded"),
        (WHOLE, replace(H100, model="70b_slice", architecture=SIZES), "PASS", ""),  # a model is its sizes
        ("x\n" * 30_000 + "seq_length ............ 4096\n" + WHOLE, H100, "NOT COMPARABLE", "seq_length=4096"),
        (
            WHOLE + "seq_length ............ 4096\n",
            H100,
            "NOT COMPARABLE",
            "seq_length=4096, published 8192",
        ),  # buffered
        ("seq_length ............ 4096\n" + WHOLE, replace(H100, seq_length=8192), "INVALID", "the log has 4096"),
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
    assert report.exit_code == (verdict not in model.SUCCESSES)
    assert words in f"{point.verdict.line} {point.verdict.remarks} {report.runs[0].warnings}"


def test_the_files_of_one_jobs_ranks_are_one_run_and_a_copy_counts_once(tmp_path: Path) -> None:
    for rank in range(4):
        write(tmp_path, log_text([12.5 if rank == 3 else 11.0] * 50), name=f"rank{rank}")
    report = build_report([tmp_path], given=H100)
    assert [(len(point.runs), point.verdict.value) for point in report.points] == [(1, "FAIL")]
    write(tmp_path, log_text([12.5] * 49, of=50), name="rank3")  # a file that ends earlier
    assert "FAIL by the mean" in build_report([tmp_path], given=H100).points[0].verdict.why
    write(tmp_path / "other", log_text([11.0] * 50), name="a")
    write(tmp_path / "other", log_text([11.0] * 50), name="b")
    report = build_report([tmp_path / "other"], given=H100)
    assert len(report.runs) == 1 and "counts once" in report.warnings[0]


@pytest.mark.parametrize(
    ("changes", "formats"),
    [({"  name: bf16": "  name: fp8"}, "bf16"), ({"trainer_precision: bf16-mixed": "trainer_precision: '32'"}, "fp32")],
)
def test_a_precisions_name_agrees_with_its_formats(tmp_path: Path, changes: dict[str, str], formats: str) -> None:
    (point,) = build_report([published_run(tmp_path / "run", **changes)]).points
    assert point.verdict.value == model.INVALID and f"its number formats are {formats}'s" in point.verdict.why


# --- how a run ended ---


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
    for name, step_time_s in (("a", 11.0), ("b", 11.1), ("c", 11.2)):
        lines = log_text([step_time_s] * 50).splitlines(keepends=True)
        write(tmp_path, "".join(lines[:20]) + "Saving checkpoint\n" + "".join(lines[20:]), name=name)
    (point,) = build_report([tmp_path], given=H100).points
    assert point.verdict.remarks[0] == "steps left out: 1 (checkpoint) (in 3 of 3 runs)"
