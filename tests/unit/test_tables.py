"""Terminal, Markdown and CSV: the same story, at any width."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from html import unescape

import pytest
from rich.console import Console

from nemo_bench.report import model, page, tables, terminal
from nemo_bench.report.model import DeviceUse, Report
from nemo_bench.report.tables import percent, significant


def on_terminal(report: Report, width: int) -> list[str]:
    """The lines that a terminal of that width shows."""
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None, highlight=False)
    terminal.print_report(console, report)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return [line.rstrip() for line in re.sub(r"\x1b\[[\d;]*m", "", text).splitlines()]


def test_all_outputs_tell_the_same_story(report: Report) -> None:
    passed = next(point for point in report.points if point.verdict.value == "PASS")
    verdict = replace(passed.verdict, differences=("data: <mock>", "layout: TP4, published with TP2"))
    assert verdict.text == "PASS, 2 differences"
    points = tuple(replace(point, verdict=verdict) if point is passed else point for point in report.points)
    report = replace(report, points=points)
    shown = " ".join(" ".join(on_terminal(report, 200)).split())
    markdown, page_text = tables.markdown(report), page.render(report)
    rows = {row["point"]: row for row in csv.DictReader(io.StringIO(tables.csv_text(report))) if row["verdict"]}
    in_json = {point["name"]: point for point in json.loads(model.to_json(report))["points"]}
    for point in report.points:
        verdict, row, as_json = point.verdict, rows[point.name], in_json[point.name]["verdict"]
        assert row["verdict"] == verdict.text and verdict.value == as_json["value"]
        assert row["differences"] == "; ".join(verdict.differences) == "; ".join(as_json["differences"])
        if verdict.value == model.NO_REFERENCE:
            continue
        for output in (shown, markdown.replace("\\", "").replace("&lt;", "<"), unescape(page_text)):
            for text in (verdict.line, percent(verdict.ratio, 1)):
                assert text in output
    for output in (shown, markdown.partition("Overall")[2].partition("\n")[2]):
        assert model.NO_REFERENCE not in output


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
def test_no_value_is_broken_on_a_narrow_terminal(report: Report, width: int) -> None:
    lines = on_terminal(report, width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    for table in (tables.points_table(report), tables.runs_table(report.runs)):
        for row in table.rows:
            assert row[0] in " ".join(text.split())  # a long name may wrap, between its words
            assert all(cell in text for cell in row[1 : width // 30])
    assert width != 80 or "more columns in a wider terminal" in text


def test_one_run_shows_its_numbers_and_what_they_assume(report: Report) -> None:
    run = next(run for run in report.runs if run.final and run.numbers)
    devices = tuple(DeviceUse(rank, 20, sm_clock_mhz=1600.0 + rank) for rank in range(2))
    run = replace(run, devices=devices)
    shown = "\n".join(on_terminal(replace(report, runs=(run,), points=(), comparisons=()), 200))
    assert run.times and run.numbers
    numbers = significant(run.times.mean_s), percent(run.numbers.mfu), "mean of 2 GPUs"
    for text in (*numbers, "causal convention", f"evidence: {run.path}"):
        assert text in shown
    unfinished = next(run for run in report.runs if not run.final and run.times)
    shown = "\n".join(on_terminal(replace(report, runs=(unfinished,), points=(), comparisons=()), 200))
    assert "step time so far (s)" in shown and "no result" in shown and "tokens/s" not in shown


def test_markdown_tables_are_whole(report: Report) -> None:
    name = "a|b\\c\n<script>*"
    points = (replace(report.points[0], name=name), *report.points[1:])
    lines = tables.markdown(replace(report, points=points)).splitlines()
    assert any("a\\|b\\\\c &lt;script>\\*" in line for line in lines)
    for block in re.findall(r"(?:^\|.*\n)+", "\n".join(lines) + "\n", re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_csv_has_a_line_a_run_and_no_result_of_a_run_without_one(report: Report) -> None:
    rows = list(csv.DictReader(io.StringIO(tables.csv_text(report))))
    assert [row["run"] for row in rows] == [run.name for run in report.runs]
    for row, run in zip(rows, report.runs):
        assert (row["state"], row["final"], row["gpus"]) == (run.state, str(run.final), str(run.gpus))
        results = ("step_time_mean_s", "tokens_per_s", "mfu", "days_to_train", "first_loss")
        if run.final and run.numbers and run.times:
            assert float(row["tokens_per_s"]) == run.numbers.tokens_per_s
            assert float(row["step_time_p95_s"]) == run.times.p95_s
        else:
            assert not any(row[name] for name in results)
