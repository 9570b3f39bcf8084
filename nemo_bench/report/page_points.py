"""The points on the report's page: the summary with the verdicts, scaling curves, MFU."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence

from nemo_bench.report import plots
from nemo_bench.report.markup import Child, el
from nemo_bench.report.model import Point, Report, ScalingCurve
from nemo_bench.report.numbers import tokens_text
from nemo_bench.report.page_parts import (
    NONE,
    Column,
    badge,
    decimals,
    figure,
    four,
    named,
    percent,
    row,
    section,
    table,
    whole,
)

# --- the summary --------------------------------------------------------------------------------------------


def summary(report: Report) -> ET.Element:
    """A row a point with its verdict and numbers, and below it the reasons and the runs."""
    if not report.points:
        return section("summary", "Summary", el("p", "There is no point to show: no run was read whose model, "
                       "precision and number of GPUs are known."))  # fmt: skip
    days = f"days to {tokens_text(report.assumptions.total_tokens)}"
    columns = (
        Column("point"),
        Column("verdict"),
        Column("of published", "tokens/s", number=True),
        Column("published", "s", number=True),
        Column("step time", "s, mean", number=True),
        Column("±", "s, 95%", number=True),
        Column("median", "s", number=True),
        Column("last", "s", number=True),
        Column("tokens/s", number=True),
        Column("tokens/s", "a GPU", number=True),
        Column("TFLOP/s", "a GPU", number=True),
        Column("MFU", number=True),
        Column("MFU", "causal", number=True),
        Column(days, "tokens", number=True),
        Column("GPUs", number=True),
        Column("layout", "TP/PP/VP/CP/DP"),
        Column("batch", "MBS/GBS", number=True),
        Column("runs", "final/all", number=True),
    )
    bodies = [_point_rows(report, number, point, columns) for number, point in enumerate(report.points)]
    note = (
        "Step time: of several runs, the mean of their means; ±: half of its 95% confidence interval, over the "
        "repeats where there are some, else over the steps. Last: the last step, which the recipe reads. "
        f"{NONE}: not known, or does not apply. "
    )
    how = el("a", "How each number is computed", href="#methods")
    return section(
        "summary", "Summary", table("Points and their verdicts", columns, bodies, "points"), el("p", note, how, ".")
    )


def _point_rows(report: Report, number: int, point: Point, columns: Sequence[Column]) -> ET.Element:
    reference = point.reference
    judged: list[Child] = [
        point.name,
        badge(point.verdict.value, point.verdict.text),
        percent(point.verdict.ratio, 1),
        four(reference.step_time_s) if reference else NONE,
    ]
    identity: list[Child] = [
        [f"{point.gpus:,}", el("span", f" {point.gpu}", class_="muted") if point.gpu else None],
        _layout(point),
        f"{_size(point, 'MBS')}/{whole(point.global_batch_size)}",
        f"{len(point.final_runs)}/{len(point.runs)}",
    ]
    between = columns[len(judged) : -len(identity)]
    numbers = _point_numbers(point)
    made = row(columns, [*judged, *(numbers or [None] * len(between)), *identity], id=f"point-{number}")
    if not numbers:  # one cell in place of them, so that nobody looks for a number
        for cell in list(made)[len(judged) + 1 : -len(identity)]:
            made.remove(cell)
        made[len(judged)].attrib = {"colspan": str(len(between)), "class": "no-result"}
        made[len(judged)].text = "no result"
    return el("tbody", made, el("tr", el("td", _remarks(report, point), colspan=len(columns)), class_="remarks"))


def _point_numbers(point: Point) -> list[Child]:
    """The cells of a point's results; none for one without."""
    n = point.numbers
    if n is None:
        return []
    return [
        four(n.step_time_s),
        NONE if point.step_time is None else f"{point.step_time.margin:.2g}",
        four(point.median_s),
        four(point.last_s),
        whole(n.tokens_per_s),
        whole(n.tokens_per_s_per_gpu),
        four(n.tflops_per_gpu),
        percent(n.mfu),
        percent(n.mfu_causal),
        decimals(n.days_to_train),
    ]


def _layout(point: Point) -> Child:
    if not point.layout:
        return NONE
    sizes = "/".join(_size(point, key) for key in ("TP", "PP", "VP", "CP", "DP"))
    bubble = point.pipeline_bubble
    return sizes if bubble is None else [sizes, el("br"), el("span", f"bubble {bubble:.1%}", class_="muted")]


def _size(point: Point, key: str) -> str:
    return str(point.layout[key]) if key in point.layout else NONE


def _remarks(report: Report, point: Point) -> ET.Element:
    """The verdict in words, its reasons, and the runs behind it."""
    why = [each.why_not_final for each in report.runs if each.name in point.runs and each.why_not_final]
    texts = list(dict.fromkeys([point.verdict.why, *point.verdict.differences, *point.verdict.remarks]))
    # The verdict's own sentence tells it already where nothing was finished.
    texts += [f"left out: {text}" for text in dict.fromkeys(why) if not any(text in told for told in texts)]
    numbers = {run.name: number for number, run in enumerate(report.runs)}
    links = [[", " if i else None, el("a", name, href=f"#runs-{numbers[name]}")]
             for i, name in enumerate(point.runs[:6]) if name in numbers]  # fmt: skip
    more = f" and {len(point.runs) - 6} more" if len(point.runs) > 6 else None
    shown = [[" · " if i else None, text] for i, text in enumerate(texts)]
    return el("div", shown, " · ", "run " if len(point.runs) == 1 else "runs ", links, more)


# --- plots --------------------------------------------------------------------------------------------------


def scaling(report: Report) -> ET.Element | None:
    """Throughput and parallel efficiency over the number of GPUs; None where nothing was measured at two sizes."""
    models = [
        name
        for name in dict.fromkeys(curve.model for curve in report.scaling)
        if any(len(curve.gpus) > 1 and not curve.published and curve.model == name for curve in report.scaling)
    ]
    if not models:
        return None
    return section("scaling", "Scaling", [_scaling_of(report, name) for name in models])


def _scaling_of(report: Report, name: str) -> list[ET.Element]:
    curves = sorted((curve for curve in report.scaling if curve.model == name), key=lambda curve: curve.published)
    labels, colours = _curve_labels(curves), _colours(curves)
    pairs = list(zip(curves, labels, colours))
    drawn = [
        plots.Curve(label, curve.gpus, curve.tokens_per_s, colour, curve.published) for curve, label, colour in pairs
    ]
    relative = [
        plots.Curve(label, curve.gpus, curve.efficiency, colour, curve.published) for curve, label, colour in pairs
    ]
    missing = [point.name for point in report.points if point.model == name and point.numbers is None]
    what = "; ".join(f"{label}: {curve.label}" for curve, label, _ in pairs if label != curve.label)
    key = "Solid: measured. " + ("Dashed, hollow: published. " if any(curve.published for curve in curves) else "")
    left = f"Without a result, so not drawn: {named(missing)}." if missing else None
    base = "Throughput a GPU over that at the fewest GPUs of the same curve. The axis begins at 0."
    throughput = plots.scaling(f"Throughput of {name} over GPUs", drawn, "tokens/s", percent=False)
    efficiency = plots.scaling(f"Parallel efficiency of {name} over GPUs", relative, "efficiency", percent=True)
    return [
        el(
            "div",
            figure(throughput, f"{name}: throughput, both axes logarithmic", key, left),
            figure(efficiency, f"{name}: parallel efficiency", base),
            class_="figures",
        ),
        el(
            "details",
            el("summary", f"{name}: the curves as a table"),
            _curve_table(name, curves, labels),
            el("p", what),
        ),
    ]


def _curve_labels(curves: Sequence[ScalingCurve]) -> list[str]:
    """The curves' labels without what all measured ones share; in full where that leaves two alike."""
    words = [set(curve.label.split()) for curve in curves if not curve.published]
    common = set.intersection(*words) if words else set()
    labels = []
    for curve in curves:
        if curve.published:
            labels.append(f"{curve.precision} published")
        else:
            rest = [word for word in curve.label.split() if word not in common or word == curve.precision]
            labels.append(" ".join([*rest, "measured"] if rest == [curve.precision] else rest))
    return labels if len(set(labels)) == len(labels) else [curve.label for curve in curves]


def _colours(curves: Sequence[ScalingCurve]) -> list[int]:
    """A colour each, the measured being first; a published curve has that of the first measured one of its format."""
    formats = [curve.precision for curve in curves if not curve.published]
    return [
        (formats.index(curve.precision) if curve.published and curve.precision in formats else number) % plots.SERIES
        for number, curve in enumerate(curves)
    ]


def _curve_table(name: str, curves: Sequence[ScalingCurve], labels: Sequence[str]) -> ET.Element:
    columns = [Column("GPUs", number=True)]
    for label in labels:
        columns += [Column(label, "tokens/s", number=True), Column(label, "efficiency", number=True)]
    rows = []
    for gpus in sorted({count for curve in curves for count in curve.gpus}):
        cells: list[Child] = [f"{gpus:,}"]
        for curve in curves:
            at = curve.gpus.index(gpus) if gpus in curve.gpus else None
            cells.append(NONE if at is None else whole(curve.tokens_per_s[at]))
            cells.append(NONE if at is None else percent(curve.efficiency[at], 1))
        rows.append(row(columns, cells))
    return table(f"Scaling of {name}", columns, [el("tbody", rows)])


def mfu(report: Report) -> ET.Element | None:
    """The MFU of each point beside the published one; None where no point has one."""
    shown = [point for point in report.points if point.numbers is not None and point.numbers.mfu is not None]
    if not shown:
        return None
    formats = list(dict.fromkeys(point.precision for point in report.points))
    rows = [
        plots.Bar(
            point.name,
            n.mfu,
            n.mfu_causal,
            point.reference.mfu if point.reference else None,
            formats.index(point.precision) % plots.SERIES,
        )
        for point in shown
        if (n := point.numbers) is not None and n.mfu is not None
    ]
    missing = [point.name for point in report.points if point not in shown]
    peaks = dict.fromkeys(
        f"{four(n.peak_tflops)} TFLOP/s ({n.peak_source})" for point in shown if (n := point.numbers) is not None
    )
    notes = [
        "Bar: the recipe's convention, attention in full. Line in it: causal convention.",
        "◇: published." if any(each.published is not None for each in rows) else None,
        f"Peaks: {named(list(peaks), 8)}.",
        f"Without an MFU, so not drawn: {named(missing)}." if missing else None,
    ]
    drawn = plots.bars("Model FLOPs utilisation", rows)
    return section("mfu", "MFU", figure(drawn, "Model FLOPs utilisation of each point", *notes))
