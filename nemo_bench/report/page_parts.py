"""What the sections of the report's page are made of: tables, badges, and the forms of numbers."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass

from nemo_bench.report import model
from nemo_bench.report.markup import Child, el
from nemo_bench.report.plots import Drawn

NONE = "\u2013"  # a dash: not known, or does not apply

REGRESSION = "REGRESSION"  # beside the verdicts of the model: slower than the noise and the tolerance explain

# Words, a sign and a colour class: nobody has to tell a verdict by its colour.
_BADGES = {
    model.PASS: ("✓", "good"),
    model.FAIL: ("✗", "bad"),
    model.FASTER: ("▲", "info"),
    model.INCOMPLETE: ("◌", "warn"),
    model.INVALID: ("✗", "bad"),
    model.NOT_COMPARABLE: ("≠", "warn"),
    model.NO_REFERENCE: (NONE, "none"),
    model.SLOWER: ("▼", "warn"),
    model.QUICKER: ("▲", "info"),
    model.NO_DIFFERENCE: ("=", "good"),
    model.UNDECIDED: ("?", "none"),
    REGRESSION: ("✗", "bad"),
}


@dataclass(frozen=True)
class Column:
    """A column: `number` aligns it to the right; `unit` stands below its name."""

    name: str
    unit: str = ""
    number: bool = False


def badge(verdict: str, text: str | None = None) -> ET.Element:
    """A verdict as a sign and words."""
    sign, class_ = _BADGES.get(verdict, ("", "none"))
    return el("span", el("span", sign, aria_hidden="true"), f"\u00a0{text or verdict}", class_=f"badge {class_}")


def table(caption: str, columns: Sequence[Column], bodies: Sequence[ET.Element], class_: str = "") -> ET.Element:
    """A table in a container that scrolls sideways by itself."""
    head = [el("th", _head(each), scope="col", class_="number" if each.number else None) for each in columns]
    return el(
        "div",
        el("table", el("caption", caption), el("thead", el("tr", head)), bodies, class_=class_ or None),
        class_="scroll",
        tabindex="0",
        role="region",
        aria_label=caption,
    )


def _head(column: Column) -> Child:
    return [column.name, el("br"), el("span", column.unit, class_="unit")] if column.unit else column.name


def row(columns: Sequence[Column], cells: Sequence[Child], **attributes: object) -> ET.Element:
    """A row of a table; its first cell is its heading."""
    made = []
    for number, (column, cell) in enumerate(zip(columns, cells)):
        class_ = "number" if column.number else None
        made.append(el("td", cell, class_=class_) if number else el("th", cell, scope="row", class_=class_))
    return el("tr", made, **attributes)


def facts(pairs: Sequence[tuple[str, Child]], long: Sequence[tuple[str, Child]] = ()) -> ET.Element:
    """A list of names and values, the `long` ones on a line each; those without a value are left out."""
    kinds = ((pairs, None), (long, "long"))
    shown = [
        (name, value, class_) for kind, class_ in kinds for name, value in kind if value is not None and value != ""
    ]
    return el("dl", [el("div", el("dt", name), el("dd", value), class_=class_) for name, value, class_ in shown])


def figure(drawn: Drawn, heading: str, *notes: Child) -> ET.Element:
    """A plot with its heading above, and below it what has to be said about it."""
    return el(
        "figure",
        el("p", heading, class_="heading"),
        drawn.svg,
        el("figcaption", [[note, " "] for note in (*notes, *drawn.notes) if note]),
    )


def section(anchor: str, heading: str, *children: Child) -> ET.Element:
    return el("section", el("h2", heading), children, id=anchor)


def bullets(texts: Sequence[str], class_: str | None = None) -> ET.Element | None:
    return el("ul", [el("li", text) for text in texts], class_=class_) if texts else None


def moment(text: str | None) -> Child:
    """2026-11-22T16:44:13Z for people."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d):\d\d(?:\.\d+)?Z", text)
    return el("time", f"{match[1]} {match[2]} UTC", datetime=text) if match else text


def four(value: float | None) -> str:
    """Four significant digits, as in the terminal, with their zeros, so that a column's points stand in line."""
    if value is None:
        return NONE
    if not math.isfinite(value):
        return str(value)
    return whole(value) if abs(value) >= 1000 else f"{value:#.4g}"


def whole(value: float | None) -> str:
    return NONE if value is None else f"{value:,.0f}"


def percent(value: float | None, decimals: int = 2) -> str:
    return NONE if value is None else f"{value:.{decimals}%}"


def decimals(value: float | None) -> str:
    return NONE if value is None else f"{value:,.2f}"


def plural(number: int, name: str, names: str | None = None) -> str:
    """1 run, 2 runs."""
    return f"{number:,} {name if number == 1 else names or name + 's'}"


def named(names: Sequence[str], most: int = 6) -> str:
    """Names in a line, the first of many."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
