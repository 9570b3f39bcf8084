"""Run folders and bare logs as runs: what they are, what counts, and what keeps them from being results."""

from __future__ import annotations

import json
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from nemo_bench.errors import BenchError
from nemo_bench.record import folder as record
from nemo_bench.record.node import NODE
from nemo_bench.record.ranks import RANKS
from nemo_bench.report.bare_logs import Given, load_log
from nemo_bench.report.build import build_report
from nemo_bench.report.runs import load_run
from nemo_bench.report.terminal import summary_rows

LOGS = Path(__file__).parents[1] / "logs"
TINY = Path(__file__).parents[1] / "runs/nemo-2.7.3/fp32/tiny"
CHECKPOINTS = TINY / "1/20261122-160508-ecda"
FAILED = TINY / "1/20261122-160352-dbed"
H200 = Path(__file__).parents[1] / "runs/nemo-2.7.3"
H200_DONE, H200_KILLED = H200 / "bf16/70b/1/20261122-172402-5f1a", H200 / "fp8/70b/1/20261122-172139-8348"
PLAIN = TINY / "1/20261122-165153-d39a"
TWO = TINY / "2/20261122-163217-6def"
KNOWN = Given(model="70b", precision="fp8", gpus=64, gpu="h100")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A real run folder to damage."""
    return Path(shutil.copytree(PLAIN, tmp_path / "run"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite_steps(run_dir: Path, rows: list[dict[str, Any]]) -> None:
    (run_dir / record.STEPS).write_text("".join(json.dumps(row) + "\n" for row in rows))


def steps_in(run_dir: Path) -> list[dict[str, Any]]:
    return record.read_lines(run_dir / record.STEPS)[0]


# --- run folders ---

# Each line holds the one before it nine times: 9^20 values.
ALIASES = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 21))
CONFIG = (PLAIN / record.CONFIG).read_text()
IMPOSSIBLE = {
    "tensor_model_parallel_size: 1": "tensor_model_parallel_size: 0",
    "seq_length: 128": "seq_length: -5",
    "num_nodes: 1": "num_nodes: 0",
    "hidden_size: 128": "hidden_size: many",
}
PROFILE = (
    '{"rank": 0, "device": null, "steps": [9], "step_ms": 1.5, "classes": [], "idle_ms": 0, "communication_ms": 0, '
    '"exposed_communication_ms": 0, "terms": {}}'
)


def test_a_real_run_is_a_result() -> None:
    run = load_run(PLAIN)
    assert (run.state, run.final, run.why_not_final) == ("completed", True, None)
    assert (run.model, run.precision, run.gpus, run.nodes, run.gpu, run.data) == ("tiny", "fp32", 1, 1, "cpu", "local")
    assert (run.version, run.software, run.entrypoint, run.container) == ("nemo-2.7.3", "nemo-2.7.3", "nemo2", None)
    assert run.layout == {"TP": 1, "PP": 1, "VP": 1, "CP": 1, "MBS": 8, "DP": 1, "GA": 4}
    assert len(run.steps) == 30 and run.times is not None and run.times.counted == 28
    assert run.numbers is not None
    assert run.numbers.step_time_s == run.times.mean_s
    assert run.numbers.tokens_per_s == pytest.approx(128 * 32 / run.times.mean_s)
    assert run.numbers.at(run.times.last_s).tokens_per_s == pytest.approx(128 * 32 / run.times.last_s)
    assert run.numbers.peak_source is not None and run.numbers.peak_source.startswith("measured: float32")
    assert run.record.packages["megatron-core"] == "0.15.3" and run.record.environment["RANK"] == "0"


def test_steps_after_a_checkpoint_are_left_out_and_counted() -> None:
    run = load_run(CHECKPOINTS)
    marked = {step: why for step, why in zip(run.steps.step, run.steps.excluded) if why == "checkpoint"}
    assert [*marked] == [10, 20, 30]  # after steps 9, 19, 29; none follows 39
    assert run.times is not None and run.times.excluded == {"checkpoint": 3}
    assert run.times.warmup_steps + run.times.counted + 3 == 40


def test_a_failed_run_says_so_and_gives_no_number() -> None:
    run = load_run(FAILED)
    assert (run.state, run.final, run.numbers, run.times) == ("failed", False, None, None)
    assert run.why_not_final is not None and run.why_not_final.startswith("failed at step 0 of 40: AssertionError")
    assert [name for name, _, _ in summary_rows(run)] == ["no result"]


def test_a_real_run_on_an_h200() -> None:
    run = load_run(H200_DONE)
    assert (run.final, run.gpu, run.gpu_reported, run.data) == (True, "h200", "NVIDIA H200", "mock")
    assert run.times is not None and run.numbers is not None and run.numbers.mfu is not None
    # The validation came after the last step: it disturbed none.
    assert (len(run.steps), run.times.warmup_steps, run.times.excluded) == (30, 1, {})
    assert (f"{run.times.median_s:.3f}", f"{run.numbers.mfu:.1%}") == ("1.652", "60.3%")
    assert run.numbers.peak_source == "h200 bf16, dense, published" and run.peak_memory_gib == pytest.approx(
        102.99, rel=1e-5
    )


def test_a_run_killed_after_its_last_step_keeps_its_numbers_with_a_warning() -> None:
    """By its time limit, while it wound up: all steps are there."""
    run = load_run(H200_KILLED)
    assert (run.state, run.final, len(run.steps)) == ("killed", True, 30) and run.numbers is not None
    assert "killed after its last step, 30 of 30: SIGTERM from outside" in run.warnings


def test_ranks_are_held_beside_each_other(tmp_path: Path) -> None:
    assert [rank.straggler for rank in load_run(TWO).ranks] == [False, False]
    copied = Path(shutil.copytree(TWO, tmp_path / "run"))
    edit(copied / "peak_rank1.json", tflops=0.05)
    slow = load_run(copied).ranks[1]
    assert slow.straggler and slow.measure == "matrix rate (TFLOP/s)" and slow.slower == pytest.approx(0.888, abs=1e-2)


ELSEWHERE = {"host": "elsewhere", "pid": 1, "started": "1"}


@pytest.mark.parametrize(
    ("state", "steps", "done", "why", "warning"),
    [
        ("completed", slice(0, 30), True, None, None),
        ("completed", slice(0, 25), True, "the record ends at step 25 of 30", None),
        ("completed", slice(27, 30), True, "not a measurement", None),
        ("killed", slice(0, 12), False, "killed at step 12 of 30: SIGTERM", None),
        ("interrupted", slice(0, 12), False, "interrupted at step 12 of 30", None),
        ("running", slice(0, 20), False, "running at step 20 of 30", None),
        # All steps are there: how it ended is worth a word.
        ("failed", slice(0, 30), False, None, "failed after its last step, 30 of 30: SIGTERM"),
        ("submitted", slice(0, 30), False, None, "no end was recorded after its last step, 30 of 30"),
        ("submitted", slice(0, 30), True, None, None),  # rank 0 saw the end
    ],
)
def test_how_a_run_ended(
    copy: Path, state: str, steps: slice, done: bool, why: str | None, warning: str | None
) -> None:
    edit(copy / record.RUN, status={"state": state, "reason": "SIGTERM"}, launcher=ELSEWHERE)
    rewrite_steps(copy, steps_in(copy)[steps])
    if not done:
        (copy / record.EVENTS).write_text('{"event": "training", "time": 1, "first_step": 0}\n')
    run = load_run(copy)
    assert (why or "None") in str(run.why_not_final) and run.final == (run.numbers is not None)
    assert [text for text in run.warnings if "last step" in text] == ([] if warning is None else [run.warnings[0]])
    assert warning is None or warning in run.warnings[0]
    if not run.final:
        assert [name for name, _, _ in summary_rows(run)][-1] == "no result"


@pytest.mark.parametrize("loss", ["nan", "inf"])
def test_a_loss_that_is_no_number_is_no_result(copy: Path, loss: str) -> None:
    steps = steps_in(copy)
    steps[7]["loss"] = loss
    rewrite_steps(copy, steps)
    run = load_run(copy)
    assert run.why_not_final == run.invalid == f"the loss is {loss} at step 7" and run.numbers is None


@pytest.mark.parametrize(("data", "said"), [("name: local", True), ("name: mock", False)])
def test_random_tokens_are_not_learnt(copy: Path, data: str, said: bool) -> None:
    rewrite_steps(copy, [{**row, "loss": 5 + row["step"] / 100} for row in steps_in(copy)])
    config = (copy / record.CONFIG).read_text()
    assert "name: local" in config
    (copy / record.CONFIG).write_text(config.replace("name: local", data))
    assert any("the loss does not fall" in text for text in load_run(copy).warnings) == said


def test_a_requeued_run_counts_the_later_steps(copy: Path) -> None:
    steps = steps_in(copy)
    again = [{**row, "train_step_timing_s": 9.0 if row["step"] == 10 else 0.5} for row in steps[10:]]
    rewrite_steps(copy, steps[:15] + again)
    events = [{"event": "training", "first_step": 0}, {"event": "validation", "after_step": 12}]
    events += [{"event": "checkpoint", "after_step": 9}, {"event": "training", "first_step": 10}]
    events += [{"event": "done", "cpu_wait_share": 0.6}]
    (copy / record.EVENTS).write_text("".join(json.dumps(event) + "\n" for event in events))
    run = load_run(copy)
    assert run.final and run.steps.step == [*range(30)]
    assert run.steps.time_s[10:15] == [9.0, 0.5, 0.5, 0.5, 0.5]
    # the validation after step 12 belongs to the steps that were lost
    assert run.steps.excluded[10] == "checkpoint" and run.steps.excluded[13] is None
    assert any("5 steps were done again" in text for text in run.warnings)
    (remark,) = run.remarks
    assert "rank 0 waited for a core in 60% of its time" in remark and ("remark", "", remark) in summary_rows(run)


def test_steps_come_from_the_log_where_there_is_no_other_record(tmp_path: Path) -> None:
    copied = Path(shutil.copytree(CHECKPOINTS, tmp_path / "run"))
    whole = load_run(copied)
    (copied / record.STEPS).unlink()
    run = load_run(copied)
    assert run.final and run.times is not None and whole.times is not None
    assert run.times.median_s == pytest.approx(whole.times.median_s, rel=1e-3)
    assert run.times.excluded == whole.times.excluded
    assert "the steps are read from the log: four digits each" in run.warnings


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *product([record.CONFIG, record.RUN], ["", "[1]", "{", "model: ${nowhere}", ALIASES, None]),
        (record.RUN, '{"status": {"state": "banana"}, "launcher": {"host": "elsewhere"}}'),
        (RANKS, '{"ranks": [{"rank": 0, "steps": 9, "throttled": ["hw_slowdown"]}]}'),
        (RANKS, '{"ranks": [{"rank": 0, "steps": 9, "own_time_s": "x"}]}'),
        ("profile/rank0.json", PROFILE.replace("{}", '{"host": "x"}')),
        ("profile/rank0.json", PROFILE.replace("1.5", "null")),
        ("profile/rank0.json", PROFILE.replace("1.5", "0")),
        *((record.CONFIG, CONFIG.replace(old, new)) for old, new in IMPOSSIBLE.items()),
    ],
)
def test_a_damaged_record_is_one_message(copy: Path, name: str, content: str | None) -> None:
    (copy / name).unlink(missing_ok=True)
    (copy / name).parent.mkdir(exist_ok=True)
    if content is not None:
        (copy / name).write_text(content)
    with pytest.raises(BenchError, match="the record cannot be read"):
        load_run(copy)


@pytest.mark.parametrize("name", [record.STEPS, record.EVENTS])
def test_lines_that_a_kill_cut_off_are_left_out(copy: Path, name: str) -> None:
    with open(copy / name, "a") as file:
        file.write('{"step": 31, "lo{"step": 30, "loss": 1.0}\n{"step": 3')
    assert load_run(copy).steps.step == [*range(30)]


@pytest.mark.parametrize("name", [NODE, record.EVENTS, "peak_rank0.json"])
def test_what_a_run_can_do_without(copy: Path, name: str) -> None:
    (copy / name).unlink()
    assert len(load_run(copy).steps) == 30


def test_secrets_of_a_record_stay_there(copy: Path) -> None:
    text = (copy / record.CONFIG).read_text().replace("  env: {}", "  env: {HF_TOKEN: hf_abcdefghijklmnopqrst}", 1)
    (copy / record.CONFIG).write_text(text)
    assert "hf_abcdefghijklmnopqrst" in text
    edit(copy / record.RUN, command="python train.py +cluster.env.WANDB_API_KEY=0123456789abcdef")
    edit(copy / NODE, environment={"NCCL_DEBUG": "INFO", "HF_TOKEN": "hf_abcdefghijklmnopqrst"})
    shown = repr(load_run(copy))
    assert "hf_abcdefghijklmnopqrst" not in shown and "0123456789abcdef" not in shown and "NCCL_DEBUG" in shown


# --- logs ---


def test_a_log_knows_itself_by_its_path_and_the_command_line_wins(tmp_path: Path) -> None:
    path = tmp_path / "results/24.11/fp8/70b/128/log-4711.out"
    path.parent.mkdir(parents=True)
    shutil.copy(LOGS / "nemo1_24_09.out", path)
    run = load_log(path, [], Given(), 1e12)
    assert (run.version, run.precision, run.model, run.gpus) == ("24.11", "fp8", "70b", 128)
    assert run.identified["gpus"] == "path" and run.identified["seq_length"] == "conf/model/70b.yaml"
    assert (run.global_batch_size, run.seq_length) == (128, 8192)
    assert run.final and run.numbers is not None and run.numbers.mfu is None
    assert any("gpu=" in text for text in run.warnings)
    run = load_log(path, [], Given(gpus=64, gpu="h100", seq_length=4096), 1e12)
    assert (run.gpus, run.global_batch_size, run.seq_length) == (64, 128, 4096)
    assert run.identified["gpus"] == "command line"


def test_the_recipes_numbers_of_a_log() -> None:
    run = load_log(LOGS / "nemo1_24_09.out", [], KNOWN, 1e12)
    assert run.times is not None and run.numbers is not None
    last = run.numbers.at(run.times.last_s)
    assert (last.step_time_s, round(last.tokens_per_s), round(last.days_to_train, 2)) == (11.20, 93623, 123.62)
    assert last.mfu is not None and last.mfu == pytest.approx(0.3555, abs=5e-4)
    assert (run.times.warmup_steps, run.times.excluded) == (2, {"validation": 1})


@pytest.mark.parametrize(
    ("name", "max_steps", "why"),
    [
        ("nemo2", 50, None),
        ("one_based", 21, None),
        ("every_tenth", 200, None),
        ("restart", 20, None),
        ("unlabelled_ranks", 12, None),
        ("labelled_ranks", 12, None),
        ("nan", 20, "the loss is nan"),
        ("garbled", 20, "the log is unreadable after step 14"),
        ("rounded_steps", 603000, "the log ends at step 2010 of 603000"),
        ("cancelled", 50, "the log ends at step 31 of 50: slurmstepd: error"),
        ("recipe_line", 100, "not a measurement"),
    ],
)
def test_which_logs_are_complete(name: str, max_steps: int, why: str | None) -> None:
    run = load_log(LOGS / f"{name}.out", [], KNOWN, 1e12)
    assert (run.max_steps, run.final, run.numbers is None) == (max_steps, why is None, why is not None)
    assert why is None or why in str(run.why_not_final)


def test_a_straggling_rank_of_a_log() -> None:
    (slow,) = [rank for rank in load_log(LOGS / "labelled_ranks.out", [], KNOWN, 1e12).ranks if rank.straggler]
    assert slow.rank == 3 and slow.slower == pytest.approx(0.396, abs=1e-2)


# --- finding ---


def test_a_tree_gives_its_run_folders_and_the_logs_beside_them(tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "tree/tiny")
    shutil.copy(LOGS / "nemo2.out", tmp_path / "tree/other.log")
    (tmp_path / "tree/notes.md").write_text("train_step_timing")
    (tmp_path / "tree/loop").symlink_to(tmp_path / "tree")
    report = build_report([tmp_path / "tree"])
    names = [FAILED.name, CHECKPOINTS.name, PLAIN.name, "20261122-165301-2f07", TWO.name, "other.log"]
    assert sorted(run.name for run in report.runs) == sorted(names)
    twice = build_report([tmp_path / "tree", tmp_path / "tree/tiny/1", tmp_path / "tree/other.log"])
    assert len(twice.runs) == 6


def test_names_are_as_short_as_they_can_be(tmp_path: Path) -> None:
    for name, log in (("b/x.out", "nemo2"), ("c/x.out", "one_based"), ("c/y.out", "restart")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(LOGS / f"{log}.out", tmp_path / name)
    assert [run.name for run in build_report([tmp_path]).runs] == ["b/x.out", "c/x.out", "y.out"]
