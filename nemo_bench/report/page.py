"""The report as one HTML page that needs nothing else: no network, no other file, no script to be understood."""

from __future__ import annotations

import base64
import hashlib
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from nemo_bench.report import model, page_environment, page_points, page_runs, plots
from nemo_bench.report.markup import Child, document, el
from nemo_bench.report.methods import METHODS
from nemo_bench.report.model import Report
from nemo_bench.report.numbers import tokens_text
from nemo_bench.report.page_parts import (
    NONE,
    REGRESSION,
    Column,
    badge,
    bullets,
    decimals,
    facts,
    figure,
    four,
    moment,
    percent,
    plural,
    row,
    section,
    table,
    whole,
)
from nemo_bench.report.references import Reference

_STYLE = Path(__file__).with_name("page.css")

# Opens what an address names and what is printed; without it nothing is lost, closed parts open at a click.
_SCRIPT = """
(() => {
  const parts = [...document.querySelectorAll("details")];
  const reveal = () => {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    for (let at = target; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
    if (target) target.scrollIntoView();
  };
  let closed = [];
  addEventListener("hashchange", reveal);
  addEventListener("beforeprint", () => {
    closed = parts.filter(part => !part.open);
    for (const part of closed) part.open = true;
  });
  addEventListener("afterprint", () => { for (const part of closed) part.open = false; });
  for (const button of document.querySelectorAll("button[data-open]")) {
    button.hidden = false;
    button.onclick = () => {
      for (const part of button.closest("section").querySelectorAll("details.run"))
        part.open = button.dataset.open === "yes";
    };
  }
  if (location.hash) reveal();
})();
"""


def render(report: Report) -> str:
    """The whole page, as the text of an HTML file in UTF-8."""
    sections = [
        page_points.summary(report),
        page_points.scaling(report),
        page_points.mfu(report),
        _comparison(report),
        page_runs.losses(report.runs),
        page_runs.section_of("runs", "Runs", report.runs, report.points),
        page_runs.section_of("baseline-runs", "Runs of the baseline", report.baseline_runs, report.baseline_points),
        page_environment.differences(report),
        page_environment.environment(report),
        _methods(report),
        _references(report),
    ]
    shown = [each for each in sections if each is not None]
    body = el("body", _header(report), _contents(shown), el("main", shown), _footer(report), el("script", _SCRIPT))
    return document(el("html", _head(report), body, lang="en"))


def _head(report: Report) -> ET.Element:
    # Nothing is loaded and no other script runs, whatever the data held.
    script = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{script}'"
    return el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", f"{report.verdict}: Llama 3.1 benchmark, {report.generated_at[:10]}"),
        el("style", _STYLE.read_text(encoding="utf-8")),
    )


# --- the head of the page -----------------------------------------------------------------------------------


def _header(report: Report) -> ET.Element:
    judged = " ".join(f"Published numbers: {each.title}." for each in report.references)
    return el(
        "header",
        el("h1", "Llama 3.1 pre-training benchmark"),
        el("p", f"{_what(report)}. {judged} ", moment(report.generated_at), ".", class_="lead"),
        el("div", badge(report.verdict), " ", el("strong", _outcome(report)), class_="outcome"),
        _to_look_at(report),
        _warnings(report),
    )


def _what(report: Report) -> str:
    """`70b in bf16 and fp8 on 64 to 2,048 h100; tiny in fp32 on 1 to 2 cpu`."""
    told = []
    for name, gpu in dict.fromkeys((point.model, point.gpu) for point in report.points):
        mine = [point for point in report.points if (point.model, point.gpu) == (name, gpu)]
        formats = " and ".join(dict.fromkeys(point.precision for point in mine))
        counts = sorted({point.gpus for point in mine})
        sizes = f"{counts[0]:,} to {counts[-1]:,}" if len(counts) > 1 else f"{counts[0]:,}"
        device = {"cpu": "CPU process" if counts == [1] else "CPU processes", None: "GPUs"}.get(gpu, gpu)
        told.append(f"{name} in {formats} on {sizes} {device}")
    return "; ".join(told) or ("No run is of a known configuration" if report.runs else "No run was read")


def _outcome(report: Report) -> str:
    """The verdict of the whole, in words."""
    count = Counter(point.verdict.value for point in report.points)
    tolerance = f"{report.assumptions.tolerance:.1%}"
    judged = len(report.points) - count[model.NO_REFERENCE]
    parts = []
    if not report.points:
        parts.append("Nothing was judged: there is no point.")
    elif not judged:
        parts.append("Nothing was judged: no point has a published number.")
    elif judged == count[model.PASS]:
        parts.append(f"{plural(judged, 'point')} judged: within {tolerance} of the published throughput.")
    else:
        told = (
            (model.FAIL, f"slower than published by more than {tolerance}"),
            (model.INCOMPLETE, "without a finished run"),
            (model.NOT_COMPARABLE, "not comparable"),
            (model.FASTER, f"faster than published by more than {tolerance}"),
            (model.PASS, f"within {tolerance}"),
        )
        kinds = ", ".join(f"{count[value]} {words}" for value, words in told if count[value])
        parts.append(f"{plural(judged, 'point')} judged: {kinds}.")
    if judged and count[model.NO_REFERENCE]:
        verb = "has" if count[model.NO_REFERENCE] == 1 else "have"
        parts.append(f"{count[model.NO_REFERENCE]} more {verb} no published number.")
    if report.comparisons:
        regressed = sum(each.regression for each in report.comparisons)
        told_of = f"{regressed} of {len(report.comparisons)} regressed" if regressed else "no regression"
        parts.append(f"Against the baseline: {told_of}.")
    return " ".join(parts)


def _to_look_at(report: Report) -> Child:
    """The points that decide the outcome, first."""
    numbers = {point.name: number for number, point in enumerate(report.points)}
    order = (model.FAIL, model.INCOMPLETE, model.NOT_COMPARABLE, model.FASTER)
    items = [
        el("li", badge(value), " ", el("a", point.name, href=f"#point-{numbers[point.name]}"), f": {point.verdict.why}")
        for value in order
        for point in report.points
        if point.verdict.value == value
    ]
    items += [
        el("li", badge(REGRESSION), " ", el("a", each.point, href="#baseline"), f": {each.why}")
        for each in report.comparisons
        if each.regression
    ]
    return el("ul", items, class_="plain") if items else None


def _warnings(report: Report) -> Child:
    if not report.warnings:
        return None
    return el("div", el("p", "What could not be read, and what was left out:"), bullets(report.warnings), class_="note")


def _contents(sections: Sequence[ET.Element]) -> ET.Element:
    links = [el("a", each.findtext("h2"), href=f"#{each.get('id')}") for each in sections]
    return el("nav", el("ul", [el("li", link) for link in links]), aria_label="Contents")


def _footer(report: Report) -> ET.Element:
    said = f"Made by {report.generator} from {', '.join(report.inputs) or 'no input'}"
    if report.baseline_inputs:
        said += f"; baseline: {', '.join(report.baseline_inputs)}"
    return el("footer", el("p", f"{said}. The same numbers, in full precision: results.json."))


# --- against a baseline -------------------------------------------------------------------------------------


def _comparison(report: Report) -> ET.Element | None:
    if not report.comparisons:
        return None
    columns = (
        Column("point"),
        Column("conclusion"),
        Column("of baseline", "tokens/s", number=True),
        Column("95% interval", "of the ratio", number=True),
        Column("baseline's point"),
        Column("why, and how the noise is known"),
    )
    rows = []
    for each in report.comparisons:
        text = badge(REGRESSION, f"{each.verdict}, {REGRESSION}") if each.regression else badge(each.verdict)
        interval = NONE if each.interval is None else " to ".join(percent(end, 1) for end in each.interval)
        rows.append(row(columns, [each.point, text, percent(each.ratio, 1), interval, each.baseline, each.why]))
    spreads = [
        plots.Spread(
            each.point,
            each.ratio,
            each.interval[0] if each.interval else None,
            each.interval[1] if each.interval else None,
            each.verdict,
        )
        for each in report.comparisons
        if each.ratio is not None
    ]
    tolerance = report.assumptions.tolerance
    drawn = plots.ratios("Throughput over the baseline's", spreads, tolerance) if spreads else None
    band = f"Line: 95% interval. Shaded: the tolerance of {tolerance:.1%}."
    defined = "A regression is slower than the noise explains, and by more than the tolerance."
    return section(
        "baseline",
        "Against the baseline",
        el("p", f"Baseline: {', '.join(report.baseline_inputs)}.") if report.baseline_inputs else None,
        figure(drawn, "Throughput over the baseline's", band, defined) if drawn is not None else None,
        table("Points beside the baseline", columns, [el("tbody", rows)], "wordy"),
        page_environment.changes(report.comparisons),
    )


# --- what it rests on ---------------------------------------------------------------------------------------


def _methods(report: Report) -> ET.Element:
    columns = (Column("number"), Column("unit"), Column("how it is computed"))
    rows = [row(columns, [each.name, each.unit or NONE, each.how]) for each in METHODS]
    chosen = report.assumptions
    said = (
        f"Chosen for this report: a tolerance of {chosen.tolerance:.1%}, a budget of "
        f"{tokens_text(chosen.total_tokens)} tokens, intervals of {chosen.confidence:.0%}."
    )
    made = table("Formulas and conventions", columns, [el("tbody", rows)], "wordy")
    return section("methods", "How each number is computed", el("p", said), made)


def _references(report: Report) -> ET.Element | None:
    if not report.references:
        return None
    return section("references", "Published numbers", [_reference(each) for each in report.references])


def _reference(reference: Reference) -> list[Child]:
    columns = (
        Column("point"),
        Column("GPU"),
        Column("GBS", number=True),
        Column("sequence", "tokens", number=True),
        Column("step time", "s, printed", number=True),
        Column("tokens/s", "printed", number=True),
        Column("tokens/s", "from the step time", number=True),
        Column("MFU", "printed", number=True),
        Column("days to 1T", "printed", number=True),
    )
    notes = [*reference.notes]
    names = [f"{each.model} {each.precision} {each.gpus}gpu" for each in reference.points]
    notes += [f"{name}: {note}" for name, each in zip(names, reference.points) for note in each.notes]
    rows = [
        row(
            columns,
            [
                name,
                each.gpu,
                whole(each.global_batch_size),
                whole(each.seq_length),
                four(each.step_time_s),
                whole(each.tokens_per_s),
                whole(each.tokens_per_s_from_step_time),
                percent(each.mfu),
                decimals(each.days_to_1t_tokens),
            ],
        )
        for name, each in zip(names, reference.points)
    ]
    return [
        el("h3", reference.title),
        facts(
            [
                ("name", reference.name),
                ("version", reference.software),
                ("date", reference.date),
                ("hardware", reference.hardware),
                ("container", reference.container),
                ("layout", " ".join(f"{key}={value}" for key, value in reference.layout.items())),
                ("data", reference.data),
                ("step times are", reference.statistic),
            ],
            long=[("source", reference.source)],
        ),
        [el("p", "What is inconsistent in it, or missing:"), bullets(notes)] if notes else None,
        table("As published; verdicts are held against the tokens/s from the step time", columns, [el("tbody", rows)]),
    ]
