"""The figures of the report's page, as the JSON that Plotly's script draws; its theme is in the page's template.

They are SVG, so that they print; marks differ by more than their colour.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import Any

from nemo_bench.report.model import Attribution, Run, ScalingCurve

Figure = dict[str, Any]

# More steps than this are thinned out: a figure is some 800 pixels wide.
SHOWN_STEPS = 500
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x")
_DASHES = ("solid", "dash", "dot", "dashdot")
_COLOURS = 6  # of the theme, for as many traces


def _figure(title: str, traces: Sequence[Figure], x: Figure, y: Figure, height: int = 320) -> Figure:
    return {"data": traces, "layout": {"title": {"text": title}, "height": height, "xaxis": x, "yaxis": y}}


def _trace(name: str, points: Iterable[tuple[int, float]], mode: str, **style: Any) -> Figure:
    """Return a line or marks through (x, y), y in five digits; None, a gap, for one that is not finite."""
    points = list(points)
    length = math.ceil(2 * len(points) / SHOWN_STEPS)
    if length > 2:  # the lowest and the highest of each stretch stay: no extreme is lost
        stretches = [sorted(points[i : i + length], key=lambda point: point[1]) for i in range(0, len(points), length)]
        points = sorted({point for stretch in stretches for point in (stretch[0], stretch[-1])})
    y = [float(f"{value:.5g}") if math.isfinite(value) else None for _, value in points]
    return {"type": "scatter", "name": name, "x": [x for x, _ in points], "y": y, "mode": mode, **style}


def step_times(run: Run) -> Figure:
    """Return a run's step times: those that count as a line, the others as marks by the reason."""
    groups: dict[str | None, list[tuple[int, float]]] = {None: []}
    for step, time, why in zip(run.steps.step, run.steps.time_s, run.steps.excluded):
        groups.setdefault(why, []).append((step, time))
    counted = groups.pop(None)
    traces = [_trace("counts", counted, "lines+markers", marker={"size": 4})]
    for (why, points), symbol in zip(groups.items(), cycle(_SYMBOLS)):
        traces.append(_trace(f"left out: {why}", points, "markers", marker={"symbol": f"{symbol}-open", "size": 8}))
    y: Figure = {"title": {"text": "s"}, "rangemode": "tozero"}
    if counted:
        # One slow step must not flatten the others: the axis ends above those that count, and double-click shows all.
        y |= {"range": [0, 1.15 * max(time for _, time in counted)], "autorange": False}
    return _figure("Step time", traces, {"title": {"text": "step"}}, y)


def losses(runs: Sequence[Run]) -> Figure | None:
    """Return the losses of several runs; None where none was logged."""
    traces: list[Figure] = []
    for run in runs:
        if points := [(step, loss) for step, loss in zip(run.steps.step, run.steps.loss) if loss is not None]:
            line = {"dash": _DASHES[len(traces) // _COLOURS % len(_DASHES)], "width": 1.8}
            traces.append(_trace(run.name, points, "lines", line=line))
    x = {"title": {"text": "step"}}
    return _figure("Loss, as logged", traces, x, {}, height=320 + 9 * len(traces)) if traces else None


def scaling(curves: Sequence[ScalingCurve]) -> list[Figure]:
    """Return the throughput and the parallel efficiency of a model's curves over the number of GPUs."""
    counts = sorted({gpus for curve in curves for gpus in curve.gpus})
    x = {"title": {"text": "GPUs"}, "type": "log", "tickvals": counts, "ticktext": [f"{gpus:,}" for gpus in counts]}
    throughput, efficiency = [], []
    for curve, symbol in zip(curves, cycle(_SYMBOLS)):
        marker = {"symbol": f"{symbol}-open" if curve.published else symbol, "size": 8}
        style: Figure = {"line": {"dash": "dash" if curve.published else "solid"}, "marker": marker}
        throughput.append(_trace(curve.label, zip(curve.gpus, curve.tokens_per_s), "lines+markers", **style))
        efficiency.append(_trace(curve.label, zip(curve.gpus, curve.efficiency), "lines+markers", **style))
    name = curves[0].model
    return [
        _figure(f"{name}: throughput", throughput, x, {"title": {"text": "tokens/s"}, "type": "log"}),
        _figure(f"{name}: parallel efficiency", efficiency, x, {"tickformat": ".0%", "rangemode": "tozero"}),
    ]


def waterfall(way: Attribution) -> Figure | None:
    """Return the way to a measured step time, on an axis that begins above 0; None where nothing explains it."""
    steps = [(term.name, term.more_s) for term in way.terms if term.more_s]
    if len(steps) < 2:
        return None
    heights = [*itertools.accumulate((step_s for _, step_s in steps), initial=way.expected_s)]
    columns = [
        ("absolute", way.source, way.expected_s, f"{way.expected_s:.4g} s"),
        *(("relative", name, step_s, f"{1e3 * step_s:+,.0f} ms") for name, step_s in steps),
        ("total", "measured", 0.0, f"{way.measured_s:.4g} s"),
    ]
    measures, names, y_s, texts = zip(*columns)
    x = ["<br>".join(textwrap.wrap(name, 16)) for name in names]
    bars: Figure = {"measure": measures, "x": x, "y": y_s, "text": texts, "textposition": "outside"}
    # Plotly takes what grows for the better.
    colours = {"increasing": {"marker": {"color": "#cf6a12"}}, "decreasing": {"marker": {"color": "#16957a"}}}
    room = (max(heights) - min(heights)) / 4
    y = {"title": {"text": "s"}, "range": [min(heights) - room, max(heights) + room], "autorange": False}
    title = "<br>".join(textwrap.wrap(f"{way.point}: from {way.source} to measured", 80))
    return _figure(title, [{"type": "waterfall", "showlegend": False, **bars, **colours}], {}, y, height=380)
