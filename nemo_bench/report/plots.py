"""The plots of the report's page, as inline SVG: colours come from the page's style sheet by class.

A library would draw more, and would be one more thing to install on a login node; these few are enough.
"""

from __future__ import annotations

import math
import statistics
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from nemo_bench.report.markup import el
from nemo_bench.report.statistics import CHECKPOINT, NO_TIME, PROFILE, RESTART, VALIDATION, WARM_UP, Steps

# More steps than this are thinned out for a line, and more marks than this for marks: a plot is 560 pixels wide.
LINE_POINTS = 1000
MARKS = 240
# More marks than this are one path without a tooltip each.
TOOLTIPS = 120
# Labels of bars that are longer are cut.
LABEL = 64
SERIES = 6  # colours of the style sheet: .s0 to .s5

_WIDTH, _HEIGHT = 640, 270
_TOP, _BOTTOM = 16, 40
_GLYPHS = {WARM_UP: "○", RESTART: "○", VALIDATION: "◇", CHECKPOINT: "□", PROFILE: "△", NO_TIME: "✕"}
# Reasons whose steps lie in a row, and are shaded besides.
SHADED = (WARM_UP, RESTART)

Map = Callable[[float], float]


@dataclass(frozen=True)
class Drawn:
    """A plot, and what has to be said below it."""

    svg: ET.Element
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Curve:
    """A line of a chart: `series` is its colour, `dashed` a published one."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    series: int
    dashed: bool


@dataclass(frozen=True)
class Bar:
    """A bar as a fraction, with other values of the same thing beside it: `causal` a tick, `published` a diamond."""

    label: str
    value: float
    causal: float | None
    published: float | None
    series: int


@dataclass(frozen=True)
class Spread:
    """A ratio with its interval (None: not known) and what is said of it."""

    label: str
    ratio: float
    low: float | None
    high: float | None
    text: str


def glyph(reason: str) -> str:
    """The mark of steps left out for `reason`, as a character for legends."""
    return _GLYPHS.get(reason, "◇")


# --- axes ---------------------------------------------------------------------------------------------------


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, some `about` of them."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.999)
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten from `low` to `high`; the powers alone where those are many, more where few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if math.log10(high / low) < 2.5 else (1,)
    found = [factor * 10.0**power for power in powers for factor in factors]
    inside = [value for value in found if low <= value <= high]
    return inside if len(inside) > 2 else ticks(low, high, 4)


def _labels(values: Sequence[float]) -> list[str]:
    """Tick labels with as many decimals as tell the ticks apart."""
    step = min((b - a for a, b in pairwise(values)), default=abs(values[0]) or 1.0)
    decimals = min(9, max(0, -math.floor(math.log10(step) + 1e-9)))
    return [f"{value:,.{decimals}f}" for value in values]


def compact(value: float) -> str:
    """A tick of a logarithmic axis: 200,000 as 200k."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"


def _linear(low: float, high: float, start: float, end: float) -> Map:
    return lambda value: start + (value - low) / ((high - low) or 1.0) * (end - start)


def _log(low: float, high: float, start: float, end: float) -> Map:
    along = _linear(math.log(low), math.log(high), start, end)
    return lambda value: along(math.log(value))


def _svg(
    title: str, description: str, height: float, *children: ET.Element | None, width: float = _WIDTH
) -> ET.Element:
    return el(
        "svg",
        el("title", title),
        el("desc", description),
        children,
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
    )


def _line(x1: float, y1: float, x2: float, y2: float, class_: str) -> ET.Element:
    return el("path", d=f"M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}", class_=class_)


def _text(x: float, y: float, text: str, class_: str = "tick", anchor: str = "start") -> ET.Element:
    return el("text", text, x=f"{x:.1f}", y=f"{y:.1f}", class_=class_, text_anchor=anchor)


def _axes(
    left: float,
    right: float,
    x_at: Sequence[tuple[float, str]],
    y_at: Sequence[tuple[float, str]],
    x_title: str,
    y_title: str,
) -> list[ET.Element]:
    """Grid, ticks and titles; positions are pixels."""
    bottom = _HEIGHT - _BOTTOM
    made = []
    for y, text in y_at:
        made += [_line(left, y, right, y, "grid"), _text(left - 7, y + 4, text, anchor="end")]
    for x, text in x_at:
        made += [_line(x, bottom, x, bottom + 4, "axis"), _text(x, bottom + 17, text, anchor="middle")]
    made.append(_line(left, bottom, right, bottom, "axis"))
    made.append(_text((left + right) / 2, _HEIGHT - 5, x_title, "label", "middle"))
    middle = (_TOP + bottom) / 2
    name = el(
        "text", y_title, class_="label", text_anchor="middle", transform=f"translate(13 {middle:.1f}) rotate(-90)"
    )
    return [*made, name]


# --- marks --------------------------------------------------------------------------------------------------


def _shape(kind: str, x: float, y: float, r: float) -> str:
    if kind == "◇":
        return f"M{x:.1f} {y - r:.1f}l{r} {r}l{-r} {r}l{-r} {-r}z"
    if kind == "□":
        return f"M{x - r:.1f} {y - r:.1f}h{2 * r}v{2 * r}h{-2 * r}z"
    if kind == "△":
        return f"M{x:.1f} {y - r:.1f}l{r} {2 * r}h{-2 * r}z"
    if kind == "▽":
        return f"M{x:.1f} {y + r:.1f}l{r} {-2 * r}h{-2 * r}z"
    if kind == "✕":
        return f"M{x - r:.1f} {y - r:.1f}l{2 * r} {2 * r}m0 {-2 * r}l{-2 * r} {2 * r}"
    return f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z"


def _marks(kind: str, places: Sequence[tuple[float, float, str]], class_: str, r: float = 3) -> list[ET.Element]:
    """Marks at (x, y, tooltip)."""
    if len(places) > TOOLTIPS:
        return [el("path", d="".join(_shape(kind, x, y, r) for x, y, _ in places), class_=class_)]
    return [el("path", el("title", text), d=_shape(kind, x, y, r), class_=class_) for x, y, text in places]


def thin(values: Sequence[float], limit: int) -> list[int]:
    """Indices of at most about `limit` of the values: the first, the last, and the extremes of each stretch between."""
    if len(values) <= limit:
        return list(range(len(values)))
    buckets = max(1, limit // 2 - 1)
    kept = {0, len(values) - 1}
    for number in range(buckets):
        stretch = range(number * len(values) // buckets, (number + 1) * len(values) // buckets)
        kept |= {min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)}
    return sorted(kept)


# --- scaling ------------------------------------------------------------------------------------------------


def scaling(title: str, curves: Sequence[Curve], y_title: str, *, percent: bool) -> Drawn:
    """Curves over the number of GPUs: a logarithmic y axis, or `percent` from 0."""
    left, right, bottom = 62, _WIDTH - 122, _HEIGHT - _BOTTOM
    xs = sorted({x for curve in curves for x in curve.x})
    values = [y for curve in curves for y in curve.y]
    x = _log(xs[0], xs[-1], left + 12, right - 6) if len(xs) > 1 else (lambda _: (left + right) / 2)
    if percent:
        top = max(1.1, max(values) * 1.03)
        y = _linear(0, top, bottom, _TOP)
        at = [(y(value), f"{value:.0%}") for value in ticks(0, top)]
    else:
        low, high = min(values) / 1.3, max(values) * 1.3
        y = _log(low, high, bottom, _TOP)
        at = [(y(value), compact(value)) for value in log_ticks(low, high)]
    drawn = []
    for curve in sorted(curves, key=lambda curve: not curve.dashed):  # what was measured lies on top
        places = [(x(a), y(b)) for a, b in zip(curve.x, curve.y)]
        told = [f"{curve.label}, {a:,.0f}: {f'{b:.1%}' if percent else f'{b:,.0f}'}" for a, b in zip(curve.x, curve.y)]
        dashed = " dashed" if curve.dashed else ""
        drawn.append(el("path", d=_polyline(places), class_=f"line s{curve.series}{dashed}"))
        kind = "□" if curve.dashed else "○◇△"[curve.series % 3]
        filled = "hollow" if curve.dashed else "mark"
        drawn += _marks(kind, [(*place, text) for place, text in zip(places, told)], f"{filled} s{curve.series}", 3.5)
    # The counts lie an octave apart or more, as a rule; where they do not, labels would run into each other.
    shown = [value for i, value in enumerate(xs) if i == 0 or x(value) - x(xs[i - 1]) > 24]
    axes = _axes(left, right, [(x(each), f"{each:,.0f}") for each in shown], at, "GPUs", y_title)
    ends = [(x(curve.x[-1]), y(curve.y[-1]), curve) for curve in curves]
    description = "; ".join(
        f"{c.label}: " + ", ".join(f"{b:.1%}" if percent else f"{b:,.0f}" for b in c.y) for c in curves
    )
    return Drawn(_svg(title, description, _HEIGHT, *axes, *drawn, *_direct(ends, right, bottom)))


def _polyline(places: Iterable[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)


def _direct(ends: Sequence[tuple[float, float, Curve]], right: float, bottom: float) -> list[ET.Element]:
    """Each curve's label at its end, moved apart where they would lie on each other."""
    ordered = sorted(ends, key=lambda end: end[1])
    places: list[float] = []
    for _, y, _curve in ordered:
        places.append(max(y, places[-1] + 15 if places else _TOP))
    limit = bottom
    for i in reversed(range(len(places))):
        places[i] = limit = min(places[i], limit)
        limit -= 15
    made = []
    for (x, y, curve), place in zip(ordered, places):
        made.append(_line(x + 6, y, right + 12, place, "leader"))
        made.append(_text(right + 15, place + 4, shorten(curve.label, 17), f"name s{curve.series}"))
    return made


def shorten(text: str, length: int) -> str:
    """The text, cut where it is longer."""
    return text if len(text) <= length else text[: length - 1] + "…"


# --- series over steps --------------------------------------------------------------------------------------


def step_times(name: str, steps: Steps, median_s: float | None) -> Drawn | None:
    """Step times with the warm-up shaded and the steps left out marked; None where there is no time.

    Args:
        name: of the run.
        median_s: drawn as a line; None for a run without a result.
    """
    timed = [(i, t) for i, t in enumerate(steps.time_s) if t is not None and math.isfinite(t) and t > 0]
    if not timed:
        return None
    counted = [t for i, t in timed if steps.excluded[i] is None] or [t for _, t in timed]
    low, high = _window(counted, [t for _, t in timed])
    frame = _Frame(steps, low, high, "step time (s)", right=78)
    parts = [*frame.axes, *frame.shades()]
    parts += frame.line([(i, t) for i, t in timed if steps.excluded[i] is None], "s0", "s", marked=True)
    untimed = [i for i, reason in enumerate(steps.excluded) if reason == NO_TIME]
    parts += frame.excluded([(i, t) for i, t in timed if steps.excluded[i] is not None], untimed)
    if median_s is not None:
        y = frame.y(median_s)
        parts.append(_line(frame.left, y, frame.right, y, "median"))
        parts += [_text(frame.right + 6, y - 1, "median"), _text(frame.right + 6, y + 13, f"{median_s:#.4g} s")]
    above = [t for _, t in timed if t > high]
    below = [t for _, t in timed if t < low]
    notes = []
    if above:
        verb = "step lies" if len(above) == 1 else "steps lie"
        notes.append(f"{len(above):,} {verb} above the axis, up to {max(above):#.4g} s, drawn as ▲ at its edge.")
    if below:
        verb = "step lies" if len(below) == 1 else "steps lie"
        notes.append(f"{len(below):,} {verb} below the axis, down to {min(below):#.4g} s, drawn as ▼ at its edge.")
    if low > 0:
        notes.append("The axis does not begin at 0.")
    notes += frame.thinned(len(timed))
    title = f"Step times of {name}"
    return Drawn(_svg(title, f"{len(timed)} steps; {' '.join(notes)}", _HEIGHT, *parts), tuple(notes))


def losses(name: str, steps: Steps) -> Drawn | None:
    """The loss over the steps, its losses that are no number marked; None where none is recorded."""
    known = [(i, loss) for i, loss in enumerate(steps.loss) if loss is not None]
    finite = [(i, loss) for i, loss in known if math.isfinite(loss)]
    bad = [i for i, loss in known if not math.isfinite(loss)]
    if not known:
        return None
    values = sorted(loss for _, loss in finite) or [0.0, 1.0]
    low, high = values[0], values[-1]
    # A single spike would leave nothing to see of the rest.
    usual = values[int(0.95 * (len(values) - 1))]
    if high - low > 4 * (usual - low) > 0:
        high = low + 2 * (usual - low)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    frame = _Frame(steps, low - margin, high + margin, "loss", right=16)
    parts = [*frame.axes, *frame.line(finite, "s1", "", marked=len(finite) <= 60)]
    if bad:
        few = [bad[i] for i in thin(bad, MARKS)]
        places = [(frame.x(steps.step[i]), frame.bottom - 7.0, f"step {steps.step[i]}: {steps.loss[i]}") for i in few]
        parts += _marks("✕", places, "bad", 3.5)
    notes = []
    above = [loss for _, loss in finite if loss > high + margin]
    if above:
        notes.append(f"{len(above):,} above the axis, up to {max(above):,.4g}, drawn as ▲ at its edge.")
    if bad:
        first = f"first at step {steps.step[bad[0]]:,}"
        notes.append(f"✕ {len(bad):,} of {len(known):,} losses are no finite number, {first}.")
    notes += frame.thinned(len(finite))
    return Drawn(_svg(f"Loss of {name}", f"{len(known)} steps; {' '.join(notes)}", _HEIGHT, *parts), tuple(notes))


def losses_together(title: str, curves: Sequence[Curve]) -> Drawn:
    """The losses of several runs over their steps; all numbers are finite."""
    left, right, bottom = 62, _WIDTH - 122, _HEIGHT - _BOTTOM
    steps = [x for curve in curves for x in curve.x]
    values = [y for curve in curves for y in curve.y]
    margin = 0.05 * (max(values) - min(values)) or 1.0
    low, high = min(values) - margin, max(values) + margin
    x, y = _linear(min(steps), max(steps), left + 6, right - 6), _linear(low, high, bottom, _TOP)
    along = [(x(value), f"{value:,.0f}") for value in ticks(min(steps), max(steps), 8) if value == int(value)]
    up = ticks(low, high)
    axes = _axes(left, right, along, [(y(a), text) for a, text in zip(up, _labels(up))], "step (as logged)", "loss")
    drawn = [
        el(
            "path",
            d=_polyline((x(curve.x[i]), y(curve.y[i])) for i in thin(curve.y, LINE_POINTS)),
            class_=f"line s{curve.series}",
        )
        for curve in curves
    ]
    ends = [(x(curve.x[-1]), y(curve.y[-1]), curve) for curve in curves]
    description = "; ".join(f"{curve.label}: {curve.y[0]:.4g} to {curve.y[-1]:.4g}" for curve in curves)
    return Drawn(_svg(title, description, _HEIGHT, *axes, *drawn, *_direct(ends, right, bottom)))


def _window(counted: Sequence[float], times: Sequence[float]) -> tuple[float, float]:
    """What the axis of step times shows: what is usual, and no more than a tenth (or 8 spreads) to either side."""
    middle = statistics.median(counted)
    reach = max(0.1 * middle, 8 * 1.4826 * statistics.median(abs(t - middle) for t in counted))
    inside = [t for t in times if abs(t - middle) <= reach] or [middle]
    margin = max(0.02 * middle, 0.08 * (max(inside) - min(inside)))
    return max(0.0, min(inside) - margin), max(inside) + margin


class _Frame:
    """A plot over the steps of a run."""

    def __init__(self, steps: Steps, low: float, high: float, y_title: str, *, right: float) -> None:
        self.steps, self.low, self.high = steps, low, high
        self.left, self.right, self.bottom = 62.0, _WIDTH - right, float(_HEIGHT - _BOTTOM)
        first, last = min(steps.step), max(steps.step)
        pad = max(0.5, 0.01 * (last - first))
        self.x = _linear(first - pad, last + pad, self.left, self.right)
        self.y = _linear(low, high, self.bottom, _TOP)
        along = [value for value in ticks(first, last, 8) if value == int(value)]
        up = ticks(low, high)
        x_at = [(self.x(value), f"{value:,.0f}") for value in along]
        y_at = [(self.y(value), text) for value, text in zip(up, _labels(up))] if up else []
        self.axes = _axes(self.left, self.right, x_at, y_at, "step (as logged)", y_title)

    def thinned(self, number: int) -> list[str]:
        """A word on what is not drawn."""
        if number <= LINE_POINTS:
            return []
        return [f"Of {number:,} steps, the smallest and the largest of each short stretch are drawn."]

    def shades(self) -> list[ET.Element]:
        """The warm-up, and that of restarts."""
        made = []
        widest = (self.right - self.left) / max(1, max(self.steps.step) - min(self.steps.step) + 1)
        for reason, stretch in groupby(range(len(self.steps)), lambda i: self.steps.excluded[i]):
            if reason in SHADED:
                members = list(stretch)
                begin = max(self.left, self.x(self.steps.step[members[0]] - 0.5))
                end = min(self.right, self.x(self.steps.step[members[-1]] + 0.5))
                width = max(end - begin, min(widest, 1))
                top, height = f"{_TOP}", f"{self.bottom - _TOP:.1f}"
                made.append(el("rect", x=f"{begin:.1f}", y=top, width=f"{width:.1f}", height=height, class_="shade"))
                if reason == WARM_UP:
                    made.append(_text(begin + 4, self.bottom - 6, WARM_UP, "tick"))
        return made

    def line(self, points: Sequence[tuple[int, float]], series: str, unit: str, *, marked: bool) -> list[ET.Element]:
        """A line through (index, value), broken where steps between are missing, with the values beyond at the edge."""
        if not points:
            return []
        kept = [points[i] for i in thin([value for _, value in points], LINE_POINTS)]
        position = {index: number for number, (index, _) in enumerate(points)}
        path, before = [], None
        for index, value in kept:
            if not self.low <= value <= self.high:
                before = None
                continue
            missing = 0 if before is None else (index - before) - (position[index] - position[before])
            # Of a thinned line, a step left out here and there breaks nothing.
            joined = before is not None and 2 * missing < index - before
            path.append(f"{'L' if joined else 'M'}{self.x(self.steps.step[index]):.1f} {self.y(value):.1f}")
            before = index
        made = [el("path", d="".join(path), class_=f"line {series}")] if path else []
        if marked and len(kept) <= MARKS:
            inside = [(i, value) for i, value in kept if self.low <= value <= self.high]
            made += _marks("○", [self._place(i, value, "", unit) for i, value in inside], f"mark {series}", 2)
        return made + self._beyond(kept, series, unit)

    def excluded(self, points: Sequence[tuple[int, float]], untimed: Sequence[int]) -> list[ET.Element]:
        """A mark for each step that is left out, after its reason."""
        made = []
        inside = [(i, value) for i, value in points if self.low <= value <= self.high]
        for reason in sorted({self.steps.excluded[i] or "" for i, _ in inside}):
            mine = [(i, value) for i, value in inside if self.steps.excluded[i] == reason]
            few = [mine[i] for i in thin([value for _, value in mine], MARKS)]
            places = [self._place(i, value, reason, "s") for i, value in few]
            made += _marks(glyph(reason), places, "left-out", 3.5)
            if reason not in SHADED and len(few) <= 4:
                made += [_text(x, y - 7, reason, "tick", "middle") for x, y, _ in places]
        named = [self.steps.step[untimed[i]] for i in thin(untimed, MARKS)]
        lost = [(self.x(step), self.bottom - 5, f"step {step}: {NO_TIME}") for step in named]
        made += _marks("✕", lost, "left-out", 3)
        kept = [points[i] for i in thin([value for _, value in points], MARKS)]
        return made + self._beyond(kept, "left-out", "s")

    def _place(self, index: int, value: float, reason: str, unit: str) -> tuple[float, float, str]:
        step = self.steps.step[index]
        told = f"step {step}: {value:#.4g} {unit}".rstrip() + (f" ({reason}, left out)" if reason else "")
        return self.x(step), self.y(value), told

    def _beyond(self, points: Sequence[tuple[int, float]], series: str, unit: str) -> list[ET.Element]:
        made = []
        for kind, edge, side in (
            ("△", _TOP + 2.0, [(i, value) for i, value in points if value > self.high]),
            ("▽", self.bottom - 5, [(i, value) for i, value in points if value < self.low]),
        ):
            few = [side[i] for i in thin([value for _, value in side], MARKS)]
            places = [self._place(i, value, self.steps.excluded[i] or "", unit) for i, value in few]
            made += _marks(kind, [(x, edge, f"{text}, beyond the axis") for x, _, text in places], f"mark {series}", 4)
        return made


# --- bars and intervals -------------------------------------------------------------------------------------

_ROW = 25


def _label_width(rows: Sequence[Bar | Spread]) -> int:
    """Room for the longest label, by what a letter takes on average."""
    return max(230, 7 * min(LABEL, max((len(row.label) for row in rows), default=0)) + 16)


def bars(title: str, rows: Sequence[Bar]) -> Drawn:
    """Horizontal bars of fractions from 0."""
    left = _label_width(rows)
    right, width = left + 400, left + 670
    top = max(0.1, *(max(row.value, row.published or 0) for row in rows))
    x = _linear(0, top, left, right)
    bottom = 8 + _ROW * len(rows)
    parts = []
    for value in ticks(0, top):
        parts += [
            _line(x(value), 6, x(value), bottom, "grid"),
            _text(x(value), bottom + 16, f"{value:.0%}", anchor="middle"),
        ]
    for number, row in enumerate(rows):
        y = 8 + _ROW * number
        label = _text(left - 8, y + 16, shorten(row.label, LABEL), "name", "end")
        label.append(el("title", row.label))
        size = {"x": left, "y": y + 4, "width": f"{x(row.value) - left:.1f}", "height": _ROW - 9}
        parts += [label, el("rect", class_=f"bar s{row.series}", **size)]
        told = f"{row.value:.2%}"
        if row.causal is not None:
            parts.append(_line(x(row.causal), y + 4, x(row.causal), y + _ROW - 5, "causal"))
            told += f", causal {row.causal:.2%}"
        if row.published is not None:
            parts += _marks("◇", [(x(row.published), y + _ROW / 2 - 0.5, "")], "published", 5)
            told += f", published {row.published:.2%}"
        parts.append(_text(max(x(row.value), x(row.published or 0)) + 12, y + 16, told, "value"))
    parts.append(_line(left, 6, left, bottom, "axis"))
    description = "; ".join(f"{row.label}: {row.value:.2%}" for row in rows)
    return Drawn(_svg(title, description, bottom + 24, *parts, width=width))


def ratios(title: str, rows: Sequence[Spread], tolerance: float) -> Drawn:
    """Ratios with their intervals around 100%, and the tolerance as a band."""
    left = _label_width(rows)
    right, width = left + 480, left + 670
    ends = [abs(end - 1) for row in rows for end in (row.ratio, row.low, row.high) if end is not None]
    # Of an interval that is wider than this, the ends say nothing.
    reach = min(0.6, max(tolerance * 1.3, 0.02, *(end for end in ends if math.isfinite(end)))) * 1.05
    x = _linear(1 - reach, 1 + reach, left, right)
    bottom = 8 + _ROW * len(rows)
    band = {"x": f"{x(1 - tolerance):.1f}", "width": f"{x(1 + tolerance) - x(1 - tolerance):.1f}"}
    parts = [el("rect", y=6, height=bottom - 6, class_="shade", **band)]
    at = ticks(1 - reach, 1 + reach, 10)
    for value, text in zip(at, _labels([each * 100 for each in at])):
        parts += [
            _line(x(value), 6, x(value), bottom, "grid"),
            _text(x(value), bottom + 16, f"{text}%", anchor="middle"),
        ]
    parts.append(_line(x(1), 6, x(1), bottom, "axis"))
    for number, row in enumerate(rows):
        y = 8 + _ROW * (number + 0.5)
        label = _text(left - 8, y + 4, shorten(row.label, LABEL), "name", "end")
        label.append(el("title", row.label))
        parts.append(label)
        if row.low is not None and row.high is not None:
            low, high = (min(max(end, 1 - reach), 1 + reach) for end in (row.low, row.high))
            parts.append(_line(x(low), y, x(high), y, "line s0"))
        middle = min(max(row.ratio, 1 - reach), 1 + reach)
        parts += _marks("○", [(x(middle), y, f"{row.label}: {row.ratio:.1%}")], "mark s0", 4)
        parts.append(_text(right + 12, y + 4, f"{row.ratio:.1%} {row.text}", "value"))
    description = "; ".join(f"{row.label}: {row.ratio:.1%} {row.text}" for row in rows)
    clipped = any(end > reach for end in ends)
    notes = ("Values and intervals that reach beyond the axis are cut at its edge.",) if clipped else ()
    return Drawn(_svg(title, description, bottom + 24, *parts, width=width), notes)
