"""Configurations and environments on the report's page: what changed, what differs between runs, what all share."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence

from nemo_bench.report.comparison import KINDS, recorded
from nemo_bench.report.markup import Child, el
from nemo_bench.report.model import Comparison, Report, Run
from nemo_bench.report.page_parts import NONE, Column, named, plural, row, section, table

# Of a thing with more values than this, the first are shown.
SHOWN_VALUES = 6
# With this many runs or more, a thing that is another one in each (a port, a job's number) is said so in a line.
MANY_RUNS = 4


def changes(comparisons: Sequence[Comparison]) -> ET.Element:
    """What changed between the baseline and the runs, with the points that each change is found at."""
    found: dict[tuple[str, str, str | None, str | None], list[str]] = {}
    for each in comparisons:
        for kind in KINDS:
            for change in getattr(each, kind):
                found.setdefault((kind, change.key, change.before, change.after), []).append(each.point)
    if not found:
        return el("p", "Nothing changed in what was recorded of configuration, packages, environment and hardware.")
    columns = (Column("what changed"), Column("kind"), Column("baseline"), Column("now"), Column("at"))
    rows = [
        row(columns, [key, kind, _value(before), _value(after), _at(points, len(comparisons), "points")])
        for (kind, key, before, after), points in found.items()
    ]
    return table("What changed since the baseline", columns, [el("tbody", rows)], "wordy")


def _value(text: str | None) -> Child:
    return el("span", "(none)", class_="muted") if text is None else el("code", text)


def _at(names: Sequence[str], of: int, what: str) -> str:
    return f"all {of} {what}" if len(names) == of > 1 else named(list(names))


def _recorded(report: Report) -> list[tuple[Run, dict[str, dict[str, str]]]]:
    return [(run, recorded(run)) for run in report.runs if run.source == "run folder"]


def differences(report: Report) -> ET.Element | None:
    """Where the runs of this report differ from each other."""
    known = _recorded(report)
    if len(report.runs) < 2:
        return None
    bare = len(report.runs) - len(known)
    said = f"{plural(bare, 'bare log')} {'says' if bare == 1 else 'say'} nothing of this." if bare else None
    columns = (Column("what differs"), Column("value"), Column("runs"))
    bodies = []
    for kind in KINDS:
        rows = []
        for key in sorted({key for _, kinds in known for key in kinds[kind]}):
            values: dict[str | None, list[str]] = {}
            for run, kinds in known:
                values.setdefault(kinds[kind].get(key), []).append(run.name)
            if len(values) > 1:
                rows += _differing(key, values, len(known))
        if rows:
            head = el("tr", el("th", kind, colspan=len(columns), scope="rowgroup"), class_="kind")
            bodies.append(el("tbody", head, rows))
    text = said if bodies else f"No difference in what is recorded. {said or ''}".strip()
    if not known:
        text = "All runs are bare logs: they do not say what they were configured with."
    made = table("Recorded differences between runs", columns, bodies, "wordy") if bodies else None
    return section("differences", "Configuration differences between runs", el("p", text) if text else None, made)


def _differing(key: str, values: dict[str | None, list[str]], runs: int) -> list[ET.Element]:
    if len(values) == runs >= MANY_RUNS:
        some = ", ".join(NONE if value is None else value for value in list(values)[:2])
        return [el("tr", el("th", key, scope="row"), el("td", f"another one in each run: {some}, …"), el("td", NONE))]
    shown = list(values.items())[:SHOWN_VALUES]
    if len(values) > SHOWN_VALUES:
        rest = [name for names in list(values.values())[SHOWN_VALUES:] for name in names]
        shown.append((f"{len(values) - SHOWN_VALUES} more values", rest))
    first = el("th", key, scope="row", rowspan=len(shown))
    return [
        el("tr", first if number == 0 else None, el("td", _value(value)), el("td", named(names)))
        for number, (value, names) in enumerate(shown)
    ]


def environment(report: Report) -> ET.Element | None:
    """What all recorded runs share, in tables that open at a click but for the software and the hardware."""
    known = _recorded(report)
    if not known:
        return None
    parts: list[Child] = []
    for kind in ("packages", "hardware", "environment", "configuration"):
        first = known[0][1][kind]
        shared = {key: value for key, value in first.items() if all(each[kind].get(key) == value for _, each in known)}
        others = len({key for _, kinds in known for key in kinds[kind]}) - len(shared)
        columns = (Column(kind), Column("value"))
        rows = [row(columns, [key, el("code", value)]) for key, value in sorted(shared.items())]
        caption = f"{kind}, the same in {plural(len(known), 'recorded run')}" if len(known) > 1 else kind
        if others:
            caption += f"; {others} more differ (see above)"
        made = table(caption, columns, [el("tbody", rows)], "wordy") if rows else None
        if made is not None and kind in ("environment", "configuration"):
            made = el("details", el("summary", f"{caption}: {plural(len(rows), 'entry', 'entries')}"), made)
        parts.append(made)
    return section("environment", "Environment", parts)
