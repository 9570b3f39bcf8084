"""The report as tables: the same cells in the terminal and in Markdown, and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nemo_bench.report import model
from nemo_bench.report.methods import METHODS
from nemo_bench.report.model import Comparison, Point, Report, Run
from nemo_bench.report.numbers import counted, tokens_text


@dataclass(frozen=True)
class Table:
    """A table of text; columns whose header begins with `>` are numbers, and aligned to the right."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def points_table(report: Report) -> Table:
    """A row a point, with its verdict."""
    tokens = tokens_text(report.assumptions.total_tokens)
    header = [
        "point",
        ">runs",
        ">step time (s)",
        ">median (s)",
        ">tokens/s",
        ">a GPU",
        ">TFLOP/s a GPU",
        ">MFU",
        ">causal",
    ]
    pipelined = any(point.pipeline_bubble is not None for point in report.points)
    if pipelined:
        header.append(">bubble")
    judged = any(point.reference is not None for point in report.points)
    verdict = (">published (s)", ">of published", "verdict") if judged else ()
    return Table(
        "Points",
        (*header, f">days to {tokens}", *verdict),
        tuple(_point_row(point, pipelined=pipelined, judged=judged) for point in report.points),
    )


def _point_row(point: Point, *, pipelined: bool, judged: bool) -> tuple[str, ...]:
    n = point.numbers
    runs = f"{len(point.final_runs)}/{len(point.runs)}"
    cells = [point.name, runs, *[""] * 8]
    if n is not None:
        margin = "" if point.step_time is None else f" ± {point.step_time.margin:.2g}"
        cells = [
            point.name,
            runs,
            f"{n.step_time_s:.4g}{margin}",
            _text(point.median_s, "{:.4g}"),
            f"{n.tokens_per_s:,.0f}",
            f"{n.tokens_per_s_per_gpu:,.0f}",
            _text(n.tflops_per_gpu, "{:.4g}"),
            _text(n.mfu, "{:.2%}"),
            _text(n.mfu_causal, "{:.2%}"),
            f"{n.days_to_train:,.2f}",
        ]
    if pipelined:
        cells.insert(-1, _text(point.pipeline_bubble, "{:.1%}"))
    if judged:
        cells += [
            _text(point.reference.step_time_s if point.reference else None, "{:g}"),
            _text(point.verdict.ratio, "{:.1%}"),
            "" if point.verdict.value == model.NO_REFERENCE else point.verdict.text,
        ]
    return tuple(cells)


def runs_table(runs: Sequence[Run]) -> Table:
    """A row a run; no times and no losses of those that are no result."""
    header = (">counted", ">median (s)", ">mean (s)", ">5% (s)", ">95% (s)", ">last (s)", ">loss")
    return Table("Runs", ("run", "state", *header, "remark"), tuple(_run_row(run) for run in runs))


def _run_row(run: Run) -> tuple[str, ...]:
    t = run.times if run.final else None
    loss = f"{run.first_loss:.3f} to {run.last_loss:.3f}" if run.final and run.first_loss is not None else ""
    remarks = ([run.why_not_final] if run.why_not_final else []) + list(run.warnings)
    if t is not None and (t.warmup_steps or t.excluded):
        remarks.insert(0, counted(t))
    times = (
        [""] * 6
        if t is None
        else [str(t.counted), *(f"{each:.4g}" for each in (t.median_s, t.mean_s, t.p5_s, t.p95_s, t.last_s))]
    )
    return (run.name, run.state, *times, loss, "; ".join(remarks))


def comparison_table(comparisons: Sequence[Comparison]) -> Table:
    """A row a point that the baseline has too."""
    rows = tuple(
        (each.point, _text(each.ratio, "{:.1%}"), each.verdict + (" (regression)" if each.regression else ""), each.why)
        for each in comparisons
    )
    return Table("Against the baseline", ("point", ">of baseline", "verdict", "why"), rows)


def changes(each: Comparison) -> Iterator[tuple[str, str]]:
    """(kind, "key: before -> after") of everything that changed between the two."""
    for kind in ("configuration", "packages", "environment", "hardware"):
        for change in getattr(each, kind):
            yield kind, f"{change.key}: {_or_none(change.before)} -> {_or_none(change.after)}"


def _or_none(value: str | None) -> str:
    return "(none)" if value is None else value


def _text(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def remarks(point: Point) -> list[str]:
    """What stands below the table about a point: why it has its verdict, and what may explain it."""
    verdict = point.verdict
    if verdict.value == model.NO_REFERENCE:
        return []
    return [verdict.why, *verdict.differences, *verdict.remarks]


# --- Markdown -----------------------------------------------------------------------------------------------


def markdown(report: Report) -> str:
    """The report for a wiki or an issue."""
    lines = ["# Benchmark report", "", f"{report.generated_at}, {report.generator}. Overall: **{report.verdict}**.", ""]
    lines += _markdown_table(points_table(report))
    for point in report.points:
        if remarks(point):
            lines += [f"**{_cell(point.name)}: {point.verdict.value}**", ""]
            lines += [*(f"- {_cell(text)}" for text in remarks(point)), ""]
    if report.comparisons:
        lines += _markdown_table(comparison_table(report.comparisons))
        for each in report.comparisons:
            found = [f"- {kind}: {_cell(text)}" for kind, text in changes(each)]
            lines += [f"**{_cell(each.point)}** against **{_cell(each.baseline)}**", "", *found, ""] if found else []
    lines += _markdown_table(runs_table(report.runs))
    for reference in report.references:
        lines += [f"## Published numbers: {reference.title}", "", f"{reference.source}. {reference.hardware}.", ""]
        lines += [*(f"- {_cell(note)}" for note in reference.notes), ""]
    lines += ["## How the numbers are computed", ""]
    lines += [f"- **{method.name}**{f' ({method.unit})' if method.unit else ''}: {method.how}" for method in METHODS]
    if report.warnings:
        lines += ["", "## Warnings", "", *(f"- {_cell(text)}" for text in report.warnings)]
    return "\n".join(lines) + "\n"


def _markdown_table(table: Table) -> list[str]:
    head = "| " + " | ".join(name.lstrip(">") for name in table.header) + " |"
    rule = "|" + "|".join("---:" if name.startswith(">") else "---" for name in table.header) + "|"
    rows = ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in table.rows]
    return [f"## {table.title}", "", head, rule, *rows, ""]


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;").replace("*", "\\*")


# --- CSV ----------------------------------------------------------------------------------------------------

CSV_COLUMNS = (
    *("run", "point", "path", "state", "final", "why_not_final", "model", "precision", "gpus", "nodes", "gpu"),
    *("version", "entrypoint", "container", "data", "global_batch_size", "seq_length", "TP", "PP", "VP", "CP", "DP"),
    *("MBS", "GA", "pipeline_bubble", "steps", "warmup_steps", "excluded_steps", "counted_steps", "step_time_last_s"),
    *("step_time_median_s", "step_time_mean_s", "step_time_p5_s", "step_time_p95_s", "step_time_low_s"),
    *("step_time_high_s", "tokens_per_s", "tokens_per_s_per_gpu", "tflops_per_gpu", "tflops_per_gpu_causal"),
    *("peak_tflops", "mfu", "mfu_causal", "total_tokens", "days_to_train", "first_loss", "last_loss"),
    *("peak_memory_gib", "verdict", "differences", "ratio_of_published", "published_step_time_s", "reference"),
)


def csv_text(report: Report) -> str:
    """A line a run. Results (times, rates, losses, verdict) are empty for a run that is not final."""
    out = io.StringIO()
    writer = csv.DictWriter(out, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for run in report.runs:
        point = next((each for each in report.points if run.name in each.runs), None)
        writer.writerow(_csv_row(run, point))
    return out.getvalue()


def _csv_row(run: Run, point: Point | None) -> dict[str, object]:
    row: dict[str, object] = {key: getattr(run, key, None) for key in CSV_COLUMNS}
    row |= {"run": run.name, "point": point.name if point else None, **run.layout, "steps": len(run.steps)}
    row["pipeline_bubble"] = model.bubble_of(run.layout)
    if not run.final:
        row |= {"first_loss": None, "last_loss": None}
    t, n = run.times, run.numbers
    if t is not None:
        row |= {
            "warmup_steps": t.warmup_steps,
            "excluded_steps": sum(t.excluded.values()),
            "counted_steps": t.counted,
        }
    if run.final and t is not None:
        row |= {
            "step_time_last_s": t.last_s,
            "step_time_median_s": t.median_s,
            "step_time_mean_s": t.mean_s,
            "step_time_p5_s": t.p5_s,
            "step_time_p95_s": t.p95_s,
            "step_time_low_s": t.mean.interval[0] if t.mean else None,
            "step_time_high_s": t.mean.interval[1] if t.mean else None,
        }
    if n is not None:
        names = ("tokens_per_s", "tokens_per_s_per_gpu", "tflops_per_gpu", "tflops_per_gpu_causal", "peak_tflops")
        row |= {key: getattr(n, key) for key in (*names, "mfu", "mfu_causal", "total_tokens", "days_to_train")}
        if point is not None and point.reference is not None:
            row |= {
                "verdict": point.verdict.value,
                "differences": "; ".join(point.verdict.differences),
                "ratio_of_published": point.verdict.ratio,
                "published_step_time_s": point.reference.step_time_s,
                "reference": point.reference.reference,
            }
    return row
