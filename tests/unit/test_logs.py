"""Training steps out of logs: forms, and hostile input."""

from __future__ import annotations

import gzip
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_bench.report.logs import Log, read_log

LOGS = Path(__file__).parents[1] / "logs"
RUNS = Path(__file__).parents[1] / "runs"
CORPUS = sorted(LOGS.glob("*.out"))


def parse(text: str | bytes, folder: Path) -> Log:
    path = folder / "a.out"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_log(path)


# --- the corpus ---


def paused(log: Log) -> dict[int, str]:
    return {step: why for step, why in zip(log.steps.step, log.steps.excluded) if why is not None}


# What each log of the corpus holds: steps, and what else is read from it.
EXPECTED: dict[str, tuple[list[int], dict[str, Any]]] = {
    "recipe_line": ([99], {"done": 100, "total": 100, "global_batch_size": 128}),
    "nemo1_24_09": (
        [*range(50)],
        {"max_steps": 50, "reached": True, "done": 50, "total": 50, "global_batch_size": 128, "unreadable": 0},
    ),
    # consumed_samples are rounded, too
    "rounded_steps": ([*range(1990, 2010)], {"global_batch_size": None, "done": 2010, "total": 603000}),
    "nemo2": ([*range(50)], {"global_batch_size": 8, "done": 50, "total": 50}),
    "every_tenth": ([*range(9, 200, 10)], {"done": 200, "total": 200}),
    "labelled_ranks": ([*range(12)], {"several": 0}),
    # not the progress of the rank which is behind
    "unlabelled_ranks": ([*range(12)], {"several": 23, "repeated": 0, "done": 12, "total": 12}),
    # 9 and the line without a step are garbled; 15 is cut off at the end
    "garbled": ([*range(7), 8, *range(10, 15)], {"unreadable": 3, "unreadable_end": True}),
    "colours_unicode": ([*range(10)], {"unreadable": 0}),
    "restart": ([*range(20)], {"repeated": 3}),
    "one_based": ([*range(1, 21)], {"global_batch_size": 8}),
    "nan": ([*range(20)], {}),
    "cancelled": ([*range(31)], {"done": 31, "total": 50, "max_steps": None}),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_corpus(name: str) -> None:
    steps, values = EXPECTED[name]
    log = read_log(LOGS / f"{name}.out")
    assert log.steps.step == steps
    assert {key: getattr(log, key) for key in values} == values


def test_the_corpus_has_its_values() -> None:
    logs = {path.stem: read_log(path) for path in CORPUS}
    times = {name: log.steps.time_s for name, log in logs.items()}
    assert (times["recipe_line"], logs["recipe_line"].steps.loss) == ([11.20], [6.37])
    assert times["nemo1_24_09"][:3] == [40.10, 13.20, 11.40] and times["nemo1_24_09"][-1] == 11.20
    assert paused(logs["nemo1_24_09"]) == {25: "validation"}
    assert (times["nemo2"][-1], logs["nemo2"].steps.loss[-1]) == (0.3569, 2.63)
    # the step after the checkpoint, those profiled, and the one after
    assert paused(logs["nemo2"]) == {20: "checkpoint", **dict.fromkeys(range(30, 35), "profile")}
    assert times["rounded_steps"][10] == 1.910
    assert logs["every_tenth"].peak_memory_gib == pytest.approx((115792977920 - 9) / 2**30)
    assert times["labelled_ranks"][0] == 0.7003  # the slowest rank's
    assert logs["labelled_ranks"].rank_times_s == pytest.approx({0: 0.5055, 1: 0.5056, 2: 0.5057, 3: 0.7058})
    assert times["unlabelled_ranks"] == [pytest.approx(0.6 + 0.001 * i) for i in range(12)]
    garbled = dict(zip(logs["garbled"].steps.step, times["garbled"]))
    assert (garbled[6], garbled[8]) == (0.51, 0.52)
    assert (logs["restart"].steps.restarts, times["restart"][10:12]) == ([10], [8.0, 0.51])
    losses = logs["nan"].steps.loss
    assert losses[6] == 4.4 and all(value is not None and math.isnan(value) for value in losses[7:])
    assert "DUE TO TIME LIMIT" in (logs["cancelled"].last_error or "")


def test_a_real_log_agrees_with_the_record_beside_it() -> None:
    from nemo_bench.record import folder as record

    for path in RUNS.glob("*/*/*/*/*/rank0.out"):
        rows, _ = record.read_lines(path.with_name("steps.jsonl"))
        steps = read_log(path).steps
        assert steps.step == [row["step"] for row in rows]
        assert steps.time_s == pytest.approx([row["train_step_timing_s"] for row in rows], rel=1e-3)
        assert steps.loss == pytest.approx([row["loss"] for row in rows], rel=1e-3)
    checkpoints = read_log(next(RUNS.glob("*/*/*/1/*ecda/rank0.out")))
    assert paused(checkpoints) == {10: "checkpoint", 20: "checkpoint", 30: "checkpoint"}
    assert checkpoints.max_steps == 40


# --- other formats, and what launchers put around a line ---

MEGATRON = (
    " [2026-11-28 09:22:22] iteration        {n}/      20 | consumed samples:           {samples} | "
    "elapsed time per iteration (ms): {ms} | learning rate: 1.000000E-03 | global batch size:    32 | "
    "lm loss: 6.340332E+00 | loss scale: 1.0 | grad norm: 3.094 | number of skipped iterations:   0 | "
    "number of nan iterations:   0 |\n"
)
BRIDGE = "Step Time : {s:.2f}s GPU utilization: 712.5MODEL_TFLOP/s/GPU\n"


@pytest.mark.parametrize("bridge", [False, True])
def test_megatron_lm_and_megatron_bridge(tmp_path: Path, bridge: bool) -> None:
    second = BRIDGE.format(s=0.7) if bridge else ""
    text = "".join(second + MEGATRON.format(n=n, samples=32 * n, ms=700.5 + n) for n in range(1, 21))
    log = parse(text, tmp_path)
    assert log.steps.step == [*range(1, 21)] and log.steps.time_s[0] == pytest.approx(0.7015)
    assert (log.steps.loss[0], log.steps.grad_norm[0]) == (6.340332, 3.094)
    assert (log.done, log.total, log.global_batch_size) == (20, 20, 32)
    assert log.rates == ({"tflops_per_gpu": 712.5} if bridge else {})


@pytest.mark.parametrize(
    ("text", "times", "reached"),
    [
        (BRIDGE.format(s=0.70) + BRIDGE.format(s=0.71), [0.70, 0.71], False),  # Bridge's rank 0
        ("train_step_timing in s: [9.80, 4.10, 3.00, 3.01]\n", [9.80, 4.10, 3.00, 3.01], True),  # NeMo 1's list
    ],
)
def test_logs_of_times_alone(tmp_path: Path, text: str, times: list[float], reached: bool) -> None:
    log = parse(text, tmp_path)
    assert log.steps.step == [*range(len(times))] and log.reached == reached
    assert log.steps.time_s == times


def bar_of_unknown_length(step: int, form: str) -> str:
    number = f"{float(step):.2e}" if step >= 1000 else f"{step}.0"
    values = f"reduced_train_loss=6.0, global_step={number}, train_step_timing in s=0.5"
    return f"\rEpoch 0: : {form.format(step + 1)} [00:10<?, {values}]"


@pytest.mark.parametrize("form", ["|   | {}/?", "{}it"])
def test_a_bar_of_unknown_length_counts_its_steps(tmp_path: Path, form: str) -> None:
    log = parse("".join(bar_of_unknown_length(step, form) for step in range(1500)) + "\n", tmp_path)
    assert log.steps.step == [*range(1500)] and (log.done, log.total) == (1500, None)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('{"textPayload":"', '","severity":"INFO"}'),
        ('{"log":"', '\\n","stream":"stdout"}'),
        ("llama/0 [default0]:", ""),
        ("[default0]:", ""),
        ("0: ", ""),
        ("\x1b[32m", "\x1b[0m"),
    ],
)
def test_what_stands_around_a_line_does_no_harm(tmp_path: Path, before: str, after: str) -> None:
    log = parse("".join(f"{before}{line(i, last=19).rstrip()}{after}\n" for i in range(20)), tmp_path)
    assert log.steps.step == [*range(20)] and (log.done, log.total, log.unreadable) == (20, 20, 0)


def test_nemo_runs_labels_are_ranks(tmp_path: Path) -> None:
    slow = {(0, 0): "0.9", (1, 0): "0.7"}
    text = "".join(
        f"llama/{node} [default{rank}]:{line(i, time=slow.get((node, rank), '0.5'))}"
        for i in range(10)
        for node in range(2)
        for rank in range(2)
    )
    assert parse(text, tmp_path).rank_times_s == {0: 0.9, 1: 0.5, 2: 0.7, 3: 0.5}
    # The lowest rank with all steps stands for the run; its own times stay its own.
    log = parse(text.partition("\n")[2], tmp_path)
    assert log.rank_times_s == {0: 0.9, 1: 0.5, 2: 0.7, 3: 0.5} and log.steps.time_s[5] == 0.9


def test_a_compressed_log(tmp_path: Path) -> None:
    whole = gzip.compress("".join(line(i) for i in range(20)).encode())
    assert parse(whole, tmp_path).steps.step == [*range(20)]
    cut = parse(whole[:-20], tmp_path)
    assert cut.unreadable_end and cut.steps.step == [*range(len(cut.steps))]


def test_a_second_epoch_goes_on_counting(tmp_path: Path) -> None:
    text = "".join(line(i, last=49) for i in range(50))
    text += "".join(line(i, last=49).replace(f"iteration {i}/", f"iteration {i - 50}/") for i in range(50, 70))
    log = parse(text.replace("epoch 0", "epoch 1"), tmp_path)
    assert (log.steps.step[-1], log.done, log.total) == (69, 70, None)


def test_steps_of_another_batch_are_left_out(tmp_path: Path) -> None:
    sizes = [32] * 8 + [128] * 20
    text = "".join(
        f"\rEpoch 0: : 1%|| {i + 1}/28 [00:01<00:09, global_step={i}.0, consumed_samples={sum(sizes[: i + 1])}.0, "
        "train_step_timing in s=2.5]"
        for i in range(28)
    )
    log = parse(text + "\n", tmp_path)
    assert log.global_batch_size == 128
    assert paused(log) == dict.fromkeys(range(8), "other batch size")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("Hugging Face Trainer", "{'loss': 2.31, 'grad_norm': 1.2, 'epoch': 0.1}\n"),
        ("torchtitan", "[titan] step: 10  loss:  5.1  memory: 40GiB  tps: 3,000  mfu: 40%\n"),
    ],
)
def test_another_frameworks_log_is_named(tmp_path: Path, name: str, text: str) -> None:
    assert parse(text, tmp_path).framework == name


# --- nothing, and too much ---


@pytest.mark.parametrize("content", [b"", b"\r\r\n", b"\x00" * 1000, b"train_step_timing", b"a" * 300_000])
def test_a_log_without_steps_is_empty(tmp_path: Path, content: bytes) -> None:
    assert parse(content, tmp_path).steps.step == []


@pytest.mark.parametrize(
    ("end", "more", "times"),
    [("23 |", "", []), (" | consumed", "", []), ("consumed", "", [0.5123]), (" | consumed", "\n", [0.5123])],
)
def test_a_value_at_the_very_end_may_lack_digits(tmp_path: Path, end: str, more: str, times: list[float]) -> None:
    whole = line(3, time="0.5123")
    assert parse(whole[: whole.index(end)] + more, tmp_path).steps.time_s == times


@pytest.mark.parametrize(
    "step", ["-1", "1.5", "nan", "9999999999", "9" * 5000, "1e400", "", "0x10"], ids=lambda text: text[:9]
)
def test_a_step_number_that_cannot_be_one_is_left_out(tmp_path: Path, step: str) -> None:
    log = parse(line(0) + line(1).replace("global_step: 1 ", f"global_step: {step} ") + line(2), tmp_path)
    assert {0, 2} <= {*log.steps.step} and len(log.steps.step) + log.unreadable <= 3
    assert all(each in (0, 1, 2) for each in log.steps.step)


@pytest.mark.parametrize("name", ["global_batch_size", "consumed_samples", "max_memory_allocated", "grad_norm"])
@pytest.mark.parametrize("value", ["nan", "inf", "1e400", "9" * 400, "-5"], ids=lambda text: text[:4])
def test_absurd_values_beside_a_step_do_no_harm(tmp_path: Path, name: str, value: str) -> None:
    text = "".join(line(i) for i in range(3)).replace(" | train_step", f" | {name}: {value} | train_step")
    assert parse(text, tmp_path).steps.step == [0, 1, 2]


@pytest.mark.parametrize("steps", [range(60), range(995, 1010)])  # from 1000 on, tqdm prints 1e+3
def test_a_bar_is_drawn_twice_a_step(tmp_path: Path, steps: range) -> None:
    """Lightning draws it with the step's number before it is given the step's values."""
    log = parse(drawn_twice(steps), tmp_path)
    assert log.steps.step == [*steps] and log.steps.time_s == [round(0.5 + step / 1000, 3) for step in steps]
    assert (log.done, log.several, log.repeated, log.unreadable) == (steps[-1] + 1, 0, 0, 0)


# --- properties ---


def line(step: int, time: str = "0.5", loss: str = "2.5", last: int = 999) -> str:
    return (
        f"Training epoch 0, iteration {step}/{last} | lr: 0.0003 | global_batch_size: 8 | global_step: {step} | "
        f"reduced_train_loss: {loss} | train_step_timing in s: {time} | consumed_samples: {8 * (step + 1)}\n"
    )


def bar(step: int, time: str = "0.5", loss: str = "2.5", last: int = 999, shown: int | None = None) -> str:
    number = f"{step:.0e}".replace("+0", "+") if step % 1000 == 0 < step else float(step)
    return (
        f"\rEpoch 0: :  10%|█         | {shown or step + 1}/{last + 1} [00:01<00:09, reduced_train_loss={loss}, "
        f"global_step={number}, consumed_samples={8.0 * (step + 1)}, train_step_timing in s={time}]"
    )


def drawn_twice(steps: range) -> str:
    times = {step: f"{0.5 + step / 1000:.3f}" for step in steps}
    ahead = {step: bar(step - 1, times[step - 1], shown=step + 1) for step in steps[1:]}
    return "".join(ahead.get(step, "") + bar(step, times[step]) for step in steps) + "\n"


TIME = st.floats(min_value=1e-3, max_value=1e4).map(lambda value: f"{value:.4}")
NOISE = st.sampled_from(
    [
        "",
        "node01:4711:4711 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM",
        "\x1b[31mWARNING\x1b[0m train_step_timing is logged",
        "global_step: 3 | reduced_train_loss: 1.0",
        "進捗 ▓▓▓ \x00\x85\u2028",
    ]
)


@st.composite
def written(draw: st.DrawFn) -> tuple[str, list[tuple[int, float, float]]]:
    """A log of one kind with noise between the steps, and the steps in it."""
    form = draw(st.sampled_from([line, bar]))
    first = draw(st.integers(0, 900))
    values = draw(st.lists(st.tuples(TIME, TIME), max_size=80))
    text, truth = "", []
    for step, (time, loss) in enumerate(values, first):
        noise = draw(NOISE)
        text += (f"\n{noise}\n" if noise else "") + form(step, time, loss)
        truth.append((step, float(time), float(loss)))
    return text + "\n", truth


def steps_of(log: Log) -> list[tuple[int, float, float | None]]:
    return list(zip(log.steps.step, log.steps.time_s, log.steps.loss))


@settings(max_examples=200, deadline=None)
@given(written(), st.data())
def test_a_log_cut_anywhere_gives_true_steps_and_nothing_else(
    sample: tuple[str, list[tuple[int, float, float]]], data: st.DataObject
) -> None:
    text, truth = sample
    cut = data.draw(st.integers(0, len(text.encode())))
    with tempfile.TemporaryDirectory() as folder:
        whole, part = (steps_of(parse(content, Path(folder))) for content in (text, text.encode()[:cut]))
    assert whole == truth and part == truth[: len(part)]


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=2000), st.integers(0, 30))
def test_any_bytes_between_the_steps_do_no_harm(noise: bytes, at: int) -> None:
    steps = [line(i).encode() for i in range(31)]
    with tempfile.TemporaryDirectory() as folder:
        log = parse(b"".join(steps[:at]) + b"\n" + noise + b"\n" + b"".join(steps[at:]), Path(folder))
    assert log.steps.step == [*range(31)]
    assert set(log.steps.time_s) == {0.5}
