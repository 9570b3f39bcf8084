"""The report as tables, the same in the terminal, in Markdown and on the page; and as CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nemo_bench.report import model
from nemo_bench.report.attribution import Attribution
from nemo_bench.report.comparison import KINDS
from nemo_bench.report.model import Change, Comparison, Point, Report, Run, bubble_of
from nemo_bench.report.numbers import tokens_text

NONE = "\u2013"  # a dash: not known, or does not apply
_NUMERIC = re.compile(r"[-+±\d.,%/\u2013]*(?: (?:to|±) [-+\d.,%e]+(?: \?)?)?")


@dataclass(frozen=True)
class Table:
    """A table of text, most important column first: a narrow terminal shows as many as fit."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]  # a cell a column; "" if nothing is known
    notes: tuple[str, ...]  # a line about each row, "" for none; empty if no row has one
    words: tuple[bool, ...]  # which columns hold words, which are aligned to the left, rather than numbers


def make_table(title: str, rows: Sequence[dict[str, str]], notes: Iterable[str] = ()) -> Table:
    """Return the rows (column -> cell) as a table of the columns that any of them fills."""
    columns = tuple(name for name in (rows[0] if rows else ()) if any(row[name] for row in rows))
    words = (not all(is_numeric(row[name]) for row in rows) for name in columns[1:])
    cells = tuple(tuple(row[name] for name in columns) for row in rows)
    texts = tuple(notes)
    return Table(title, columns, cells, texts if any(texts) else (), (True, *words))


def is_numeric(cell: object) -> bool:
    """Return whether a cell holds a number, a range of numbers or nothing."""
    return _NUMERIC.fullmatch(str(cell)) is not None


def significant(value: float | None, digits: int = 4) -> str:
    """Return a number of that many significant digits, whole and with separators from 1000 on."""
    return "" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def integer(value: float | None) -> str:
    """Return a number as a whole one with separators."""
    return "" if value is None else f"{value:,.0f}"


def percent(value: float | None, decimals: int = 2) -> str:
    """Return a fraction as a percentage."""
    return "" if value is None else f"{value:.{decimals}%}"


def points_table(report: Report) -> Table:
    """Return a row a point with its verdict; the verdict's reason and the differences as notes."""
    rows, notes = [], []
    for point in report.points:
        n, reference, layout, judged = point.numbers, point.reference, point.layout, point.verdict
        published = judged.value != model.NO_REFERENCE
        notes.append("; ".join([judged.line, *judged.remarks] if published else judged.remarks))
        margin = f" ± {point.step_time.margin:.2g}" if point.step_time else ""
        if point.step_time and point.step_time.margin > point.step_time.value / 2:
            margin += " ?"
        sizes = "/".join(str(layout.get(key, NONE)) for key in ("TP", "PP", "VP", "CP", "DP"))
        rows.append(
            {
                "point": point.name,
                "verdict": judged.text if published else "",
                "step time (s)": significant(n.step_time_s) + margin if n else "",
                "of published": percent(judged.ratio, 1),
                "tokens/s": integer(n.tokens_per_s) if n else "",
                "MFU": percent(n.mfu) if n else "",
                f"days to {tokens_text(report.total_tokens)}": f"{n.days_to_train:,.2f}" if n else "",
                "published (s)": significant(reference.step_time_s) if reference else "",
                "estimate (s)": significant(point.estimate_s),
                "median (s)": significant(point.median_s),
                "last (s)": significant(point.last_s),
                "runs": f"{len(point.final_runs)}/{len(point.runs)}",
                "tokens/s a GPU": integer(n.tokens_per_s_per_gpu) if n else "",
                "TFLOP/s a GPU": significant(n.tflops_per_gpu) if n else "",
                "causal": percent(n.mfu_causal) if n else "",
                "bubble": percent(bubble_of(point.layout), 1),
                "GPU": point.gpu or "",
                "TP/PP/VP/CP/DP": sizes if layout else "",
                "MBS/GBS": f"{layout.get('MBS', NONE)}/{point.global_batch_size or NONE}",
            }
        )
    return make_table("Points", rows, notes)


def attribution_table(attribution: Attribution) -> Table:
    """Return a row a term, then the unexplained rest and the step; the way in a line as a note."""
    a = attribution
    rows = [(t.name, t.expected_s, t.measured_s, t.difference_s, t.evidence) for t in a.terms]
    rows.append(("unexplained", None, None, a.unexplained_s, f"{abs(a.unexplained_s) / a.measured_s:.1%} of the step"))
    rows.append(("step", a.expected_s, a.measured_s, a.measured_s - a.expected_s, ""))
    names = ("term (ms)", a.source.partition(",")[0], "measured", "more", "rests on")
    cells = [
        (name, _ms(expected), _ms(measured), _ms(more, "+"), text) for name, expected, measured, more, text in rows
    ]
    notes = [""] * len(a.terms) + ["; ".join(a.findings), a.summary]
    return make_table(f"{a.point}: from {a.source} to measured", [dict(zip(names, row)) for row in cells], notes)


def _ms(value_s: float | None, sign: str = "") -> str:
    return "" if value_s is None else f"{1e3 * value_s:{sign},.1f}"


def runs_table(runs: Sequence[Run]) -> Table:
    """Return a row a run, without times and losses of those that are not results; remarks as notes."""
    rows = []
    for run in runs:
        t = run.times if run.final else None
        left_out = {"warm-up": t.warmup_steps, **t.excluded} if t else {}
        rows.append(
            {
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
        )
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
            "95% interval": f"{item.interval[0]:.1%} to {item.interval[1]:.1%}" if item.interval else "",
            "baseline's point": item.baseline,
        }
        for item in comparisons
    ]
    return make_table("Against the baseline", rows, (item.why for item in comparisons))


def changes_table(comparisons: Sequence[Comparison]) -> Table:
    """Return what changed since the baseline, with the points at which each change was made."""
    points: dict[tuple[str, Change], list[str]] = {}
    for item in comparisons:
        for kind in KINDS:
            for change in getattr(item, kind):
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
    lines = ["# Benchmark report", "", f"{report.generated_at}, {report.generator}. Overall: **{report.verdict}**.", ""]
    shown = [points_table(report)]
    if report.comparisons:
        shown += [comparison_table(report.comparisons), changes_table(report.comparisons)]
    shown += [attribution_table(way) for way in report.attributions]
    for table in [*shown, runs_table(report.runs)]:
        lines += _markdown_table(table)
    for reference in report.references:
        lines += [f"## Published numbers: {_escaped(reference.title)}", ""]
        lines += [_escaped(f"{reference.source}. {reference.hardware}."), ""]
        lines += [*(f"- {_escaped(note)}" for note in reference.notes), ""]
    if report.warnings:
        lines += ["## Warnings", "", *(f"- {_escaped(text)}" for text in report.warnings)]
    return "\n".join(lines).rstrip("\n") + "\n"


def _markdown_table(table: Table) -> list[str]:
    if not table.rows:
        return []
    head = "| " + " | ".join(table.columns) + " |"
    rule = "|" + "|".join("---" if words else "---:" for words in table.words) + "|"
    rows = ["| " + " | ".join(map(_escaped, row)) + " |" for row in table.rows]
    notes = [f"- **{_escaped(row[0])}**: {_escaped(note)}" for row, note in zip(table.rows, table.notes) if note]
    return [f"## {table.title}", "", head, rule, *rows, "", *notes, *([""] if notes else [])]


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;").replace("*", "\\*")


_OF_A_RUN = (
    *("path", "state", "why_not_final", "model", "precision", "gpus", "nodes", "gpu", "version", "software"),
    *("entrypoint", "container", "data", "global_batch_size", "seq_length", "peak_memory_gib"),
)


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
    judged = point if point and (run.final or not point.final_runs) else None
    verdict, reference = (judged.verdict, judged.reference) if judged else (None, None)
    row: dict[str, object] = {
        "run": run.name,
        "point": point.name if point else None,
        "verdict": verdict.text if verdict else None,
        "why": verdict.why if verdict else None,
        "differences": "; ".join(verdict.differences) if verdict else None,
        "remarks": "; ".join(verdict.remarks) if verdict else None,
        "final": run.final,
        **{name: getattr(run, name) for name in _OF_A_RUN},
        **run.layout,
        "pipeline_bubble": bubble_of(run.layout),
        "ratio_of_published": verdict.ratio if verdict else None,
        "statistic": verdict.statistic if verdict else None,
        "published_step_time_s": reference.step_time_s if reference else None,
        "reference": reference.reference if reference else None,
    }
    if run.times:
        row |= {"warmup_steps": run.times.warmup_steps, "counted_steps": run.times.counted}
        row["excluded_steps"] = sum(run.times.excluded.values())
    if run.final and run.times:
        row |= {f"step_time_{key}": value for key, value in vars(run.times).items() if key.endswith("_s")}
        row |= {"first_loss": run.first_loss, "last_loss": run.last_loss}
    if run.numbers:
        row |= {key: value for key, value in vars(run.numbers).items() if key != "step_time_s"}
    return row
