"""The report as one HTML page that needs nothing else: `report.html.j2` with Plotly's script in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from nemo_bench.report import figures, model
from nemo_bench.report import profile as step_profile
from nemo_bench.report.comparison import KINDS, recorded
from nemo_bench.report.model import DeviceUse, Point, RankTimes, Report, Run, ScalingCurve
from nemo_bench.report.numbers import counted, tokens_text, unit_name
from nemo_bench.report.tables import (
    NONE,
    Table,
    changes_table,
    comparison_table,
    integer,
    is_numeric,
    make_table,
    percent,
    points_table,
    runs_table,
    significant,
)

# Of more runs than this, those that need a look have a part of their own; the others are a row of the table.
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
    "completed": ("✓", "good"),
}


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
    environment.tests["numeric"] = lambda value: is_numeric(str(value))
    detailed = _detailed(report)
    return environment.get_template("report.html.j2").render(
        report=report,
        style=Markup((folder / "page.css").read_text(encoding="utf-8")),
        plotly=Markup(plotly_script()),
        outcome=_outcome(report),
        urgent=[point for point in report.points if point.verdict.value not in model.SUCCESSES],
        budget=tokens_text(report.assumptions.total_tokens),
        points=points_table(report),
        point_numbers={point.name: number for number, point in enumerate(report.points)},
        mfu=figures.mfu(report.points),
        scaling=[*_scaling(report)],
        ratios=figures.ratios(report.comparisons, report.assumptions.tolerance),
        comparison=comparison_table(report.comparisons),
        changes=changes_table(report.comparisons),
        series=[
            chart
            for draw in (figures.all_step_times, figures.all_losses)
            if (chart := draw(run for _, run in detailed[:DRAWN_RUNS]))
        ],
        run_sections=_run_sections(report, detailed),
        differences=_differences(report.runs),
        shared=_shared(report.runs),
        drawn_runs=DRAWN_RUNS,
    )


def _printable(value: object) -> object:
    """Return text without what HTML forbids: names of files and lines of logs may hold any byte."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return value.encode("utf-8", "replace").decode().translate(_CONTROL_CHARACTERS)


_CONTROL_CHARACTERS = {code: "\ufffd" for code in range(32) if chr(code) not in "\t\n\r"}


def _badge(text: str) -> tuple[str, str]:
    """Return the sign and the colour class of a verdict or state, whatever follows it after a comma."""
    special = {"REGRESSION": ("✗", "bad"), "no result": ("◌", "warn")}
    first, _, last = text.partition(", ")
    return special.get(last or first) or BADGES.get(first, (NONE, "none"))


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
    """Return the curves of each model that was measured on several numbers of GPUs, the measured ones first."""
    for name in dict.fromkeys(curve.model for curve in report.scaling):
        curves = sorted((curve for curve in report.scaling if curve.model == name), key=lambda curve: curve.published)
        if any(len(curve.gpus) > 1 and not curve.published for curve in curves):
            yield curves


# --- runs ---------------------------------------------------------------------------------------------------


def _detailed(report: Report) -> list[tuple[int, Run]]:
    """Return the runs that get a part of their own, with their numbers in the report, in the report's order."""
    verdicts = {name: point.verdict.value for point in report.points for name in point.runs}
    passed = (model.PASS, model.FASTER)
    order = sorted(enumerate(report.runs), key=lambda item: item[1].final and verdicts.get(item[1].name) in passed)
    return sorted(order[:DETAILED_RUNS], key=lambda item: item[0])


def _run_sections(report: Report, detailed: Sequence[tuple[int, Run]]) -> list[dict[str, Any]]:
    sections = [("runs", "Runs", report.runs, detailed, report.points)]
    if report.baseline_runs:
        runs = report.baseline_runs
        sections.append(
            ("baseline-runs", "Runs of the baseline", runs, [*enumerate(runs)][:DETAILED_RUNS], report.baseline_points)
        )
    return [
        {
            "id": anchor,
            "title": title,
            "table": runs_table(runs),
            "links": [f"{anchor}-{number}" if number in dict(shown) else "" for number in range(len(runs))],
            "parts": [{"id": f"{anchor}-{number}", **_run_part(run, points)} for number, run in shown],
            "open": len(runs) <= OPEN_RUNS,
        }
        for anchor, title, runs, shown, points in sections
        if runs
    ]


def _run_part(run: Run, points: Sequence[Point]) -> dict[str, Any]:
    return {
        "run": run,
        "point": next((point.name for point in points if run.name in point.runs), "in no point"),
        "figure": figures.step_times(run) if len(run.steps) else None,
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


_FILTERS = {
    "badge": _badge,
    "counted": counted,
    "communication": lambda profile: step_profile.communication(profile) or "",
    "efficiency": figures.efficiency,
    "held_back": _held_back,
    "integer": integer,
    "percent": percent,
    "significant": significant,
    "slowest": _slowest,
    "throttling": _throttling,
    "throughput": figures.throughput,
    "title_of": step_profile.title,
    "unit_name": unit_name,
}


# --- configurations and environments ------------------------------------------------------------------------


def _recorded(runs: Sequence[Run]) -> list[tuple[str, dict[tuple[str, str], str]]]:
    """Return what each run folder recorded: (kind, key) -> value."""
    return [
        (run.name, {(kind, key): value for kind, values in recorded(run).items() for key, value in values.items()})
        for run in runs
        if run.source == "run folder"
    ]


def _differences(runs: Sequence[Run]) -> Table:
    """Return a row for each value of what the runs do not share."""
    known = _recorded(runs)
    rows = []
    for kind, key in sorted({key for _, values in known for key in values}, key=lambda key: (KINDS.index(key[0]), key)):
        names: dict[str | None, list[str]] = {}
        for name, values in known:
            names.setdefault(values.get((kind, key)), []).append(name)
        if len(names) == 1:
            continue
        for value, having in [*names.items()][:SHOWN_VALUES]:
            more = f" and {len(having) - SHOWN_VALUES} more" if len(having) > SHOWN_VALUES else ""
            shown = ", ".join(having[:SHOWN_VALUES]) + more
            rows.append({"key": key, "value": "(none)" if value is None else value, "kind": kind, "runs": shown})
        if len(names) > SHOWN_VALUES:
            rows.append({"key": key, "value": f"{len(names) - SHOWN_VALUES} more values", "kind": kind, "runs": ""})
    return make_table("What differs between the runs", rows)


def _shared(runs: Sequence[Run]) -> list[Table]:
    """Return what all recorded runs have in common, a table a kind."""
    known = _recorded(runs)
    common = set.intersection(*({*values.items()} for _, values in known)) if known else set()
    return [
        make_table(
            f"{kind}, the same in {len(known)} recorded runs" if len(known) > 1 else kind,
            [{"key": key, "value": value} for (its_kind, key), value in sorted(common) if its_kind == kind],
        )
        for kind in KINDS
    ]
