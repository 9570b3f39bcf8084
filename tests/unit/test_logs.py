"""Training steps out of logs: forms, hostile input, and that reading in blocks changes nothing."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_bench.report import logs, series
from nemo_bench.report.logs import Log, read_log

LOGS = Path(__file__).parents[1] / "logs"
RUNS = Path(__file__).parents[1] / "runs"
CORPUS = sorted(LOGS.glob("*.out"))


def read(name: str) -> Log:
    return read_log(LOGS / f"{name}.out")


def parse(text: str | bytes, folder: Path) -> Log:
    path = folder / "a.out"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_log(path)


# --- the corpus ---


def test_the_recipes_line() -> None:
    log = read("recipe_line")
    assert (log.step, log.time_s, log.loss) == ((99,), (11.20,), (6.37,))
    assert (log.iteration, log.iterations, log.bar, log.global_batch_size) == (100, 100, True, 128)


def test_nemo_1_with_carriage_returns() -> None:
    log = read("nemo1_24_09")
    assert log.step == tuple(range(50))
    assert log.time_s[:3] == (40.10, 13.20, 11.40) and log.time_s[-1] == 11.20
    assert log.paused == {25: "validation"}
    assert (log.max_steps, log.iteration, log.iterations, log.global_batch_size) == (50, 50, 50, 128)
    assert (log.unreadable, log.repeated, log.several) == (0, 0, 0)


def test_steps_that_the_bar_rounds_are_counted_by_the_bar() -> None:
    log = read("rounded_steps")
    assert log.step == tuple(range(1990, 2010))
    assert log.time_s[10] == 1.910
    assert log.global_batch_size is None  # consumed_samples are rounded, too


def test_nemo_2_with_a_checkpoint_and_a_profile() -> None:
    log = read("nemo2")
    assert log.step == tuple(range(50))
    assert (log.time_s[-1], log.loss[-1]) == (0.3569, 2.63)
    # the step after the checkpoint, those profiled, and the one after
    assert log.paused == {20: "checkpoint", **dict.fromkeys(range(30, 35), "profile")}
    assert (log.global_batch_size, log.iteration, log.iterations, log.bar) == (8, 49, 49, False)


def test_every_tenth_step_with_windows_line_ends_and_memory() -> None:
    log = read("every_tenth")
    assert log.step == tuple(range(9, 200, 10))
    assert log.peak_memory_gib == pytest.approx((115792977920 - 9) / 2**30)
    assert set(log.time_s) == {6.08}


def test_ranks_with_labels_are_told_apart() -> None:
    log = read("labelled_ranks")
    assert log.step == tuple(range(12)) and log.time_s[0] == 0.5  # rank 0's
    assert {rank: round(time, 4) for rank, time in log.rank_times_s.items()} == {
        0: 0.5055,
        1: 0.5056,
        2: 0.5057,
        3: 0.7058,
    }
    assert log.stragglers == (3,)
    assert log.several == 0


def test_ranks_without_labels_give_the_slowest() -> None:
    log = read("unlabelled_ranks")
    assert log.step == tuple(range(12))
    assert log.time_s == tuple(pytest.approx(0.6 + 0.001 * i) for i in range(12))
    assert log.several == 23 and log.repeated == 0 and log.restarts == ()
    assert (log.iteration, log.iterations) == (11, 11)  # not that of the rank which is behind


def test_garbled_lines_give_what_is_whole_in_them() -> None:
    log = read("garbled")
    assert log.step == (*range(7), 8, *range(10, 15))
    assert dict(zip(log.step, log.time_s))[6] == 0.51 and dict(zip(log.step, log.time_s))[8] == 0.52
    assert log.unreadable == 3  # 9 and the line without a step; 15 is cut off at the end


def test_colours_and_other_bytes() -> None:
    log = read("colours_unicode")
    assert log.step == tuple(range(10))
    assert log.time_s == tuple(pytest.approx(0.5 + 0.001 * i) for i in range(10))
    assert log.loss[-1] == 4.1


def test_a_restart_repeats_steps_and_the_later_ones_count() -> None:
    log = read("restart")
    assert log.step == tuple(range(20))
    assert (log.restarts, log.repeated) == ((10,), 3)
    assert log.time_s[10:12] == (8.0, 0.51)


def test_counting_from_1() -> None:
    log = read("one_based")
    assert (log.step[0], log.step[-1], log.from_zero, log.global_batch_size) == (1, 20, False, 8)


def test_a_loss_that_is_no_number_is_kept() -> None:
    loss = read("nan").loss
    assert loss[6] == 4.4 and all(value is not None and math.isnan(value) for value in loss[7:])


def test_a_cancelled_job_says_so() -> None:
    log = read("cancelled")
    assert (log.iteration, log.iterations, log.max_steps) == (31, 50, None)
    assert log.last_error is not None and "DUE TO TIME LIMIT" in log.last_error


def test_a_real_log_agrees_with_the_record_beside_it() -> None:
    from nemo_bench.record import folder as record

    for path in RUNS.glob("*/*/*/*/*/rank0.out"):
        rows, _ = record.read_lines(path.with_name("steps.jsonl"))
        log = read_log(path)
        assert log.step == tuple(row["step"] for row in rows)
        assert log.time_s == pytest.approx([row["train_step_timing_s"] for row in rows], rel=1e-3)
        assert log.loss == pytest.approx([row["loss"] for row in rows], rel=1e-3)
    checkpoints = read_log(next(RUNS.glob("*/*/*/1/*ecda/rank0.out")))
    assert checkpoints.paused == {10: "checkpoint", 20: "checkpoint", 30: "checkpoint"}
    assert checkpoints.max_steps == 40


# --- nothing, and too much ---


@pytest.mark.parametrize("content", [b"", b"\n", b"\r\r\n", b"\x00" * 1000, b"train_step_timing", b"a" * 300_000])
def test_a_log_without_steps_is_empty(tmp_path: Path, content: bytes) -> None:
    log = parse(content, tmp_path)
    assert log.step == () and log.size_bytes == len(content)


def test_a_value_at_the_very_end_may_lack_digits(tmp_path: Path) -> None:
    whole = line(3, time="0.5123")
    assert parse(whole[: whole.index("23 |")], tmp_path).step == ()  # "... in s: 0.51"
    assert parse(whole[: whole.index(" | consumed")], tmp_path).step == ()
    assert parse(whole[: whole.index("consumed")], tmp_path).time_s == (0.5123,)
    assert parse(whole[: whole.index(" | consumed")] + "\n", tmp_path).time_s == (0.5123,)


@pytest.mark.parametrize(
    "step", ["-1", "1.5", "nan", "99999999999999999999", "9" * 5000, "1e400", "", "0x10"], ids=lambda text: text[:9]
)
def test_a_step_number_that_cannot_be_one_is_left_out(tmp_path: Path, step: str) -> None:
    log = parse(line(0) + line(1).replace("global_step: 1 ", f"global_step: {step} ") + line(2), tmp_path)
    assert {0, 2} <= {*log.step} and len(log.step) + log.unreadable <= 3
    assert all(each in (0, 1, 2) for each in log.step)


@pytest.mark.parametrize("name", ["global_batch_size", "consumed_samples", "max_memory_allocated", "grad_norm"])
@pytest.mark.parametrize("value", ["nan", "inf", "1e400", "9" * 400, "-5"], ids=lambda text: text[:4])
def test_absurd_values_beside_a_step_do_no_harm(tmp_path: Path, name: str, value: str) -> None:
    text = "".join(line(i) for i in range(3)).replace(" | train_step", f" | {name}: {value} | train_step")
    assert parse(text, tmp_path).step == (0, 1, 2)


def test_a_long_run_keeps_its_latest_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(series, "MAX_STEPS", 100)
    log = parse("".join(line(i) for i in range(1000)), tmp_path)
    assert log.step[-1] == 999 and 100 <= len(log.step) <= 110
    assert log.dropped + len(log.step) == 1000


def test_blocks_of_a_long_run_that_are_left_out_change_nothing_in_those_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(line(i, time=f"0.{i % 9000 + 1000}") for i in range(5000))
    whole = parse(text, tmp_path)
    monkeypatch.setattr(logs, "BLOCK_BYTES", 4096)
    for module in (logs, series):
        monkeypatch.setattr(module, "MAX_STEPS", 1000)
    log = parse(text, tmp_path)
    assert 1000 <= len(log.step) <= 1100 and log.dropped + len(log.step) == 5000
    assert steps_of(log) == steps_of(whole)[-len(log.step) :]
    assert (log.iteration, log.global_batch_size, log.unreadable) == (whole.iteration, 8, 0)
    # A restart that goes back beyond what is kept: what was left out is not there any more.
    again = parse(text + "".join(line(i, time="0.25") for i in range(2000, 2600)), tmp_path)
    assert again.step == tuple(range(2000, 2600)) and set(again.time_s) == {0.25} and again.restarts == (2000,)


def test_a_bar_is_drawn_twice_a_step(tmp_path: Path) -> None:
    """Lightning draws it with the step's number before it is given the step's values."""
    log = parse(drawn_twice(range(60)), tmp_path)
    assert log.step == tuple(range(60)) and log.time_s == tuple(round(0.5 + step / 1000, 3) for step in range(60))
    assert (log.iteration, log.several, log.repeated, log.unreadable) == (60, 0, 0, 0)
    # From 1000 on, tqdm prints round numbers with three digits: 1e+3
    log = parse(drawn_twice(range(995, 1010)), tmp_path)
    assert log.step == tuple(range(995, 1010)) and log.time_s == tuple(
        round(0.5 + step / 1000, 3) for step in range(995, 1010)
    )
    assert (log.several, log.repeated) == (0, 0)
    # Also where the first of many steps are left out, and the first that is kept is one that is drawn again.
    for block_bytes in range(1000, 1200):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(logs, "BLOCK_BYTES", block_bytes)
            for module in (logs, series):
                patch.setattr(module, "MAX_STEPS", 20)
            log = parse(drawn_twice(range(90)), tmp_path)
        assert log.dropped + len(log.step) == 90 and log.step == tuple(range(log.dropped, 90))
    # NeMo 2's bar is drawn ahead only, and once more at the end.
    ahead = "".join(bar(step, shown=step + 2) for step in range(19)) + bar(19)
    assert parse(ahead, tmp_path).step == tuple(range(20))


def test_one_odd_line_does_not_cost_the_others_their_steps(tmp_path: Path) -> None:
    lines = [line(i) for i in range(2000)]
    lines.insert(700, "[NeMo I 2025-01-01 00:00:20 pl:232] Global Checkpoint Save : Rank: 0 : Iteration: 699\n")
    lines[1500] = lines[1500].replace("train_step_timing in s: 0.5", "train_step_timing in s: 0.5x")
    log = parse("".join(lines), tmp_path)
    assert log.step == tuple(i for i in range(2000) if i != 1499)
    assert log.paused == {700: "checkpoint"} and log.unreadable == 1


def test_another_form_within_a_log(tmp_path: Path) -> None:
    first = "".join(line(i) for i in range(300))
    second = "".join(line(i).replace(" | train_step", " | grad_norm: 1.5 | train_step") for i in range(300, 600))
    log = parse(first + second + "".join(f"0: {line(i)}" for i in range(600, 900)), tmp_path)
    # The labelled lines are another rank's, as far as anyone can tell.
    assert log.step == tuple(range(600))
    assert log.grad_norm[299:301] == (None, 1.5)


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
    return list(zip(log.step, log.time_s, log.loss))


@settings(max_examples=200, deadline=None)
@given(written(), st.integers(1, 4000))
def test_every_step_is_found_however_the_blocks_fall(
    sample: tuple[str, list[tuple[int, float, float]]], block_bytes: int
) -> None:
    text, truth = sample
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(logs, "BLOCK_BYTES", block_bytes)
        log = parse(text, Path(folder))
        assert steps_of(log) == truth
        assert log.unreadable == 0


@st.composite
def long_runs(draw: st.DrawFn) -> str:
    """A run of one kind of line, perhaps drawn twice, with restarts, gaps and garbled lines."""
    form = draw(st.sampled_from([line, bar]))
    twice = form is bar and draw(st.booleans())
    text, first, before = "", draw(st.integers(1, 50)), ""
    for _ in range(draw(st.integers(0, 6))):
        for step in range(first, first + draw(st.integers(1, 90))):
            time = draw(TIME)
            text += bar(step - 1, before, shown=step + 1) if twice and before else ""
            text += form(step, time)
            before = time
        jump = draw(st.sampled_from(["restart", "gap", "noise", "garbled"]))
        if jump == "restart":
            first, before = max(0, step - draw(st.integers(0, 40))), ""
        else:
            first = step + (1 if jump == "noise" else draw(st.integers(2, 9)))
        text += {"noise": "\n[NeMo I] Validation\n", "garbled": f"\n{form(first - 1)[:-20]}\n"}.get(jump, "")
    return text + "\n"


@settings(max_examples=80, deadline=None)
@given(long_runs(), st.integers(200, 5000), st.integers(5, 60), st.integers(0, 20))
def test_however_the_blocks_fall_the_last_steps_are_the_same(
    text: str, block_bytes: int, most: int, waiting: int
) -> None:
    found = []
    for size, steps, blocks in ((50, 10**6, 400), (block_bytes, 10**6, 400), (block_bytes, most, waiting)):
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            patch.setattr(logs, "BLOCK_BYTES", size)
            patch.setattr(logs, "MAX_STEPS", steps)
            patch.setattr(logs, "MAX_WAITING_BLOCKS", blocks)
            patch.setattr(series, "MAX_STEPS", steps)
            found.append(parse(text, Path(folder)))
    line_by_line, whole, bounded = found
    assert repr(whole) == repr(line_by_line)
    kept = steps_of(bounded)
    assert kept == steps_of(whole)[-len(kept) :] if kept else not whole.step
    first = bounded.step[0] if kept else 0
    # Steps after a restart may have pushed out those before it.
    assert len(kept) >= min(len(whole.step), most) or whole.repeated
    assert {at: why for at, why in bounded.paused.items() if at > first} == {
        at: why for at, why in whole.paused.items() if at > first
    }


@settings(max_examples=200, deadline=None)
@given(written(), st.data())
def test_a_log_cut_anywhere_gives_true_steps_and_nothing_else(
    sample: tuple[str, list[tuple[int, float, float]]], data: st.DataObject
) -> None:
    text, truth = sample
    cut = data.draw(st.integers(0, len(text.encode())))
    with tempfile.TemporaryDirectory() as folder:
        found = steps_of(parse(text.encode()[:cut], Path(folder)))
    assert found == truth[: len(found)]


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=2000), st.integers(0, 30))
def test_any_bytes_between_the_steps_do_no_harm(noise: bytes, at: int) -> None:
    steps = [line(i).encode() for i in range(31)]
    with tempfile.TemporaryDirectory() as folder:
        log = parse(b"".join(steps[:at]) + b"\n" + noise + b"\n" + b"".join(steps[at:]), Path(folder))
    assert log.step == tuple(range(31))
    assert set(log.time_s) == {0.5}


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
@pytest.mark.parametrize("block_bytes", [1, 7, 100, 1000])
def test_the_corpus_reads_the_same_in_small_blocks(
    path: Path, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read_log(path)
    monkeypatch.setattr(logs, "BLOCK_BYTES", block_bytes)
    # NaN is not equal to itself
    assert repr(read_log(path)) == repr(whole)


NEMO_1_LIST = (
    "[NeMo I 2024-10-20 10:00:00 perf_metrics:0] train_step_timing in s: [40.12, 13.24, 11.41, 11.18]\n"
    "[NeMo I 2024-10-20 10:00:00 perf_metrics:0] TFLOPs per sec per GPU=696.12\n"
)


def nemo_1_log(tmp_path: Path, shown: list[str], listed: str) -> Log:
    bars = [
        f"Epoch 0: : {25 * done}%|█| {done}/4 [00:10<00:07, reduced_train_loss=6.000, global_step={done - 1}.000, "
        f"consumed_samples={128 * done}.0, train_step_timing in s={time}]"
        for done, time in enumerate(shown, start=1)
    ]
    (tmp_path / "job.out").write_text("\r".join(bars) + "`Trainer.fit` stopped: `max_steps=4` reached.\n" + listed)
    return read_log(tmp_path / "job.out")


def test_nemo_1_shows_three_digits_and_lists_two_decimals_at_the_end(tmp_path: Path) -> None:
    log = nemo_1_log(tmp_path, ["40.10", "13.20", "11.40", "11.20"], NEMO_1_LIST)
    assert log.time_s == (40.12, 13.24, 11.41, 11.18)
    assert (log.unreadable, log.max_steps, log.step) == (0, 4, (0, 1, 2, 3))


def test_times_below_ten_seconds_stay_as_shown(tmp_path: Path) -> None:
    log = nemo_1_log(
        tmp_path,
        ["1.230", "0.774", "0.893", "0.800"],
        NEMO_1_LIST.replace("40.12, 13.24, 11.41, 11.18", "1.23, 0.77, 0.89, 0.8"),
    )
    assert log.time_s == (1.23, 0.774, 0.893, 0.8)


@pytest.mark.parametrize("times", ["40.12, 13.24, 11.41", "40.12, 13.24, 11.41, 12.9", "a, b, c, d"])
def test_a_list_of_other_steps_is_no_help(times: str, tmp_path: Path) -> None:
    listed = NEMO_1_LIST.replace("40.12, 13.24, 11.41, 11.18", times)
    log = nemo_1_log(tmp_path, ["40.10", "13.20", "11.40", "11.20"], listed)
    assert log.time_s == (40.1, 13.2, 11.4, 11.2)
    assert log.unreadable == 0
