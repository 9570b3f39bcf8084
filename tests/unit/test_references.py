"""Published numbers: as printed, and what follows from them row by row."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_bench import flops
from nemo_bench.errors import BenchError
from nemo_bench.report import references
from nemo_bench.report.references import ReferencePoint

RECIPE = references.load("nvidia-24.09")
CONTRADICTORY = ("bf16", 2048)
TABLE = Path(references.__file__).parent / "published/nvidia-24.09.yaml"
POINTS = [pytest.param(point, id=f"{point.precision}-{point.gpus}") for point in RECIPE.points]

# The recipe's two tables, typed anew from its text: GPUs, step time, tokens/s, days to 1T tokens.
PRINTED = {
    "bf16": [
        (64, 14.72, 71235, 162.48),
        (128, 14.73, 142373, 81.29),
        (256, 14.8, 283399, 40.84),
        (512, 14.89, 563372, 20.54),
        (1024, 14.92, 1124478, 10.29),
        (2048, 14.98, 2248957, 5.15),
    ],
    "fp8": [
        (64, 11.01, 95239, 121.53),
        (128, 10.93, 191871, 60.32),
        (256, 11.16, 375834, 30.80),
        (512, 11.18, 750323, 15.43),
        (1024, 11.28, 1487342, 7.78),
        (2048, 11.39, 2945955, 3.93),
    ],
}


def test_all_twelve_points_are_there_as_printed() -> None:
    for precision, rows in PRINTED.items():
        points = [point for point in RECIPE.points if point.precision == precision]
        assert [(p.gpus, p.step_time_s, p.tokens_per_s, p.days_to_1t_tokens) for p in points] == rows
    assert [p.mfu for p in RECIPE.points if p.precision == "bf16"] == [0.5410, 0.5406, 0.5381, 0.5348, 0.5338, 0.5338]
    assert all(p.global_batch_size == p.gpus * 2 and p.seq_length == 8192 for p in RECIPE.points)


@pytest.mark.parametrize("point", POINTS)
def test_throughput_and_days_come_out_to_the_printed_digits(point: ReferencePoint) -> None:
    rate = point.tokens_per_s_from_step_time
    days = round(flops.days_to_train(tokens=1e12, tokens_per_s=rate), 2)
    if (point.precision, point.gpus) == CONTRADICTORY:
        # What is printed belongs to the step time of 1024 GPUs.
        assert (round(rate), days) == (2239949, 5.17)
        assert round(8192 * 4096 / 14.92) == point.tokens_per_s == 2248957
        assert round(1e12 / point.tokens_per_s / 86400, 2) == point.days_to_1t_tokens == 5.15
        assert any("14.92 s" in note and "2239949" in note for note in point.notes)
    else:
        assert (round(rate), days) == (point.tokens_per_s, point.days_to_1t_tokens)
        assert point.notes == []


@pytest.mark.parametrize("point", POINTS)
def test_mfu_comes_out_as_far_as_it_is_consistent(point: ReferencePoint) -> None:
    def mfu(step_time_s: float, peak: float) -> float:
        sequences = point.global_batch_size / point.gpus
        return 100 * sequences * 3.94e15 / step_time_s / peak / 1e12  # FLOPs as the recipe rounds them

    assert point.mfu is not None
    printed = 100 * point.mfu
    if (point.precision, point.gpus) == CONTRADICTORY:
        assert round(mfu(14.98, 989), 2) == 53.19 and round(mfu(14.92, 989), 2) == 53.40 and printed == 53.38
        assert any("53.38% belongs to neither" in note for note in point.notes)
    elif point.precision == "bf16":
        assert 0.01 < mfu(point.step_time_s, 989) - printed < 0.04
        assert mfu(point.step_time_s, 989.4) == pytest.approx(printed, abs=0.011)
    else:
        assert round(mfu(point.step_time_s, 1979), 2) == pytest.approx(printed)


def test_the_recipes_worked_examples_and_what_does_not_fit_together() -> None:
    rate = flops.tokens_per_second(seq_length=8192, global_batch_size=128, step_time_s=11.31)
    assert round(rate) == 92712
    assert round(flops.days_to_train(tokens=1e12, tokens_per_s=92712), 2) == 124.84
    assert f"{flops.Architecture(**RECIPE.architecture['70b']).flops_per_sequence(8192):.2e}" == "3.94e+15"
    notes = " ".join(RECIPE.notes)
    assert "11.31 s" in notes and "8129" in notes


def test_the_later_table_is_consistent_to_the_rounding_of_its_step_times() -> None:
    for point in references.load("nvidia-24.12").points:
        slowest, fastest = (8192 * point.global_batch_size / (point.step_time_s + half) for half in (0.005, -0.005))
        assert point.tokens_per_s is not None and slowest - 1 <= point.tokens_per_s <= fastest + 1
        assert round(1e12 / point.tokens_per_s_from_step_time / 86400, 2) == point.days_to_1t_tokens


def test_every_table_says_where_it_comes_from() -> None:
    for name in references.names():
        table = references.load(name)
        assert table.name == name and table.points and "github.com" in table.source and table.container and table.date


def test_a_table_of_ones_own(tmp_path: Path) -> None:
    mine, whole = tmp_path / "ours.yaml", TABLE.read_text()
    point = (
        "  - {model: 70b, precision: fp8, gpus: 64, global_batch_size: 128, step_time_s: 9.86, gpu: gb200,\n"
        "     statistic: mean of steps 11 to 44, layout: {layers: 8, TP: 4, PP: 8}, container: x, software: '25.04'}\n"
    )
    mine.write_text(whole.replace("14.72", "13.00").rstrip() + "\n" + point)
    table = references.load(str(mine))
    first, last = table.points[0], table.points[-1]
    assert (table.name, first.step_time_s, first.gpu, first.layout["PP"]) == ("ours", 13.0, "h100", 4)
    # A point may say otherwise than its table.
    assert (last.gpu, last.statistic, last.software) == ("gb200", "mean of steps 11 to 44", "25.04")
    assert (last.architecture["num_layers"], last.layout["PP"], last.seq_length) == (8, 8, 8192)
    with pytest.raises(BenchError, match=r"no such table\n  valid: nvidia-24.09, nvidia-24.12, null"):
        references.load("nvidia")


@pytest.mark.parametrize("text", ["points: [", "[1, 2]", "title: only", "a", "gpus: many", "odd: 1\n"])
def test_a_damaged_table_is_refused(tmp_path: Path, text: str) -> None:
    whole = TABLE.read_text()
    damaged = {"gpus: many": whole.replace("gpus: 64", text), "odd: 1\n": whole + text}.get(text, text)
    (tmp_path / "ours.yaml").write_text(damaged)
    with pytest.raises(BenchError, match="not a table of published numbers"):
        references.load(str(tmp_path / "ours.yaml"))
