"""The report as one HTML page that needs nothing else: `report.html.j2` with Plotly's script in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from nemo_bench.report import figures, model, tables
from nemo_bench.report import profile as step_profile
from nemo_bench.report.comparison import KINDS, recorded
from nemo_bench.report.model import DeviceUse, Point, RankTimes, Report, Run, ScalingCurve
from nemo_bench.report.numbers import counted, tokens_text, unit_name

# Of more runs than this, the others are a row of the table.
DETAILED_RUNS = 60
DRAWN_RUNS = 24  # in one figure
OPEN_RUNS = 4
SHOWN_RANKS = 24
SHOWN_VALUES = 6

# A sign and a colour class: nobody has to tell a verdict by its colour.
BADGES = {
    model.PASS: ("✓", "good"),
    model.FAIL: ("✗", "bad"),
    model.INVALID: ("✗", "bad"),
    model.FASTER: ("▲", "info"),
    model.UNDECIDED: ("?", "warn"),
    model.INCOMPLETE: ("◌", "warn"),
    model.NOT_COMPARABLE: ("≠", "warn"),
    model.SLOWER: ("▼", "warn"),
    model.NO_DIFFERENCE: ("=", "good"),
    "REGRESSION": ("✗", "bad"),
    "completed": ("✓", "good"),
    "no result": ("◌", "warn"),
}
_CONTROL_CHARACTERS = {code: "\ufffd" for code in range(32) if chr(code) not in "\t\n\r"}


@cache
def plotly_script() -> str:
    """Return Plotly's script, which every page carries."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def render(report: Report) -> str:
    """Return the page as the text of an HTML file in UTF-8."""
    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        finalize=_printable,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= _FILTERS
    environment.tests["numeric"] = tables.is_numeric
    sections = [_section("runs", "Runs", report.runs, report.points)]
    if report.baseline_runs:
        title = "Runs of the baseline"
        sections.append(_section("baseline-runs", title, report.baseline_runs, report.baseline_points))
    return environment.get_template("report.html.j2").render(
        report=report,
        style=Markup((folder / "page.css").read_text(encoding="utf-8")),
        plotly=Markup(plotly_script()),
        outcome=_outcome(report),
        urgent=[point for point in report.points if point.verdict.value not in model.SUCCESSES],
        budget=tokens_text(report.total_tokens),
        points=tables.points_table(report),
        point_numbers={point.name: number for number, point in enumerate(report.points)},
        mfu=figures.mfu(report.points),
        scaling=[*_scaling(report)],
        ways=[(way, tables.attribution_table(way)) for way in report.attributions],
        comparison=tables.comparison_table(report.comparisons),
        changes=tables.changes_table(report.comparisons),
        series=figures.series([part["run"] for part in sections[0]["parts"][:DRAWN_RUNS]]),
        run_sections=sections,
        records=[*_records(report.runs)],
        drawn_runs=DRAWN_RUNS,
    )


def _printable(value: object) -> object:
    """Return text without what HTML forbids: names of files and lines of logs may hold any byte."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return value.encode("utf-8", "replace").decode().translate(_CONTROL_CHARACTERS)


def _badge(text: str) -> tuple[str, str]:
    """Return the sign and the colour class of a verdict or state, which may be "PASS, 2 differences"."""
    first, _, last = text.partition(", ")
    return BADGES.get(last) or BADGES.get(first, (tables.NONE, "none"))


def _outcome(report: Report) -> str:
    """Return the outcome in words: how many points have each verdict."""
    count = Counter(point.verdict.value for point in report.points)
    unpublished = count.pop(model.NO_REFERENCE, 0)
    parts = [", ".join(f"{number} {verdict}" for verdict, number in count.most_common())] if count else []
    if unpublished:
        parts.append(f"nothing is published for {unpublished}{' more' if parts else ''} of {len(report.points)} points")
    if not report.points:
        parts.append("nothing was judged: no run names its model, precision and number of GPUs")
    if report.comparisons:
        regressed = sum(item.regression for item in report.comparisons)
        parts.append(f"{regressed or 'no'} of {len(report.comparisons)} points regressed against the baseline")
    return "; ".join(parts)


def _scaling(report: Report) -> Iterator[list[ScalingCurve]]:
    """Yield the curves of each model that was measured on several numbers of GPUs, the measured ones first."""
    for name in dict.fromkeys(curve.model for curve in report.scaling):
        curves = sorted((curve for curve in report.scaling if curve.model == name), key=lambda curve: curve.published)
        if any(len(curve.gpus) > 1 and not curve.published for curve in curves):
            yield curves


def _section(anchor: str, title: str, runs: Sequence[Run], points: Sequence[Point]) -> dict[str, Any]:
    """Return the section of these runs: a table, and a part for each of the first runs."""
    point_of = {name: point for point in points for name in point.runs}

    parts = []
    for number, run in enumerate(runs[:DETAILED_RUNS]):
        point = point_of.get(run.name)
        figure = figures.step_times(run) if len(run.steps) else None
        name = point.name if point else "in no point"
        parts.append({"id": f"{anchor}-{number}", "run": run, "point": name, "figure": figure})
    return {
        "id": anchor,
        "title": title,
        "table": tables.runs_table(runs),
        "links": [f"{anchor}-{number}" if number < len(parts) else "" for number in range(len(runs))],
        "parts": parts,
        "open": len(runs) <= OPEN_RUNS,
    }


def _slowest(ranks: Sequence[RankTimes]) -> list[RankTimes]:
    return sorted(ranks, key=lambda rank: (not rank.straggler, -(rank.slower or 0)))[:SHOWN_RANKS]


def _held_back(devices: Sequence[DeviceUse]) -> list[DeviceUse]:
    """Return the GPUs that were measured: first those whose clocks more than the usual power cap held back."""

    def key(device: DeviceUse) -> tuple[float, float]:
        shares = (share for reason, share in device.throttled.items() if reason != "sw_power_cap")
        return -max(shares, default=0.0), device.sm_clock_mhz or 0.0

    measured = (device for device in devices if device.power_w is not None or device.sm_clock_mhz is not None)
    return sorted(measured, key=key)[:SHOWN_RANKS]


def _throttling(shares: dict[str, float]) -> str:
    return ", ".join(f"{reason.replace('_', ' ')} {share:.0%}" for reason, share in shares.items())


def _records(runs: Sequence[Run]) -> Iterator[tables.Table]:
    """Yield what the run folders record, a table a kind and a row a value, first what differs between them."""
    records = {run.name: recorded(run) for run in runs if run.source == "run folder"}
    for kind in KINDS:
        values: dict[str, dict[str, list[str]]] = {}
        for name, record in records.items():
            for key, value in record[kind].items():
                values.setdefault(key, {}).setdefault(value, []).append(name)
        rows = [
            {"key": key, "value": value, "runs": _names(names, len(records))}
            for key, by_value in sorted(values.items())
            for value, names in [*by_value.items()][:SHOWN_VALUES]
        ]
        yield tables.make_table(kind, sorted(rows, key=lambda row: row["runs"] == "all"))


def _names(names: Sequence[str], all_runs: int) -> str:
    more = f" and {len(names) - SHOWN_VALUES} more" if len(names) > SHOWN_VALUES else ""
    return "all" if len(names) == all_runs else ", ".join(names[:SHOWN_VALUES]) + more


_FILTERS = {
    "badge": _badge,
    "counted": counted,
    "communication": lambda profile: step_profile.communication(profile) or "",
    "held_back": _held_back,
    "integer": tables.integer,
    "percent": tables.percent,
    "scaling": figures.scaling,
    "significant": tables.significant,
    "slowest": _slowest,
    "throttling": _throttling,
    "title_of": step_profile.title,
    "unit_name": unit_name,
    "waterfall": figures.waterfall,
}
