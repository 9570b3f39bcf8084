"""The figures of the report's page, as the JSON that Plotly's script draws.

Traces are SVG, so that they print. Backgrounds are transparent, and text and lines have a middle luminance, so that
they suit light and dark pages. Marks differ by more than their colour.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from nemo_bench.report.model import Comparison, Point, Run, ScalingCurve
from nemo_bench.report.statistics import CHECKPOINT, NO_TIME, PROFILE, RESTART, VALIDATION, WARM_UP

Figure = dict[str, Any]

# More steps than this are thinned out: a figure is some 800 pixels wide.
SHOWN_STEPS = 500
GREY, _GRID = "#78828c", "rgba(128, 128, 128, 0.25)"
COLOURS = ("#2f7fd1", "#cf6a12", "#16957a", "#b0509c", "#8a7d12", "#78828c")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x")
_EXCLUDED = {
    WARM_UP: "circle-open",
    RESTART: "circle-open-dot",
    VALIDATION: "diamond-open",
    CHECKPOINT: "square-open",
    PROFILE: "triangle-up-open",
    NO_TIME: "x-thin-open",
}


def figure(title: str, traces: Sequence[Figure], x: Figure, y: Figure, *, height: int = 320, **layout: Any) -> Figure:
    """Return a figure with the axes that `x` and `y` describe."""
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


def step_times(run: Run) -> Figure:
    """Return a run's step times: those that count as a line, the others as marks by the reason."""
    groups: dict[str | None, list[tuple[int, float]]] = {None: []}
    for step, time, why in zip(run.steps.step, run.steps.time_s, run.steps.excluded):
        groups.setdefault(why, []).append((step, time))
    traces = [
        _trace(
            f"left out: {why}" if why else "counts",
            thinned(points),
            mode="markers" if why else "lines+markers",
            marker={
                "symbol": _EXCLUDED.get(why, "star-open") if why else "circle",
                "size": 8 if why else 4,
                "color": COLOURS[1] if why else COLOURS[0],
            },
        )
        for why, points in groups.items()
        if points
    ]
    # One slow step must not flatten the others: the axis ends above the steps that count, and double-click shows all.
    counted = [time for _, time in groups[None]]
    y: Figure = {"title": {"text": "s"}, "rangemode": "tozero"}
    if counted and run.times:
        y["range"] = [0, 1.15 * max(max(counted), run.times.median_s)]
        y["autorange"] = False
    return figure("Step time", traces, {"title": {"text": "step"}}, y, showlegend=True)


def all_step_times(runs: Iterable[Run]) -> Figure | None:
    """Return the step times of several runs, on a logarithmic axis; None if no step is known."""
    y = {"title": {"text": "s"}, "type": "log"}
    return _all_runs("Step time, of all steps", ((run, run.steps.time_s) for run in runs), y)


def all_losses(runs: Iterable[Run]) -> Figure | None:
    """Return the losses of several runs; None if none is known."""
    return _all_runs("Loss, as logged", ((run, run.steps.loss) for run in runs), {})


def _all_runs(title: str, columns: Iterable[tuple[Run, Sequence[float | None]]], y: Figure) -> Figure | None:
    dashes = ("solid", "dash", "dot", "dashdot")
    traces: list[Figure] = []
    for run, values in columns:
        points = [(step, value) for step, value in zip(run.steps.step, values) if value is not None]
        if points:
            colour, dash = len(traces) % len(COLOURS), len(traces) // len(COLOURS) % len(dashes)
            line = {"color": COLOURS[colour], "dash": dashes[dash], "width": 1.8}
            traces.append(_trace(run.name, thinned(points), mode="lines", line=line))
    height = 320 + 9 * len(traces)
    return figure(title, traces, {"title": {"text": "step"}}, y, height=height, showlegend=True) if traces else None


def throughput(curves: Sequence[ScalingCurve]) -> Figure:
    """Return tokens/s over the number of GPUs."""
    traces = [_curve(curves, number, curve.tokens_per_s) for number, curve in enumerate(curves)]
    y = {"title": {"text": "tokens/s"}, "type": "log"}
    return figure(f"{curves[0].model}: throughput", traces, _gpus_axis(curves), y)


def efficiency(curves: Sequence[ScalingCurve]) -> Figure:
    """Return the parallel efficiency over the number of GPUs."""
    traces = [_curve(curves, number, curve.efficiency) for number, curve in enumerate(curves)]
    y = {"tickformat": ".0%", "rangemode": "tozero"}
    return figure(f"{curves[0].model}: parallel efficiency", traces, _gpus_axis(curves), y)


def _curve(curves: Sequence[ScalingCurve], number: int, values: Sequence[float]) -> Figure:
    """Return a curve as a line: published ones are dashed, in the colour of what was measured in that format."""
    curve = curves[number]
    measured = [other.precision for other in curves if not other.published]
    colour = measured.index(curve.precision) if curve.published and curve.precision in measured else number
    line = {"color": COLOURS[colour % len(COLOURS)], "dash": "dash" if curve.published else "solid"}
    marker = {"symbol": _SYMBOLS[number % len(_SYMBOLS)] + ("-open" if curve.published else ""), "size": 8}
    return _trace(curve.label, list(zip(curve.gpus, values)), mode="lines+markers", line=line, marker=marker)


def _gpus_axis(curves: Sequence[ScalingCurve]) -> Figure:
    counts = sorted({gpus for curve in curves for gpus in curve.gpus})
    ticks = {"tickvals": counts, "ticktext": [f"{gpus:,}" for gpus in counts]}
    return {"title": {"text": "GPUs"}, "type": "log", **ticks}


def mfu(points: Sequence[Point]) -> Figure | None:
    """Return the MFU of each point, by both conventions, and the published one; None if no point has one."""
    known = [(point, point.numbers) for point in reversed(points) if point.numbers and point.numbers.mfu is not None]
    if not known:
        return None
    names = [point.name for point, _ in known]
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": "the recipe's convention",
            "x": [_rounded(numbers.mfu) for _, numbers in known],
            "y": names,
            "marker": {"color": COLOURS[0]},
        },
        _ticks("causal convention", "line-ns-open", names, [numbers.mfu_causal for _, numbers in known]),
    ]
    if any(point.reference for point, _ in known):
        published = [point.reference.mfu if point.reference else None for point, _ in known]
        traces.append(_ticks("published", "diamond", names, published))
    x = {"tickformat": ".0%", "rangemode": "tozero"}
    y, height = _names_axis(names)
    return figure("Model FLOPs utilisation", traces, x, y, height=120 + height)


def _names_axis(names: Sequence[str]) -> tuple[Figure, int]:
    """Return an axis of names, long ones wrapped between their words, and its height in pixels."""
    labels = [textwrap.wrap(name, 52, break_on_hyphens=False, break_long_words=False) for name in names]
    axis = {"type": "category", "tickvals": [*names], "ticktext": ["<br>".join(lines) for lines in labels]}
    return axis, len(names) * (10 + 14 * max(map(len, labels), default=1))


def _ticks(name: str, symbol: str, y: Sequence[str], x: Sequence[float | None]) -> Figure:
    marker = {"symbol": symbol, "size": 12, "color": COLOURS[1], "line": {"width": 3 if "line" in symbol else 1}}
    return {**_trace(name, [], mode="markers", marker=marker), "x": [_rounded(value) for value in x], "y": [*y]}


def ratios(comparisons: Sequence[Comparison], tolerance: float) -> Figure | None:
    """Return each point's throughput over the baseline's, with its interval; the tolerance is shaded."""
    known = [item for item in reversed(comparisons) if item.ratio is not None]
    if not known:
        return None
    ends = [item.interval or (item.ratio, item.ratio) for item in known]
    trace = {
        **_trace("tokens/s over the baseline's", [], mode="markers", marker={"size": 9, "color": COLOURS[0]}),
        "x": [_rounded(item.ratio) for item in known],
        "y": [item.point for item in known],
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [_rounded((high or 0) - (item.ratio or 0)) for (_, high), item in zip(ends, known)],
            "arrayminus": [_rounded((item.ratio or 0) - (low or 0)) for (low, _), item in zip(ends, known)],
        },
    }
    band = {"type": "rect", "x0": 1 - tolerance, "x1": 1 + tolerance, "yref": "paper", "y0": 0, "y1": 1}
    shapes = [{**band, "fillcolor": GREY, "opacity": 0.15, "line": {"width": 0}}]
    x = {"tickformat": ".0%"}
    y, height = _names_axis([item.point for item in known])
    return figure("Throughput over the baseline's", [trace], x, y, height=110 + height, shapes=shapes)


def _trace(name: str, points: Sequence[tuple[float, float]], **style: Any) -> Figure:
    x, y = [x for x, _ in points], [_rounded(y) for _, y in points]
    return {"type": "scatter", "name": name, "x": x, "y": y, **style}


def thinned(points: Sequence[tuple[int, float]]) -> Sequence[tuple[int, float]]:
    """Return the lowest and the highest of each stretch, so that no extreme is lost."""
    length = math.ceil(2 * len(points) / SHOWN_STEPS)
    if length < 3:
        return points
    kept = []
    for first in range(0, len(points), length):
        stretch = points[first : first + length]
        kept += sorted({min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])})
    return kept


def _rounded(value: float | None) -> float | None:
    """Return the value as short JSON; None, a gap, if it is not finite."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")
