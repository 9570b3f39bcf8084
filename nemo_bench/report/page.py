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
from nemo_bench.report.methods import METHODS
from nemo_bench.report.model import DeviceUse, Numbers, Point, Report, Run
from nemo_bench.report.numbers import counted, tokens_text, unit_name
from nemo_bench.report.profile import StepProfile
from nemo_bench.report.tables import (
    NONE,
    Table,
    changes_table,
    comparison_table,
    integer,
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
    environment.filters["badge"] = _badge
    detailed = _detailed(report)
    return environment.get_template("report.html.j2").render(
        report=report,
        style=Markup((folder / "page.css").read_text(encoding="utf-8")),
        plotly=Markup(plotly_script()),
        outcome=_outcome(report),
        urgent=[point for point in report.points if point.verdict.value not in model.SUCCESSES],
        methods=METHODS,
        budget=tokens_text(report.assumptions.total_tokens),
        points=points_table(report),
        point_numbers={point.name: number for number, point in enumerate(report.points)},
        agreement=_agreement(report.points),
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
        references=[(reference, _reference_table(reference)) for reference in report.references],
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


def _agreement(points: Sequence[Point]) -> Table:
    """Return what makes each judged point comparable with the published run: both values of everything on that list."""
    rows = [
        {
            "point": point.name,
            "must agree": change.key,
            "published": change.before or "",
            "run": change.after or "not known",
            "verdict": "" if change.before == change.after else model.NOT_COMPARABLE,
        }
        for point in points
        for change in point.verdict.must_agree
    ]
    return make_table("What must agree with the published runs", rows)


def _scaling(report: Report) -> Iterator[tuple[dict[str, Any], dict[str, Any], Table]]:
    """Return the figures and the table of each model that was measured on several numbers of GPUs."""
    for name in dict.fromkeys(curve.model for curve in report.scaling):
        curves = sorted((curve for curve in report.scaling if curve.model == name), key=lambda curve: curve.published)
        if not any(len(curve.gpus) > 1 and not curve.published for curve in curves):
            continue
        rows = []
        for gpus in sorted({gpus for curve in curves for gpus in curve.gpus}):
            row = {"GPUs": f"{gpus:,}"}
            for curve in curves:
                at = curve.gpus.index(gpus) if gpus in curve.gpus else None
                row[f"{curve.label}: tokens/s"] = "" if at is None else integer(curve.tokens_per_s[at])
                row[f"{curve.label}: efficiency"] = "" if at is None else percent(curve.efficiency[at], 1)
            rows.append(row)
        yield figures.throughput(curves), figures.efficiency(curves), make_table(f"Scaling of {name}", rows)


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
        "figures": [
            *([figures.step_times(run)] if len(run.steps) else []),
            *([chart] if (chart := figures.profile(run)) else []),
        ],
        "tables": [*run_tables(run)],
    }


def run_tables(run: Run) -> Iterator[Table]:
    """Return the tables of one run: statistics, numbers, ranks, GPUs, profiles."""
    t, n = run.times, run.numbers
    if run.final and t and n:
        peak = f"; peak {significant(n.peak_tflops)} TFLOP/s ({n.peak_source})" if n.peak_tflops else ""
        steps = {"mean of the steps that count": t.mean_s, "median": t.median_s, "last step": t.last_s}
        rows = [{"step time": name, **_number_cells(n.at(time_s), unit_name(run))} for name, time_s in steps.items()]
        yield make_table(f"{counted(t)}{peak}", rows)
        cells = {"5%": t.p5_s, "95%": t.p95_s, "shortest": t.min_s, "longest": t.max_s}
        interval = "{:.4g} to {:.4g}".format(*t.mean.interval) if t.mean else ""
        row = {"quantile (s)": "step time", **{name: significant(value) for name, value in cells.items()}}
        yield make_table("Spread", [{**row, "95% interval of the mean (s)": interval, "drift": f"{t.drift:+.2%}"}])
    if run.ranks:
        slowest = sorted(run.ranks, key=lambda rank: (not rank.straggler, -(rank.slower or 0)))
        rows = [
            {
                "rank": str(rank.rank),
                "slower by": "" if rank.slower is None else f"{rank.slower:+.1%}",
                "this rank": significant(rank.value),
                "median of the others": significant(rank.others),
                "measure": rank.measure,
                "straggler": "▼ straggler" if rank.straggler else "no",
            }
            for rank in slowest[:SHOWN_RANKS]
        ]
        stragglers = sum(rank.straggler for rank in run.ranks)
        title = (
            f"{stragglers or 'No'} straggler{'s'[: stragglers != 1]} among {len(run.ranks):,} ranks; the slowest first"
        )

        yield make_table(title, rows)
    measured = [device for device in run.devices if device.power_w is not None or device.sm_clock_mhz is not None]
    if measured:
        rows = [
            {
                "rank": str(device.rank),
                "host": device.host or "",
                "power (W)": integer(device.power_w),
                "SM clock (MHz)": integer(device.sm_clock_mhz),
                "lowest": integer(device.sm_clock_min_mhz),
                "highest °C": integer(device.temperature_max_c),
                "peak memory (GiB)": significant(device.peak_memory_gib, 3),
                "clocks held back": ", ".join(
                    f"{reason.replace('_', ' ')} {share:.0%}" for reason, share in device.throttled.items()
                ),
            }
            for device in sorted(measured, key=_held_back)[:SHOWN_RANKS]
        ]
        yield make_table("GPUs during the steps, those held back first", rows)
    yield from map(_profile_table, run.profiles)


def _held_back(device: DeviceUse) -> tuple[float, float]:
    """Return a key that sorts GPUs whose clocks were held back, by more than the usual power cap, to the front."""
    shares = (share for reason, share in device.throttled.items() if reason != "sw_power_cap")
    return -max(shares, default=0.0), device.sm_clock_mhz or 0.0


def _number_cells(n: Numbers, unit: str) -> dict[str, str]:
    return {
        "s": significant(n.step_time_s),
        "tokens/s": integer(n.tokens_per_s),
        f"tokens/s a {unit}": integer(n.tokens_per_s_per_gpu),
        f"TFLOP/s a {unit}": significant(n.tflops_per_gpu),
        "causal": significant(n.tflops_per_gpu_causal),
        "MFU": percent(n.mfu),
        "causal MFU": percent(n.mfu_causal),
        f"days to {tokens_text(n.total_tokens)}": f"{n.days_to_train:,.2f}",
    }


def _profile_table(profile: StepProfile) -> Table:
    rows = [
        {
            "class": item.name,
            "ms a step": significant(item.ms),
            "of the step": percent(item.share, 1),
            "sum (ms)": significant(item.total_ms),
            "kernels": integer(item.count),
            "most of it (ms)": ", ".join(f"{kernel.name} {significant(kernel.total_ms)}" for kernel in item.top[:2]),
        }
        for item in profile.classes
    ]
    for name, ms in (("idle", profile.idle_ms), ("step", profile.step_ms)):
        share = percent(ms / profile.step_ms, 1)
        rows.append({**dict.fromkeys(rows[0], ""), "class": name, "ms a step": significant(ms), "of the step": share})
    notes = [note for note in (step_profile.communication(profile), *profile.notes) if note]
    return make_table("; ".join([f"Profile of {step_profile.title(profile)}", *notes]), rows)


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


def _reference_table(reference: Any) -> Table:
    rows = [
        {
            "point": f"{point.model} {point.precision} {point.gpus}gpu",
            "GPU": point.gpu,
            "GBS": str(point.global_batch_size),
            "step time (s)": significant(point.step_time_s),
            "tokens/s": integer(point.tokens_per_s),
            "from the step time": integer(point.tokens_per_s_from_step_time),
            "MFU": percent(point.mfu),
            "days to 1T": significant(point.days_to_1t_tokens),
        }
        for point in reference.points
    ]
    return make_table(
        "As published; verdicts rest on the step time", rows, ("; ".join(point.notes) for point in reference.points)
    )
