"""Published numbers: as printed, and what follows from them row by row."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_bench import flops
from nemo_bench.errors import BenchError
from nemo_bench.report import references
from nemo_bench.report.references import ReferencePoint

RECIPE = references.load("nvidia-24.09")
TABLE = Path(references.__file__).parent / "published/nvidia-24.09.yaml"
TABLES = {name: references.load(name) for name in references.names()}
POINTS = [
    pytest.param(point, id=f"{name}-{point.model}-{point.precision}-{point.gpus}-{point.gpu}")
    for name, table in TABLES.items()
    for point in table.points
]
# The one row whose numbers are not all of one step time.
CONTRADICTORY = ("nvidia-24.09", "70b", "bf16", 2048)
# Peaks that the printed MFU belongs to, in TFLOP/s.
PEAKS = {("h100", "bf16"): 989.4, ("h100", "fp8"): 1979, ("gb200", "bf16"): 2450, ("gb200", "fp8"): 4900}

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


def key_of(point: ReferencePoint) -> tuple[str, str, str, int]:
    return point.reference, point.model, point.precision, point.gpus


def test_the_recipes_twelve_points_are_there_as_printed() -> None:
    of_70b = [point for point in RECIPE.points if point.model == "70b"]
    for precision, rows in PRINTED.items():
        points = [point for point in of_70b if point.precision == precision]
        assert [(p.gpus, p.step_time_s, p.tokens_per_s, p.days_to_1t_tokens) for p in points] == rows
    assert [p.mfu for p in of_70b if p.precision == "bf16"] == [0.5410, 0.5406, 0.5381, 0.5348, 0.5338, 0.5338]
    assert all(p.global_batch_size == p.gpus * 2 and p.seq_length == 8192 for p in of_70b)
    assert "11.31 s" in " ".join(RECIPE.notes) and "8129" in " ".join(RECIPE.notes)
    for table in TABLES.values():
        assert table.points and "github.com" in table.source and table.container and table.date


@pytest.mark.parametrize("point", POINTS)
def test_throughput_days_and_mfu_follow_from_the_step_time(point: ReferencePoint) -> None:
    """To the digits that are printed: step times have two or three, and some rates come from ones with more."""
    half_digit = 0.0005 if point.reference == "nvidia-25.05" and point.gpu == "gb200" else 0.005
    slowest, fastest = (
        8192 * point.global_batch_size / (point.step_time_s + half) for half in (half_digit, -half_digit)
    )
    assert point.tokens_per_s is not None and point.mfu is not None
    consistent = slowest - 1 <= point.tokens_per_s <= fastest + 1
    if point.days_to_1t_tokens is not None:  # a shortened model has none
        days = flops.days_to_train(tokens=1e12, tokens_per_s=point.tokens_per_s_from_step_time)
        consistent &= days == pytest.approx(point.days_to_1t_tokens, abs=0.00501)
    counted = TABLES[point.reference].mfu_architecture.get(point.model, {})
    sizes = flops.Architecture(**{**point.architecture, **counted})
    rate = flops.tflops_per_gpu(
        global_batch_size=point.global_batch_size,
        flops_per_sequence=sizes.flops_per_sequence(8192),
        step_time_s=point.step_time_s,
        num_gpus=point.gpus,
    )
    consistent &= rate / PEAKS[point.gpu, point.precision] == pytest.approx(point.mfu, rel=0.002)
    assert consistent == (key_of(point) != CONTRADICTORY)
    assert consistent or any("14.92 s" in note and "2239949" in note for note in point.notes)
    assert point.flops_convention == "recipe" and point.statistic and point.layout


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
    with pytest.raises(BenchError, match=r"no such table\n  valid: auto, nvidia-24.09, .*, nvidia-25.05, null"):
        references.load("nvidia")


@pytest.mark.parametrize("text", ["points: [", "[1, 2]", "title: only", "a", "gpus: many", "odd: 1\n"])
def test_a_damaged_table_is_refused(tmp_path: Path, text: str) -> None:
    whole = TABLE.read_text()
    damaged = {"gpus: many": whole.replace("gpus: 64", text), "odd: 1\n": whole + text}.get(text, text)
    (tmp_path / "ours.yaml").write_text(damaged)
    with pytest.raises(BenchError, match="not a table of published numbers"):
        references.load(str(tmp_path / "ours.yaml"))
