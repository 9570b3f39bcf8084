"""The report's page: whole, escaped, honest about runs without a result, and readable in a real browser."""

from __future__ import annotations

import base64
import fcntl
import hashlib
import html
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import xml.etree.ElementTree as ET
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_bench.report import page, page_parts, page_runs, plots
from nemo_bench.report.bare_logs import Given
from nemo_bench.report.build import build_report
from nemo_bench.report.methods import METHODS
from nemo_bench.report.model import Change, Comparison, RankTimes, Record, Report, Run
from nemo_bench.report.statistics import Steps

REAL_RUNS = Path(__file__).parents[1] / "runs"
GPU_LOSSES = Path(__file__).parents[2] / "benchmarks/results/gpu_losses"
VOID = {"meta", "br", "link", "img", "input", "hr", "wbr"}
PUBLISHED_S = {"bf16": [14.72, 14.73, 14.8, 14.89], "fp8": [11.01, 10.93, 11.16, 11.18]}


def write_log(path: Path, step_time_s: float, batch: int, *, steps: int = 50, nan_from: int = 50) -> None:
    """A log in the recipe's form with a slow start, a validation and a little noise."""
    rng, text = random.Random(str(path.relative_to(path.parents[3]))), "srun: job 4711 queued\n"
    for step in range(steps):
        time = step_time_s * (1 + rng.gauss(0, 0.003)) * (4 if step == 0 else 1)
        loss = "nan" if step >= nan_from else f"{12.1 * 0.985**step:.3f}"
        text += (
            f"\rEpoch 0: : {2 * step + 2:3d}%|##| {step + 1}/50 [00:01<00:09, reduced_train_loss={loss}, "
            f"global_step={step}.0, consumed_samples={batch * (step + 1)}.0, train_step_timing in s={time:.3f}]"
        )
        if step == 24:
            text += "\nValidation: 0it [00:00, ?it/s]\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + ("\nslurmstepd: error: CANCELLED <by> 'root' & co\n" if steps < 50 else "\n"))


def write_logs(root: Path, factor: float) -> Path:
    """bf16 and fp8 from 64 to 512 GPUs; one point that fails, one cut off, one whose loss breaks, one repeated."""
    for precision, times in PUBLISHED_S.items():
        for number, time in enumerate(times):
            gpus = 64 * 2**number
            slow = 1.1 if (precision, gpus) == ("bf16", 256) else 0.9 if (precision, gpus) == ("fp8", 128) else 1.0
            for repeat in range(2 if gpus == 64 else 1):
                path = root / f"24.09/{precision}/70b/{gpus}/log_{repeat}.out"
                steps = 31 if (precision, gpus) == ("fp8", 512) else 50
                nan_from = 20 if (precision, gpus) == ("bf16", 512) else 50
                write_log(path, time * slow * factor, 2 * gpus, steps=steps, nan_from=nan_from)
    return root


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Real runs on CPU and on an H200, and logs with all kinds of outcomes, beside a baseline that was quicker."""
    root = tmp_path_factory.mktemp("logs")
    now, before = write_logs(root / "now", 1.0), write_logs(root / "before", 0.9)
    return build_report([REAL_RUNS, now], baseline=[before], given=Given(gpu="h100"))


@pytest.fixture(scope="module")
def text(report: Report) -> str:
    return page.render(report)


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
        self.words: list[str] = []
        self.feed(text)
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
        if not {"script", "style", "title", "desc"} & set(self.open):
            self.words.append(data)

    @property
    def visible(self) -> str:
        return "".join(self.words)

    def values(self, key: str) -> list[str]:
        return [value for _, name, value in self.attributes if name == key]


def svgs(text: str) -> list[ET.Element]:
    """The plots, by an XML parser."""
    return [ET.fromstring(found) for found in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


def part_of(text: str, anchor: str, tag: str) -> str:
    """What the element with this id shows, without its markup."""
    found = re.search(rf'<{tag}[^>]* id="{anchor}".*?</{tag}>', text, re.DOTALL)
    assert found is not None
    return html.unescape(re.sub(r"<[^>]*>", " ", found[0]))


def run_part(text: str, report: Report, run: Run) -> str:
    start = re.search(rf'<details[^>]*id="runs-{report.runs.index(run)}"', text)
    assert start is not None
    end = re.search(r'<details[^>]*class="run"|<section', text[start.end() :])
    assert end is not None
    return text[start.start() : start.end() + end.start()]


def long_run(run: Run, number: int) -> Run:
    """The run with as many steps, some checkpoints among them, and one extreme each way."""
    times = [1.0 + 0.01 * ((7 * i) % 13) for i in range(number)]
    times[number // 3], times[number // 2] = 90.0, 0.25
    excluded = ["checkpoint" if i % 100 == 99 else "warm-up" if i < 10 else None for i in range(number)]
    losses = [10 * 0.9999**i for i in range(number)]
    steps = Steps(list(range(number)), times, list(losses), [None] * number, excluded)
    return replace(run, steps=steps)


# --- the document ---


def test_every_tag_is_closed_and_every_link_has_its_target(parsed: Page) -> None:
    ids = parsed.values("id")
    assert len(set(ids)) == len(ids)
    links = [value for tag, key, value in parsed.attributes if (tag, key) == ("a", "href")]
    assert len(links) > 20
    assert {link.removeprefix("#") for link in links} <= set(ids)


def test_every_plot_is_well_formed_and_says_what_it_shows(report: Report, text: str) -> None:
    plotted = svgs(text)
    # scaling of the 70b and of the tiny: 2 each; MFU, comparison; and of each run with steps, its times and losses
    runs = [run for run in (*report.runs, *report.baseline_runs) if len(run.steps)]
    assert len(plotted) == 2 * 2 + 1 + 1 + 2 * len(runs)
    for plot in plotted:
        assert plot.get("role") == "img"
        assert plot.findtext("title") and plot.findtext("desc")
        for path in plot.iter("path"):
            assert not re.search("nan|inf", path.get("d", ""))


def test_nothing_is_loaded_and_only_the_pages_own_script_runs(parsed: Page, text: str) -> None:
    assert not {"link", "img", "iframe", "object", "base", "form"} & set(parsed.tags)
    assert not {"src", "srcset", "action", "data", "xlink:href"} & {key for _, key, _ in parsed.attributes}
    assert not [key for _, key, _ in parsed.attributes if key.startswith("on")]
    assert not re.search(r"url\(|@import|https?://", text)
    policy = next(value for tag, key, value in parsed.attributes if key == "content" and "default-src" in value)
    script = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(script) == 1
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()}'" in policy


def test_markup_in_the_data_stays_text(report: Report) -> None:
    evil = '</script><script>alert(1)</script><img src=x onerror="alert(2)">&amp;\'"'
    run = report.runs[-1]
    hurt = replace(
        run,
        name=f"{evil}\x00\x1b[31m\udcff",
        path=evil,
        why_not_final=evil,
        numbers=None,
        warnings=(evil,),
        identified={evil: evil},
        record=Record(
            command=evil,
            hardware={"cpu": evil, "gpus": [{"name": evil}]},
            environment={evil: evil},
            config={evil: {"a": evil}},
            packages={evil: evil},
            events=({"event": evil, "after_step": None, "time": None},),
        ),
    )
    point = replace(
        report.points[0],
        name=evil,
        runs=(hurt.name,),
        verdict=replace(report.points[0].verdict, why=evil, remarks=(evil + "2",)),
    )
    change = (Change(evil, evil, None),)
    comparison = Comparison(evil, evil, 1.0, (0.9, 1.1), "SLOWER", True, evil, change, change, change, change)
    made = page.render(
        replace(
            report,
            runs=(hurt, report.runs[0]),
            points=(point,),
            comparisons=(comparison,),
            warnings=(evil,),
            inputs=(evil,),
            baseline_inputs=(evil,),
            scaling=tuple(replace(curve, label=evil) for curve in report.scaling),
        )
    )
    shown = Page(made)
    assert shown.tags["script"] == 1 and shown.tags["img"] == 0
    assert "alert(1)" in shown.visible and shown.visible.count(evil) > 20
    assert not [key for _, key, _ in shown.attributes if key.startswith("on")]
    assert not re.search("[\x00-\x08\x0b-\x1f\ud800-\udfff]", made)
    assert len(svgs(made)) > 3
    made.encode("utf-8")


# --- what it says ---


def test_every_point_has_its_verdict_and_its_reasons_in_words(report: Report, parsed: Page) -> None:
    assert {point.verdict.value for point in report.points} >= {
        *("PASS", "FAIL", "INCOMPLETE", "FASTER", "INVALID", "NO REFERENCE")
    }
    for point in report.points:
        for words in (point.name, point.verdict.value, point.verdict.why, *point.verdict.remarks):
            assert words in parsed.visible
    for run in (*report.runs, *report.baseline_runs):
        for words in (run.name, run.why_not_final or "", *run.warnings):
            assert words in parsed.visible


def test_the_numbers_of_a_point_stand_in_its_row(report: Report, text: str) -> None:
    number, point = next((i, each) for i, each in enumerate(report.points) if each.verdict.value == "FAIL")
    n, reference = point.numbers, point.reference
    assert n is not None and reference is not None and point.verdict.ratio is not None
    shown = part_of(text, f"point-{number}", "tr").split()
    for expected in (
        f"{n.step_time_s:.2f}",
        f"{point.last_s:.2f}",
        f"{n.tokens_per_s:,.0f}",
        f"{n.tokens_per_s_per_gpu:,.0f}",
        f"{n.tflops_per_gpu:.1f}",
        f"{n.mfu:.2%}",
        f"{n.mfu_causal:.2%}",
        f"{n.days_to_train:.2f}",
        f"{reference.step_time_s:.2f}",
        f"{point.verdict.ratio:.1%}",
        "256",
        "h100",
        "\u2013/512",
        "1/1",
    ):
        assert expected in shown


def test_the_outcome_is_told_in_words_at_the_top(report: Report, text: str) -> None:
    top = html.unescape(re.sub("<[^>]*>", "", text[text.index("<header>") : text.index("</header>")]))
    regressed = sum(each.regression for each in report.comparisons)
    assert regressed >= 5
    assert f"{regressed} of {len(report.comparisons)} regressed" in top
    assert "70b in bf16 and fp8 on 64 to 512 h100" in top
    assert report.generated_at[:10] in top


def test_what_the_numbers_rest_on_is_there(report: Report, parsed: Page) -> None:
    for method in METHODS:
        assert method.name in parsed.visible and method.how in parsed.visible
    for reference in report.references:
        for words in (reference.title, reference.source, reference.statistic, *reference.notes):
            assert words in parsed.visible
        for point in reference.points:
            assert all(note in parsed.visible for note in point.notes)
    for comparison in report.comparisons:
        assert comparison.why in parsed.visible and comparison.verdict in parsed.visible
    recorded = [run for run in report.runs if run.record.packages]
    for key, value in recorded[0].record.packages.items():
        assert key in parsed.visible and value in parsed.visible


def test_a_run_without_a_result_shows_why_and_no_number(report: Report, text: str) -> None:
    unfinished = [run for run in report.runs if not run.final]
    assert {run.state for run in unfinished} >= {"failed"} and any(run.times for run in unfinished)
    for run in unfinished:
        part = run_part(text, report, run)
        shown = html.unescape(re.sub("<[^>]*>", " ", part))
        assert f"No result:  {run.why_not_final}" in shown
        assert "median" not in shown and "tokens/s" not in shown and "MFU" not in shown
        if run.times is not None:
            for value in (run.times.median_s, run.times.mean_s):
                assert page_parts.four(value) not in re.sub("<title>.*?</title>", "", part)
    for number, point in enumerate(report.points):
        if point.numbers is None:
            row = part_of(text, f"point-{number}", "tr")
            assert "no result" in row and "%" not in row
            # the published time, GPUs, batch and runs, and nothing else
            assert len(re.findall(r"\d+\.\d+", row)) == (point.reference is not None)


def test_differences_between_runs_are_listed_with_the_runs(report: Report, text: str) -> None:
    part = part_of(text, "differences", "section")
    row = part[part.index("trainer.devices") :].split("trainer.max_steps")[0].split()
    two = next(run.name for run in report.runs if run.gpus == 2)
    assert row[row.index("2") + 1] == two


def test_what_is_another_one_in_each_job_is_no_difference(report: Report, text: str) -> None:
    ports = {run.record.environment["MASTER_PORT"] for run in report.runs if "MASTER_PORT" in run.record.environment}
    assert len(ports) > 3 and "MASTER_PORT" not in part_of(text, "differences", "section")


def test_stragglers_come_first(report: Report) -> None:
    ranks = tuple(
        RankTimes(rank, "step time (s)", 1.0 + (rank == 700), 1.0, float(rank == 700), rank == 700)
        for rank in range(1024)
    )
    run = replace(report.runs[-1], ranks=ranks, peak_memory_gib=71.25)
    made = page.render(replace(report, runs=(run,), points=()))
    part = run_part(made, replace(report, runs=(run,)), run)
    shown = html.unescape(re.sub("<[^>]*>", " ", part))
    assert "1 straggler; the slowest 24 of 1,024" in shown and "71.2 GiB" in shown
    ranked = re.findall(r'<th scope="row" class="number">(\d+)', part[part.index("<caption>Ranks beside") :])
    assert ranked[0] == "700" and len(ranked) == 24


# --- plots ---


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=300), st.integers(4, 40))
def test_thinning_keeps_the_extremes_and_the_ends(values: list[float], limit: int) -> None:
    kept = plots.thin(values, limit)
    assert kept == sorted(set(kept)) and len(kept) <= max(limit, 4)
    assert {kept[0], kept[-1]} == {0, len(values) - 1}
    assert min(values) in [values[i] for i in kept] and max(values) in [values[i] for i in kept]


@given(st.floats(1e-6, 1e9), st.floats(1.0001, 1e6))
def test_ticks_are_round_and_inside(low: float, factor: float) -> None:
    for found in (plots.ticks(low, low * factor), plots.log_ticks(low, low * factor)):
        assert found == sorted(found)
        assert all(low * 0.999999 <= tick <= low * factor * 1.000001 for tick in found)
        assert len(found) <= 25


def test_a_long_run_is_thinned_out_with_its_extremes(report: Report) -> None:
    run = long_run(report.runs[-1], 200_000)
    drawn = plots.step_times(run.name, run.steps, 1.06)
    assert drawn is not None
    assert len(ET.tostring(drawn.svg)) < 60_000
    notes = " ".join(drawn.notes)
    assert "up to 90.00 s" in notes and "down to 0.2500 s" in notes and "Of 200,000 steps" in notes
    line = next(path.get("d", "") for path in drawn.svg.iter("path") if path.get("class") == "line s0")
    assert line.count("L") > 500  # still one line, although every hundredth step is left out


def test_steps_left_out_are_marked_with_their_reason(report: Report, text: str) -> None:
    run = next(run for run in report.runs if "checkpoint" in run.steps.excluded)
    part = run_part(text, report, run)
    times = svgs(part)[0]
    assert any(rect.get("class") == "shade" for rect in times.iter("rect"))
    words = [title.text or "" for title in times.iter("title")]
    for step, reason in zip(run.steps.step, run.steps.excluded):
        if reason is not None:
            assert any(word.startswith(f"step {step}: ") and f"({reason}, left out)" in word for word in words)
    assert f"{Counter(run.steps.excluded)['checkpoint']} left out: checkpoint" in part


def test_an_outlier_leaves_the_rest_its_axis(report: Report) -> None:
    run = next(run for run in report.runs if run.final and run.source == "log")
    slow = max(time for time in run.steps.time_s if time is not None)
    assert slow > 3 * run.times.median_s  # type: ignore[union-attr]  # the first step
    drawn = plots.step_times(run.name, run.steps, None)
    assert drawn is not None and f"up to {slow:#.4g} s" in " ".join(drawn.notes)
    line = next(path.get("d", "") for path in drawn.svg.iter("path") if path.get("class") == "line s0")
    heights = [float(pair.split()[1]) for pair in re.findall(r"[\d.]+ [\d.]+", line)]
    assert max(heights) - min(heights) > 40  # of 214 pixels


def test_the_losses_of_number_formats_lie_in_one_plot(report: Report, tmp_path: Path) -> None:
    assert page_runs.losses(report.runs) is None  # of logs nobody knows the data
    bf16, fp8 = build_report([GPU_LOSSES]).runs

    def told(*runs: Run) -> str:
        made = page_runs.losses(runs)
        return "" if made is None else " ".join(made.itertext())

    assert "small on local data: loss by number format" in told(bf16, fp8)
    assert "fp8 is at most 0.027 away from bf16 in means of 5 steps, over 60 steps." in told(fp8, bf16)
    assert told(bf16) == told(bf16, bf16) == ""
    # Of a number format the finished run is drawn, wherever it stands.
    short = replace(bf16, name="short", why_not_final="short", steps=steps_up_to(bf16, 6))
    assert "over 60 steps" in told(short, bf16, fp8) and "short" not in told(short, bf16, fp8)
    # One that diverges is what the plot is for; another seed is another training.
    broken = replace(fp8, steps=replace(fp8.steps, loss=[*fp8.steps.loss[:20], *[math.nan] * 40]))
    assert "fp8 (no number from step 20 on) is at most" in told(bf16, broken)
    config = fp8.record.config
    assert config is not None
    other = {**config, "trainer": {**config["trainer"], "seed": 5}}
    assert told(bf16, replace(fp8, record=Record(config=other))) == ""
    # The moments' formats are number formats too.
    narrow = {**config["model"], "optim": {**config["model"]["optim"], "exp_avg_dtype": "bf16"}}
    assert "over 60 steps" in told(bf16, replace(fp8, record=Record(config={**config, "model": narrow})))


def steps_up_to(run: Run, number: int) -> Steps:
    return Steps(**{field.name: getattr(run.steps, field.name)[:number] for field in fields(Steps)})


def test_losses_that_are_no_number_are_marked_and_counted(report: Report, text: str) -> None:
    run = next(run for run in report.runs if run.why_not_final and "nan" in run.why_not_final)
    part = run_part(text, report, run)
    assert "30 of 50 losses are no finite number, first at step 20" in part
    assert sum(path.get("class") == "bad" for path in svgs(part)[1].iter("path")) == 30


def test_curves_of_one_number_format_share_a_colour_and_labels_do_not_overlap(text: str) -> None:
    efficiency = svgs(text)[1]
    labels = {each.text: each for each in efficiency.iter("text") if (each.get("class") or "").startswith("name")}
    assert set(labels) == {"bf16 measured", "fp8 measured", "bf16 published", "fp8 published"}
    for kind in ("bf16", "fp8"):
        assert labels[f"{kind} measured"].get("class") == labels[f"{kind} published"].get("class")
    heights = sorted(float(each.get("y", "")) for each in labels.values())
    assert all(below - above >= 14.9 for above, below in zip(heights, heights[1:]))  # noqa: RUF007


# --- extremes ---


def test_an_empty_report_is_a_page(report: Report) -> None:
    nothing = replace(
        report, runs=(), points=(), scaling=(), references=(), comparisons=(), baseline_runs=(),
        baseline_points=(), baseline_inputs=(), inputs=(), verdict="NO REFERENCE", exit_code=0, warnings=("not read",),
    )  # fmt: skip
    shown = Page(page.render(nothing)).visible
    assert "Nothing was judged" in shown and "not read" in shown and "No run was read" in shown


def test_missing_and_endless_numbers_are_a_page_too(report: Report) -> None:
    run = next(run for run in report.runs if run.final)
    names = "model precision gpus nodes gpu gpu_reported global_batch_size seq_length architecture version "
    names += "entrypoint container data max_steps times numbers first_loss last_loss "
    missing: dict[str, Any] = dict.fromkeys((names + "peak_memory_gib").split())
    steps = Steps([5, 9], [float("inf"), float("nan")], [float("nan"), None], [None, None], ["no time", "no time"])
    bare = replace(run, **missing, layout={}, steps=steps, record=Record())
    numbers = run.numbers
    assert numbers is not None
    endless = replace(numbers, mfu=None, tflops_per_gpu=None, peak_tflops=None, days_to_train=float("inf"))
    point = replace(
        report.points[0],
        numbers=endless,
        step_time=None,
        gpu=None,
        global_batch_size=None,
        layout={},
        reference=None,
    )
    comparison = replace(report.comparisons[0], ratio=1.0, interval=(0.2, float("inf")))
    made = page.render(replace(report, runs=(bare,), points=(point,), comparisons=(comparison,)))
    shown = Page(made).visible
    assert "None" not in shown.replace("None of", "")
    assert all(not re.search("nan|inf", path.get("d", "")) for plot in svgs(made) for path in plot.iter("path"))


def test_sixty_long_runs_fit_into_a_few_megabytes(report: Report) -> None:
    run = long_run(next(run for run in report.runs if run.final and run.record.config), 5_000)
    runs = tuple(
        replace(
            run, name=f"run {i}", record=replace(run.record, environment={**run.record.environment, "PORT": str(i)})
        )
        for i in range(60)
    )
    many = replace(report, runs=runs, points=tuple(replace(point, runs=("run 0",)) for point in report.points))
    made = page.render(many)
    assert len(made.encode()) < 5_000_000
    assert "another one in each run" in made
    assert Page(made).tags["details"] > 60 and not re.search('<details[^>]* class="run"[^>]* open', made)


def test_text_and_series_can_be_read_in_light_and_dark() -> None:
    style = Path(page.__file__).with_name("page.css").read_text()
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in style.split("@media")[:2])
    assert len(dark) == len(light) > 20

    def contrast(one: str, other: str) -> float:
        def luminance(colour: str) -> float:
            parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
            linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
            return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

        high, low = sorted((luminance(one), luminance(other)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    for colours in (light, dark):
        for name in ("text", "muted", "link", "s0", "s1", "s2", "s3", "s4", "s5"):
            for back in ("page", "panel", "stripe"):
                assert contrast(colours[name], colours[back]) >= 4.5, (name, back)
        for name in ("good", "bad", "info", "warn", "none"):
            assert contrast(colours[name], colours[f"{name}-back"]) >= 4.5, name
        assert contrast(colours["text"], colours["bad-back"]) >= 4.5


# --- in a browser ---

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# Chromium speaks its protocol over the descriptors 3 and 4, which subprocess cannot name.
ON_PIPES = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)


class Browser:
    """A headless Chromium with one page, spoken to over a pipe: no port, no further package."""

    def __init__(self, profile: Path) -> None:
        (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
        high = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (theirs_in, theirs_out)]
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        command = [sys.executable, "-c", ON_PIPES, *map(str, high), str(CHROMIUM), *flags]
        self.process = subprocess.Popen(command, pass_fds=high, stderr=subprocess.DEVNULL)
        for end in (theirs_in, theirs_out, *high):
            os.close(end)
        self.out, self.into = os.fdopen(ours_out, "wb", 0), os.fdopen(ours_in, "rb")
        self.limit = threading.Timer(60, self.process.kill)
        self.limit.start()
        self.number, self.events, self.session = 0, list[dict[str, Any]](), ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        self.out.write(json.dumps(message | ({"sessionId": self.session} if self.session else {})).encode() + b"\0")
        while (answer := self.read()).get("id") != self.number:
            self.events.append(answer)
        result: dict[str, Any] = answer["result"]
        return result

    def read(self) -> dict[str, Any]:
        text = bytearray()
        while (byte := self.into.read(1)) != b"\0":
            assert byte, "the browser ended"
            text += byte
        message: dict[str, Any] = json.loads(text)
        return message

    def show(self, address: str, *, width: int, scheme: str) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=1200, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self.call("Page.navigate", url="about:blank")
        self.wait("Page.loadEventFired")
        self.events.clear()
        self.call("Page.navigate", url=address)
        self.wait("Page.loadEventFired")

    def wait(self, method: str) -> None:
        while not any(event.get("method") == method for event in self.events):
            self.events.append(self.read())

    def value(self, expression: str) -> Any:
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def close(self) -> None:
        self.limit.cancel()
        self.process.kill()
        self.process.wait()
        self.out.close()
        self.into.close()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    made = Browser(tmp_path / "profile")
    yield made
    made.close()


def scanlines(png: bytes) -> set[bytes]:
    """The distinct lines of a picture: few of a blank one."""
    at, data, width = 8, b"", 0
    while at < len(png):
        length, kind = int.from_bytes(png[at : at + 4], "big"), png[at + 4 : at + 8]
        if kind == b"IHDR":
            width = int.from_bytes(png[at + 8 : at + 12], "big") * {2: 3, 6: 4}[png[at + 17]] + 1
        elif kind == b"IDAT":
            data += png[at + 8 : at + 8 + length]
        at += length + 12
    lines = zlib.decompress(data)
    return {lines[i : i + width] for i in range(0, len(lines), width)}


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize(("width", "scheme", "back"), [(1400, "light", 255), (800, "dark", 20)])
def test_a_browser_shows_it(
    browser: Browser, report: Report, tmp_path: Path, width: int, scheme: str, back: int
) -> None:
    file = tmp_path / "report.html"
    file.write_text(page.render(report), encoding="utf-8")
    number = next(i for i, run in enumerate(report.runs) if run.final)
    browser.show(f"{file.as_uri()}#runs-{number}", width=width, scheme=scheme)
    assert browser.value("document.documentElement.scrollWidth") <= width  # tables scroll by themselves
    assert browser.value("[...document.querySelectorAll('details[open]')].map(part => part.id)") == [f"runs-{number}"]
    assert browser.value("getComputedStyle(document.body).backgroundColor").startswith(f"rgb({back},")
    picture = base64.b64decode(browser.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])
    assert len(scanlines(picture)) > 200
    closed = "window.closed_parts = -1; addEventListener('beforeprint', () => {"
    closed += "window.closed_parts = document.querySelectorAll('details:not([open])').length; })"
    browser.value(closed)
    assert base64.b64decode(browser.call("Page.printToPDF")["data"]).startswith(b"%PDF")
    assert browser.value("window.closed_parts") == 0
    told = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
    assert [event for event in browser.events if event.get("method") in told] == []
    asked = [e["params"]["request"]["url"] for e in browser.events if e.get("method") == "Network.requestWillBeSent"]
    assert [address.split("#")[0] for address in asked] == [file.as_uri()]
