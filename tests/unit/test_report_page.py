"""The report's page: whole, escaped, without a network, honest about runs without a result, readable in a browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import time
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from nemo_bench.report import figures, model, page
from nemo_bench.report.model import Change, Comparison, Report, Run
from nemo_bench.report.statistics import Steps

VOID = {"meta", "br", "link", "img", "input", "hr", "wbr"}


@pytest.fixture(scope="module")
def text(report: Report) -> str:
    return page.render(report).replace(page.plotly_script(), "")


@pytest.fixture(scope="module")
def parsed(text: str) -> Page:
    return Page(text)


class Page(HTMLParser):
    """The page as a strict reader sees it: every tag opened is closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.visible = ""
        self.feed(text.replace(page.plotly_script(), ""))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"script", "style", "title"} & set(self.open):
            self.visible += data

    def values(self, key: str) -> list[str]:
        return [value for _, name, value in self.attributes if name == key]

    def figures(self) -> list[dict[str, Any]]:
        return [json.loads(value) for value in self.values("data-figure")]


def test_it_is_whole_and_nothing_is_loaded_from_elsewhere(parsed: Page, text: str) -> None:
    ids = parsed.values("id")
    assert len(set(ids)) == len(ids)
    links = [value for tag, key, value in parsed.attributes if (tag, key) == ("a", "href")]
    assert len(links) > 20 and {link.removeprefix("#") for link in links} <= set(ids)
    assert not {"link", "img", "iframe", "object", "base", "form"} & set(parsed.tags)
    assert not {"src", "srcset", "action", "data"} & {key for _, key, _ in parsed.attributes}
    style, script = (text[text.index(f"<{tag}>") :].partition(f"</{tag}>")[0] for tag in ("style", "script"))
    script += text[text.rindex("<script>") :]
    assert not re.search(r"url\(|@import|https?://|fetch|import\(", style + script)


def test_markup_in_the_data_stays_text(report: Report) -> None:
    evil = '</script><script>alert(1)</script><img src=x onerror="alert(2)">&amp;\'"'
    record = replace(
        report.runs[-1].record,
        command=evil,
        hardware={"cpu": evil, "gpus": [{"name": evil}]},
        environment={evil: evil},
        config={evil: {"a": evil}},
        packages={evil: evil},
        events=({"event": evil, "after_step": None, "time": None},),
    )
    name = f"{evil}\x00\x1b[31m\udcff"
    about: dict[str, Any] = {"warnings": (evil,), "identified": {evil: evil}, "record": record, "numbers": None}
    run = replace(report.runs[-1], name=name, path=evil, why_not_final=evil, **about)
    verdict = replace(report.points[0].verdict, value="FAIL", why=evil, differences=(evil,), remarks=(evil,))
    changes: dict[str, tuple[Change, ...]] = {evil: (Change(evil, evil, None),)}
    parts: dict[str, Any] = {
        "runs": (run, report.runs[0]),
        "points": (replace(report.points[0], name=evil, runs=(name,), verdict=verdict),),
        "comparisons": (Comparison(evil, evil, 1.0, (0.9, 1.1), "SLOWER", True, evil, changes),),
        "warnings": (evil,),
        "inputs": (evil,),
        "baseline_inputs": (evil,),
        "scaling": tuple(replace(curve, label=evil) for curve in report.scaling),
    }
    text = page.render(replace(report, **parts))
    shown = Page(text)
    assert shown.tags["script"] == 2 and shown.tags["img"] == 0  # Plotly's and the page's own
    assert shown.visible.count(evil) > 15
    assert not [key for _, key, _ in shown.attributes if key.startswith("on")]
    assert not re.search("[\x00-\x08\x0b-\x1f\ud800-\udfff]", text.replace(page.plotly_script(), ""))


def test_the_outcome_is_said_first_and_every_point_and_run_has_its_reasons_in_words(
    report: Report, parsed: Page, text: str
) -> None:
    top = html.unescape(re.sub("<[^>]*>", "", text[text.index("<header>") : text.index("</header>")]))
    count = Counter(point.verdict.value for point in report.points)
    assert f"{count['FAIL']} FAIL" in top and f"{count['NO REFERENCE']} without a published number" in top
    regressed = sum(item.regression for item in report.comparisons)
    assert regressed >= 5 and f"{regressed} of {len(report.comparisons)} points regressed" in top
    failed = next(point for point in report.points if point.verdict.value == "FAIL")
    assert f"{failed.name}: {failed.verdict.why}" in top
    assert model.NO_REFERENCE not in parsed.visible
    words: list[str | None] = []
    for point in report.points:
        verdict = point.verdict
        published = verdict.value != model.NO_REFERENCE
        words += [point.name, *([verdict.text, verdict.why, *verdict.differences] if published else verdict.remarks)]
    for run in report.runs:
        words += [run.name, run.why_not_final, *run.warnings, *run.record.packages.values()]
    for reference in report.references:
        words += [reference.title, reference.source, reference.statistic, *reference.notes]
        words += [note for point in reference.points for note in point.notes]
    words += [text for comparison in report.comparisons for text in (comparison.why, comparison.verdict)]
    assert [word for word in words if (word or "") not in parsed.visible] == []


def test_a_run_without_a_result_shows_why_and_no_number(report: Report, text: str) -> None:
    unfinished = [(number, run) for number, run in enumerate(report.runs) if not run.final]
    assert any(run.times for _, run in unfinished)
    for number, run in unfinished:
        part = text[text.index(f'<details class="run" id="runs-{number}"') :].partition("<dl>")[0]
        shown = html.unescape(re.sub(r"<[^>]*>", " ", part))
        assert f"No result:  {run.why_not_final}" in shown
        assert "median" not in shown and "tokens/s" not in shown and "MFU" not in shown


def test_plotly_accepts_every_figure(parsed: Page) -> None:
    from plotly.graph_objects import Figure

    titles = Counter(figure["layout"]["title"]["text"] for figure in parsed.figures())
    assert titles["Step time"] > 10
    assert {"70b: throughput", "70b: parallel efficiency"} <= set(titles)
    assert "Loss, as logged" in titles
    for figure in parsed.figures():
        Figure(figure)
        assert {trace["type"] for trace in figure["data"]} <= {"scatter", "bar", "waterfall"}  # SVG, so that it prints


def test_missing_and_infinite_numbers_are_a_page_too(report: Report) -> None:
    run = next(run for run in report.runs if run.final)
    steps = Steps([5, 9], [float("inf"), float("nan")], [float("nan"), None], [None, None], ["no time", "no time"])
    bare = Run(name="bare", path="bare", source="log", steps=steps)
    assert run.numbers is not None
    endless = replace(run.numbers, mfu=None, tflops_per_gpu=None, peak_tflops=None, days_to_train=float("inf"))
    point = replace(report.points[0], numbers=endless, step_time=None, gpu=None, layout={}, reference=None)
    comparison = replace(report.comparisons[0], ratio=1.0, interval=(0.2, float("inf")))
    shown = Page(page.render(replace(report, runs=(bare,), points=(point,), comparisons=(comparison,))))
    assert "None" not in shown.visible and len(shown.figures()) >= 2


def test_a_thousand_runs_are_a_page_of_eight_megabytes_that_keeps_the_extremes(report: Report) -> None:
    run = next(run for run in report.runs if run.final and run.record.config)
    times = [1.0 + 0.01 * (7 * step % 13) + (step == 3333) for step in range(5_000)]
    excluded = ["checkpoint" if step % 100 == 99 else None for step in range(5_000)]
    steps = Steps([*range(5_000)], times, [10 * 0.9999**step for step in range(5_000)], [None] * 5_000, excluded)
    runs = tuple(replace(run, name=f"run {number}", steps=steps) for number in range(1000))
    point = replace(report.points[0], runs=tuple(run.name for run in runs))
    begin = time.process_time()
    text = page.render(replace(report, runs=runs, points=(point,)))
    assert time.process_time() - begin < 10
    assert len(text.encode()) < 8_000_000
    assert "60 of 1000 runs" in text and "run 999" in text
    assert not re.search('<details[^>]*class="run"[^>]* open', text)
    counts = figures.step_times(runs[0])["data"][0]
    assert len(counts["x"]) <= figures.SHOWN_STEPS + 2 and (min(counts["y"]), max(counts["y"])) == (1.0, max(times))
    assert counts["x"][counts["y"].index(max(times))] == 3333


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_without_a_network_shows_and_prints_it(report: Report, tmp_path: Path) -> None:
    file, picture, paper = (tmp_path / name for name in ("report.html", "page.png", "page.pdf"))
    file.write_text(page.render(report), encoding="utf-8")
    number = next(i for i, run in enumerate(report.runs) if run.final)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=3000"]
    flags += ["--window-size=1400,3000", "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path}/profile"]
    outputs = {}
    for output in ("--dump-dom", f"--screenshot={picture}", f"--print-to-pdf={paper}"):
        anchor = f"#runs-{number}" if output == "--dump-dom" else ""
        command = [str(CHROMIUM), *flags, output, file.as_uri() + anchor]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr  # a script's error, a failed request
        outputs[output] = done.stdout
    shown = Page(outputs["--dump-dom"])
    drawn = sum("js-plotly-plot" in value for value in shown.values("class"))
    assert 4 <= drawn < len(shown.figures())  # those of closed parts wait
    opened = re.findall(r'<details[^>]* id="([^"]+)"[^>]* open', outputs["--dump-dom"])
    assert opened == [f"runs-{number}"]
    assert picture.stat().st_size > 100_000  # a blank one has 10 kB
    assert paper.stat().st_size > 1_000_000  # all parts are open on paper, and their figures drawn
