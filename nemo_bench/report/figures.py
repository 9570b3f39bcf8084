"""The figures of the report's page, as the JSON that Plotly's script draws.

Traces are SVG, so that they print. Backgrounds are transparent, and text and lines have a middle luminance, so that
they suit light and dark pages. Marks differ by more than their colour.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import Any

from nemo_bench.report.attribution import Attribution
from nemo_bench.report.model import Point, Run, ScalingCurve

Figure = dict[str, Any]

# More steps than this are thinned out: a figure is some 800 pixels wide.
SHOWN_STEPS = 500
GREY, _GRID = "#78828c", "rgba(128, 128, 128, 0.25)"
COLOURS = ("#2f7fd1", "#cf6a12", "#16957a", "#b0509c", "#8a7d12", "#78828c")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x")
_DASHES = ("solid", "dash", "dot", "dashdot")


def _figure(title: str, traces: Sequence[Figure], x: Figure, y: Figure, *, height: int = 320, **layout: Any) -> Figure:
    axis = {"gridcolor": _GRID, "linecolor": GREY, "zerolinecolor": _GRID, "automargin": True}
    return {
        "data": traces,
        "layout": {
            "title": {"text": title, "font": {"size": 14}, "x": 0, "xref": "paper"},
            "height": height,
            "margin": {"l": 60, "r": 16, "t": 36, "b": 44},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"color": GREY, "family": "inherit", "size": 12},
            "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"},
            "xaxis": {**axis, **x},
            "yaxis": {**axis, **y},
            **layout,
        },
    }


def _trace(name: str, x: Iterable[Any], y: Iterable[Any], mode: str, **style: Any) -> Figure:
    return {"type": "scatter", "name": name, "x": _rounded(x), "y": _rounded(y), "mode": mode, **style}


def _rounded(values: Iterable[Any]) -> list[Any]:
    """Return the values with short numbers; None, a gap, for one that is not finite and so not JSON."""
    return [
        value if not isinstance(value, float) else float(f"{value:.5g}") if math.isfinite(value) else None
        for value in values
    ]


def step_times(run: Run) -> Figure:
    """Return a run's step times: those that count as a line, the others as marks by the reason."""
    groups: dict[str | None, list[tuple[int, float]]] = {None: []}
    for step, time, why in zip(run.steps.step, run.steps.time_s, run.steps.excluded):
        groups.setdefault(why, []).append((step, time))
    counted = groups.pop(None)
    traces = []
    if counted:
        traces.append(_trace("counts", *thinned(counted), "lines+markers", marker={"size": 4, "color": COLOURS[0]}))
    for (why, points), symbol in zip(groups.items(), cycle(_SYMBOLS)):
        marker = {"symbol": f"{symbol}-open", "size": 8, "color": COLOURS[1]}
        traces.append(_trace(f"left out: {why}", *thinned(points), "markers", marker=marker))
    y: Figure = {"title": {"text": "s"}, "rangemode": "tozero"}
    if counted:
        # One slow step must not flatten the others: the axis ends above those that count, and double-click shows all.
        y |= {"range": [0, 1.15 * max(time for _, time in counted)], "autorange": False}
    return _figure("Step time", traces, {"title": {"text": "step"}}, y, showlegend=True)


def series(runs: Sequence[Run]) -> list[Figure]:
    """Return the step times of several runs, on a logarithmic axis, and their losses; without a figure of nothing."""
    drawn = []
    seconds: Figure = {"title": {"text": "s"}, "type": "log"}
    for title, column, y in (("Step time, of all steps", "time_s", seconds), ("Loss, as logged", "loss", {})):
        traces: list[Figure] = []
        for run in runs:
            values = zip(run.steps.step, getattr(run.steps, column))
            if points := [(step, value) for step, value in values if value is not None]:
                repeat, colour = divmod(len(traces), len(COLOURS))
                line = {"color": COLOURS[colour], "dash": _DASHES[repeat % len(_DASHES)], "width": 1.8}
                traces.append(_trace(run.name, *thinned(points), "lines", line=line))
        if traces:
            height = 320 + 9 * len(traces)
            x = {"title": {"text": "step"}}
            drawn.append(_figure(title, traces, x, y, height=height, showlegend=True))
    return drawn


def thinned(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """Return x and y of the lowest and the highest point of each stretch, so that no extreme is lost."""
    length = math.ceil(2 * len(points) / SHOWN_STEPS)
    kept = list(points)
    if length > 2:
        stretches = (points[first : first + length] for first in range(0, len(points), length))
        ends = ((min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])) for part in stretches)
        kept = sorted({point for pair in ends for point in pair})
    return [x for x, _ in kept], [y for _, y in kept]


def scaling(curves: Sequence[ScalingCurve]) -> list[Figure]:
    """Return the throughput and the parallel efficiency of a model's curves over the number of GPUs."""
    counts = sorted({gpus for curve in curves for gpus in curve.gpus})
    ticks = {"tickvals": counts, "ticktext": [f"{gpus:,}" for gpus in counts]}
    x = {"title": {"text": "GPUs"}, "type": "log", **ticks}
    throughput, efficiency = [], []
    measured = [curve.precision for curve in curves if not curve.published]
    for number, curve in enumerate(curves):
        # Published curves are dashed, in the colour of what was measured in that format.
        colour = measured.index(curve.precision) if curve.published and curve.precision in measured else number
        line = {"color": COLOURS[colour % len(COLOURS)], "dash": "dash" if curve.published else "solid"}
        marker = {"symbol": _SYMBOLS[number % len(_SYMBOLS)] + ("-open" if curve.published else ""), "size": 8}
        style: Figure = {"line": line, "marker": marker}
        throughput.append(_trace(curve.label, curve.gpus, curve.tokens_per_s, "lines+markers", **style))
        efficiency.append(_trace(curve.label, curve.gpus, curve.efficiency, "lines+markers", **style))
    model = curves[0].model
    return [
        _figure(f"{model}: throughput", throughput, x, {"title": {"text": "tokens/s"}, "type": "log"}),
        _figure(f"{model}: parallel efficiency", efficiency, x, {"tickformat": ".0%", "rangemode": "tozero"}),
    ]


def mfu(points: Sequence[Point]) -> Figure | None:
    """Return the MFU of each point, by both conventions, and the published one; None if no point has one."""
    known = [(point, point.numbers) for point in reversed(points) if point.numbers and point.numbers.mfu is not None]
    if not known:
        return None
    names = [point.name for point, _ in known]
    causal = [numbers.mfu_causal for _, numbers in known]
    published = [point.reference.mfu if point.reference else None for point, _ in known]
    bars = {"type": "bar", "orientation": "h", "name": "the recipe's convention", "marker": {"color": COLOURS[0]}}
    line = {"symbol": "line-ns-open", "size": 12, "color": COLOURS[1], "line": {"width": 3}}
    traces = [
        {**bars, "x": _rounded(numbers.mfu for _, numbers in known), "y": names},
        _trace("causal convention", causal, names, "markers", marker=line),
    ]
    if any(point.reference for point, _ in known):
        diamond = {"symbol": "diamond", "size": 12, "color": COLOURS[1]}
        traces.append(_trace("published", published, names, "markers", marker=diamond))
    y, height = _names_axis(names)
    x = {"tickformat": ".0%", "rangemode": "tozero"}
    return _figure("Model FLOPs utilisation", traces, x, y, height=120 + height)


def waterfall(attribution: Attribution) -> Figure | None:
    """Return the way from the published or the expected step time to the measured one; None if nothing explains it.

    Its axis begins above 0.
    """
    a, first = attribution, (attribution.source.partition(",")[0], attribution.expected_s)
    steps = [(term.name, term.difference_s) for term in a.terms if term.difference_s]
    steps.append(("unexplained", a.unexplained_s))
    if a.published_s is not None:
        steps, first = [("estimate", a.expected_s - a.published_s), *steps], ("published", a.published_s)
    if len(steps) == 1:
        return None
    heights = [*itertools.accumulate([first[1], *(seconds for _, seconds in steps)])]
    names = [first[0], *(name for name, _ in steps), "measured"]
    bars = {
        "type": "waterfall",
        "measure": ["absolute", *["relative"] * len(steps), "total"],
        "x": ["<br>".join(textwrap.wrap(name, 16)) for name in names],
        "y": _rounded([first[1], *(seconds for _, seconds in steps), 0.0]),
        "text": [f"{first[1]:.4g} s", *(f"{1e3 * seconds:+,.0f} ms" for _, seconds in steps), f"{a.measured_s:.4g} s"],
        "textposition": "outside",
        "connector": {"line": {"color": GREY, "width": 1}},
        "increasing": {"marker": {"color": COLOURS[1]}},
        "decreasing": {"marker": {"color": COLOURS[2]}},
        "totals": {"marker": {"color": COLOURS[0]}},
    }
    room = max(max(heights) - min(heights), 0.01 * a.measured_s) / 4
    y = {"title": {"text": "s"}, "range": [min(heights) - room, max(heights) + room], "autorange": False}
    return _figure(f"{a.point}: from {first[0]} to measured", [bars], {}, y, height=380)


def _names_axis(names: Sequence[str]) -> tuple[Figure, int]:
    """Return an axis of names, long ones wrapped between their words, and its height in pixels."""
    labels = [textwrap.wrap(name, 52, break_on_hyphens=False, break_long_words=False) for name in names]
    axis = {"type": "category", "tickvals": [*names], "ticktext": ["<br>".join(lines) for lines in labels]}
    return axis, len(names) * (10 + 14 * max(map(len, labels), default=1))
