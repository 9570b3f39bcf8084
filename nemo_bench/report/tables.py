"""The report as tables, the same in the terminal, in Markdown and on the page; and as CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nemo_bench.report import model
from nemo_bench.report.model import Attribution, Change, Comparison, Point, Report, Run, Term

_NUMERIC = re.compile(r"[-+±\d.,%/\u2013]*(?: (?:to|±) [-+\d.,%e]+(?: \?)?)?")


@dataclass(frozen=True)
class Table:
    """A table of text, most important column first: a narrow terminal shows as many as fit."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]  # a cell a column; "" if nothing is known
    notes: tuple[str, ...]  # a line about each row, "" for none
    words: tuple[bool, ...]  # which columns hold words, which are aligned to the left, rather than numbers


def make_table(title: str, rows: Sequence[dict[str, str]], notes: Iterable[str] = ()) -> Table:
    """Return the rows (column -> cell) as a table of the columns that any of them fills."""
    columns = tuple(name for name in (rows[0] if rows else ()) if any(row[name] for row in rows))
    words = (not all(is_numeric(row[name]) for row in rows) for name in columns[1:])
    cells = tuple(tuple(row[name] for name in columns) for row in rows)
    return Table(title, columns, cells, tuple(notes), (True, *words))


def is_numeric(cell: object) -> bool:
    """Return whether a cell holds a number, a range of numbers or nothing."""
    return _NUMERIC.fullmatch(str(cell)) is not None


def significant(value: float | None, digits: int = 4) -> str:
    """Return a number of that many significant digits, whole and with separators from 1000 on."""
    return "" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def percent(value: float | None, decimals: int = 2) -> str:
    """Return a fraction as a percentage."""
    return "" if value is None else f"{value:.{decimals}%}"


def tokens_text(number: float) -> str:
    """Return 15e12 as 15T."""
    return f"{number / 1e12:g}T"


def points_table(report: Report) -> Table:
    """Return a row a point with its verdict; the verdict's reason and the differences as notes."""
    rows, notes = [], []
    for point in report.points:
        n, reference, judged = point.numbers, point.reference, point.verdict
        published = judged.value != model.NO_REFERENCE
        notes.append("; ".join([judged.line, *judged.remarks] if published else judged.remarks))
        margin = f" ± {point.step_time.margin:.2g}" if point.step_time else ""
        if point.step_time and point.step_time.margin > point.step_time.value / 2:
            margin += " ?"
        row = {
            "point": point.name,
            "verdict": judged.text if published else "",
            "step time (s)": significant(n.step_time_s) + margin if n else "",
            "of published": percent(judged.ratio, 1),
            "tokens/s": significant(n.tokens_per_s) if n else "",
            "MFU": percent(n.mfu) if n else "",
            f"days to {tokens_text(report.total_tokens)}": f"{n.days_to_train:,.2f}" if n else "",
            "published (s)": significant(reference.step_time_s) if reference else "",
            "estimate (s)": significant(point.estimate_s),
            "median (s)": significant(point.median_s),
            "last (s)": significant(point.last_s),
            "runs": f"{len(point.final_runs)}/{len(point.runs)}",
            "tokens/s a GPU": significant(n.tokens_per_s_per_gpu) if n else "",
            "TFLOP/s a GPU": significant(n.tflops_per_gpu) if n else "",
            "causal": percent(n.mfu_causal) if n else "",
            "GPU": point.gpu or "",
            "GBS": str(point.global_batch_size or ""),
            "layout": " ".join(f"{name}{size}" for name, size in point.layout.items()),
        }
        rows.append(row)
    return make_table("Points", rows, notes)


def attribution_table(way: Attribution) -> Table:
    """Return a row a term and the step, in ms; the way in a line, and what else is known, as notes."""
    rows = []
    for term in (*way.terms, Term("step", way.expected_s, way.measured_s, "")):
        times_s = (term.expected_s, term.measured_s)
        expected, measured = ("" if time_s is None else f"{1e3 * time_s:,.1f}" for time_s in times_s)
        more = f"{1e3 * term.more_s:+,.1f}" if measured else ""
        cells = (term.name, expected, measured, more, term.evidence)
        rows.append(dict(zip(("term (ms)", "expected", "measured", "more", "rests on"), cells)))
    notes = [""] * (len(way.terms) - 1) + ["; ".join(way.findings), way.summary]
    return make_table(f"{way.point}: from {way.source} to measured", rows, notes)


def runs_table(runs: Sequence[Run]) -> Table:
    """Return a row a run, without times and losses of those that are not results; remarks as notes."""
    rows = []
    for run in runs:
        t = run.times if run.final else None
        left_out = {"warm-up": t.warmup_steps, **t.excluded} if t else {}
        row = {
            "run": run.name,
            "state": run.state if run.final else f"{run.state}, no result",
            "mean (s)": significant(t.mean_s) if t else "",
            "median (s)": significant(t.median_s) if t else "",
            "last (s)": significant(t.last_s) if t else "",
            "5% to 95% (s)": f"{significant(t.p5_s)} to {significant(t.p95_s)}" if t else "",
            "steps": f"{t.counted:,}" if t else "",
            "left out": ", ".join(f"{number} {reason}" for reason, number in left_out.items() if number),
            "loss": loss_text(run) if run.final else "",
        }
        rows.append(row)
    return make_table("Runs", rows, ("; ".join(filter(None, (run.why_not_final, *run.warnings))) for run in runs))


def loss_text(run: Run) -> str:
    """Return the first and the last loss; "" if they are not known."""
    return "" if run.first_loss is None or run.last_loss is None else f"{run.first_loss:.3f} to {run.last_loss:.3f}"


def comparison_table(comparisons: Sequence[Comparison]) -> Table:
    """Return a row a point that the baseline has too; how it was judged as notes."""
    rows = [
        {
            "point": item.point,
            "verdict": item.verdict + (", REGRESSION" if item.regression else ""),
            "of baseline": percent(item.ratio, 1),
            "95% interval": " to ".join(percent(end, 1) for end in item.interval or ()),
            "baseline's point": item.baseline,
        }
        for item in comparisons
    ]
    return make_table("Against the baseline", rows, (item.why for item in comparisons))


def changes_table(comparisons: Sequence[Comparison]) -> Table:
    """Return what changed since the baseline, with the points at which each change was made."""
    points: dict[tuple[str, Change], list[str]] = {}
    for item in comparisons:
        for kind, changes in item.changes.items():
            for change in changes:
                points.setdefault((kind, change), []).append(item.point)
    rows = [
        {
            "what changed": change.key,
            "baseline": "(none)" if change.before is None else change.before,
            "now": "(none)" if change.after is None else change.after,
            "kind": kind,
            "at": "all points" if len(names) == len(comparisons) > 1 else ", ".join(names),
        }
        for (kind, change), names in points.items()
    ]
    return make_table("What changed since the baseline", rows)


def markdown(report: Report) -> str:
    """Return the report for a wiki or an issue."""
    text = f"# Benchmark report\n\n{report.generated_at}. Overall: **{report.verdict}**.\n"
    compared = (comparison_table(report.comparisons), changes_table(report.comparisons))
    ways = map(attribution_table, report.attributions)
    text += "".join(map(_markdown_table, (points_table(report), *compared, *ways, runs_table(report.runs))))
    for reference in report.references:
        text += f"\nPublished numbers: {_escaped(f'{reference.title}. {reference.source}. {reference.hardware}.')}\n"
    for title, lines in (("Machine checks", report.machine_checks), ("Warnings", report.warnings)):
        if lines:
            text += f"\n## {title}\n\n" + "".join(f"- {_escaped(line)}\n" for line in lines)
    return text


def _markdown_table(table: Table) -> str:
    if not table.rows:
        return ""
    rule = ["---" if words else "---:" for words in table.words]
    rows = [table.columns, rule, *(map(_escaped, row) for row in table.rows)]
    lines = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    notes = [f"- **{_escaped(row[0])}**: {_escaped(note)}\n" for row, note in zip(table.rows, table.notes) if note]
    return f"\n## {table.title}\n\n{lines}" + "".join(["\n", *notes] if notes else [])


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;").replace("*", "\\*")


def csv_text(report: Report) -> str:
    """Return a line a run, with its point's verdict; results are empty for a run that is not final."""
    point_of = {name: point for point in report.points for name in point.runs}
    rows = [_csv_row(run, point_of.get(run.name)) for run in report.runs]
    out = io.StringIO()
    writer = csv.DictWriter(out, [*dict.fromkeys(key for row in rows for key in row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _csv_row(run: Run, point: Point | None) -> dict[str, object]:
    row: dict[str, object] = {"run": run.name, "point": point.name if point else None, "verdict": None}
    if point and (run.final or not point.final_runs):
        judged = point.verdict
        row |= {"verdict": judged.text, "why": judged.why, "differences": "; ".join(judged.differences)}
        row |= {"remarks": "; ".join(judged.remarks), "ratio_of_published": judged.ratio, "statistic": judged.statistic}
        if point.reference:
            row |= {"published_step_time_s": point.reference.step_time_s, "reference": point.reference.reference}
    row |= {"final": run.final} | _plain_fields(run) | run.layout
    if not run.final:
        return {**row, "first_loss": None, "last_loss": None}
    return row | _plain_fields(run.times, "step_time_") | _plain_fields(run.numbers)


def _plain_fields(part: object, prefix: str = "") -> dict[str, object]:
    """Return the fields that hold a text or a number, or could."""
    plain, parts = (str, int, float, type(None)), ("name", "times", "numbers", "architecture")
    items = vars(part).items() if part else ()
    return {f"{prefix}{name}": value for name, value in items if name not in parts and isinstance(value, plain)}
