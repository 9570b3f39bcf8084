"""Published numbers: as printed, and what follows from them row by row."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_bench import flops
from nemo_bench.errors import BenchError
from nemo_bench.report import references
from nemo_bench.report.references import ReferencePoint

RECIPE = references.load("nvidia-24.09")
SIZES = RECIPE.architecture["70b"]
PEAK = {"bf16": 989.0, "fp8": 1979.0}
CONTRADICTORY = ("bf16", 2048)
POINTS = [pytest.param(point, id=f"{point.precision}-{point.gpus}") for point in RECIPE.points]

# The recipe's two tables, typed anew from its text: step time, tokens/s, days to 1T tokens.
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


def throughput(point: ReferencePoint) -> float:
    return flops.tokens_per_second(
        seq_length=point.seq_length, global_batch_size=point.global_batch_size, step_time_s=point.step_time_s
    )


def test_all_twelve_points_are_there_as_printed() -> None:
    for precision, rows in PRINTED.items():
        held = [
            (p.gpus, p.step_time_s, p.tokens_per_s, p.days_to_1t_tokens)
            for p in RECIPE.points
            if p.precision == precision
        ]
        assert held == rows
    assert [p.mfu for p in RECIPE.points if p.precision == "bf16"] == [0.5410, 0.5406, 0.5381, 0.5348, 0.5338, 0.5338]
    assert all(p.global_batch_size == p.gpus * 2 and p.seq_length == 8192 for p in RECIPE.points)


@pytest.mark.parametrize("point", POINTS)
def test_throughput_and_days_come_out_to_the_printed_digits(point: ReferencePoint) -> None:
    assert point.tokens_per_s_from_step_time == throughput(point)
    days = round(flops.days_to_train(tokens=1e12, tokens_per_s=throughput(point)), 2)
    if (point.precision, point.gpus) == CONTRADICTORY:
        # What is printed belongs to the step time of 1024 GPUs.
        assert (round(throughput(point)), days) == (2239949, 5.17)
        assert round(8192 * 4096 / 14.92) == point.tokens_per_s == 2248957
        assert round(1e12 / point.tokens_per_s / 86400, 2) == point.days_to_1t_tokens == 5.15
        assert any("14.92 s" in note and "2239949" in note for note in point.notes)
    else:
        assert (round(throughput(point)), days) == (point.tokens_per_s, point.days_to_1t_tokens)
        assert point.notes == []


@pytest.mark.parametrize("point", POINTS)
def test_mfu_comes_out_as_far_as_it_is_consistent(point: ReferencePoint) -> None:
    def mfu(step_time_s: float, peak: float) -> float:
        achieved = flops.tflops_per_gpu(
            global_batch_size=point.global_batch_size,
            flops_per_sequence=3.94e15,  # as the recipe rounds it
            step_time_s=step_time_s,
            num_gpus=point.gpus,
        )
        return 100 * achieved / peak

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


def test_the_recipes_worked_examples() -> None:
    rate = flops.tokens_per_second(seq_length=8192, global_batch_size=128, step_time_s=11.31)
    assert round(rate) == 92712
    assert round(flops.days_to_train(tokens=1e12, tokens_per_s=92712), 2) == 124.84
    assert f"{flops.Architecture(**SIZES).flops_per_sequence(8192):.2e}" == "3.94e+15"


def test_what_does_not_fit_together_is_recorded() -> None:
    notes = " ".join(RECIPE.notes)
    assert "11.31 s" in notes and 11.31 not in [point.step_time_s for point in RECIPE.points]
    assert "8129" in notes
    assert RECIPE.statistic == "last step" and RECIPE.software == "24.09" and "H100" in RECIPE.hardware


def test_the_later_table_is_consistent_to_the_rounding_of_its_step_times() -> None:
    for point in references.load("nvidia-24.12").points:
        slowest, fastest = (8192 * point.global_batch_size / (point.step_time_s + half) for half in (0.005, -0.005))
        assert point.tokens_per_s is not None and slowest - 1 <= point.tokens_per_s <= fastest + 1
        assert round(1e12 / throughput(point) / 86400, 2) == point.days_to_1t_tokens


def test_every_table_says_where_it_comes_from() -> None:
    for name in references.names():
        table = references.load(name)
        assert table.name == name and table.points and "github.com" in table.source and table.container and table.date


def test_a_table_of_ones_own(tmp_path: Path) -> None:
    folder = Path(references.__file__).parent / "published"
    mine = tmp_path / "ours.yaml"
    whole = (folder / "nvidia-24.09.yaml").read_text()
    mine.write_text(whole.replace("14.72", "13.00"))
    assert references.load(str(mine)).name == "ours"
    assert references.load(str(mine)).points[0].step_time_s == 13.0
    with pytest.raises(BenchError, match=r"no such table\n  valid: nvidia-24.09, nvidia-24.12, null"):
        references.load("nvidia")
    for damaged in (
        "points: [",
        "[1, 2]",
        "title: only",
        "a",
        whole.replace("gpus: 64", "gpus: many"),
        f"{whole}odd: 1\n",
    ):
        mine.write_text(damaged)
        with pytest.raises(BenchError, match="not a table of published numbers"):
            references.load(str(mine))


def test_a_point_may_say_otherwise_than_its_table(tmp_path: Path) -> None:
    mine = tmp_path / "ours.yaml"
    own = (
        "  - {model: 70b, precision: fp8, gpus: 64, global_batch_size: 128, step_time_s: 9.86, gpu: gb200,\n"
        "     statistic: mean of steps 11 to 44, layout: {layers: 8, TP: 4, PP: 8}, container: x, software: '25.04'}\n"
    )
    table = (Path(references.__file__).parent / "published/nvidia-24.09.yaml").read_text()
    mine.write_text(table.rstrip() + "\n" + own)
    *others, point = references.load(str(mine)).points
    assert (point.gpu, point.statistic, point.software) == ("gb200", "mean of steps 11 to 44", "25.04")
    assert (point.architecture["num_layers"], point.layout["PP"], point.seq_length) == (8, 8, 8192)
    assert (others[0].gpu, others[0].layout["PP"], others[0].architecture["num_layers"]) == ("h100", 4, 80)
