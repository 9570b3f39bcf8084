"""What the person at the terminal sees: progress while a run goes on, its numbers at the end, and reports."""

from __future__ import annotations

import statistics
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table as RichTable
from rich.text import Text

from nemo_bench.config import TrainConfig
from nemo_bench.record import folder as record
from nemo_bench.report import model, tables
from nemo_bench.report.model import Report, Run
from nemo_bench.report.remarks import throttling
from nemo_bench.report.runs import LAST_LOSSES
from nemo_bench.report.tables import percent, significant, tokens_text

# More rows than this are for the files, not for a terminal.
SHOWN_RUNS = 30
SHOWN_CHANGES = 20
SHOWN_WAYS = 2  # from estimate to measured, as tables
NAME_WIDTH = 32  # of a table that would not fit otherwise

_PHASES = {
    "importing": "importing NeMo and Megatron (about 20 s)",
    "building": "building model, data and optimizer",
    "training": "waiting for the first step",
    "validation": "validating",
    "checkpoint": "writing a checkpoint",
    "done": "finishing",
}
_STYLES = dict.fromkeys((model.FAIL, model.INVALID, model.INCOMPLETE), "bold red")
_STYLES |= {model.PASS: "green", model.FASTER: "cyan", model.NOT_COMPARABLE: "yellow", model.UNDECIDED: "yellow"}


def make_console() -> Console:
    """Return a console as wide as the terminal; wide enough for a path on a line if there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=200)


class Follower:
    """Shows a run by reading its record, so that it works the same for a local run and for one on a cluster.

    A progress bar on a terminal; a line a phase and a step elsewhere.
    """

    def __init__(self, cfg: TrainConfig, run_dir: Path, console: Console) -> None:
        self.cfg, self.run_dir, self.console = cfg, run_dir, console
        self.offsets = {record.STEPS: 0, record.EVENTS: 0}
        self.total = cfg.trainer.max_steps
        self.times: list[float] = []
        self.stalled = False
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=16), MofNCompleteColumn())
        step = TextColumn("{task.fields[step]}")
        self.bar = Progress(*columns, step, console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task("starting", total=self.total, step="")

    def __enter__(self) -> Follower:
        self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.tick()  # what an interrupted run wrote last
        self.bar.stop()

    def tick(self) -> None:
        """Show what has been written since the last call."""
        news: list[dict[str, Any]] = []
        for name, offset in self.offsets.items():
            rows, self.offsets[name] = record.read_lines(self.run_dir / name, offset)
            news += rows
        for row in sorted(news, key=lambda row: float(row["time"])):
            if "step" in row:
                self._step(row)
            elif text := _PHASES.get(row["event"]):
                self.bar.update(self.task, description=text, step="")
                self._line(f"{time.strftime('%H:%M:%S')} {text}")
            elif text := row.get("text"):  # a rank that lags, or steps that have stopped
                self.console.print(text, highlight=False)
        stall = record.RunFolder(self.run_dir).progress().stall
        if stall and not self.stalled:
            self.console.print(stall, highlight=False)
        self.stalled = bool(stall)

    def _step(self, row: dict[str, Any]) -> None:
        step, seconds, loss = int(row["step"]), float(row["train_step_timing_s"]), float(row["loss"])
        self.times.append(seconds)
        tokens_per_s = self.cfg.model.seq_length * self.cfg.model.global_batch_size / seconds
        left = int(statistics.median(self.times[-10:]) * (self.total - step - 1))
        rates = f"{seconds:.4g} s  {tokens_per_s:,.0f} tokens/s  ETA {left // 60}:{left % 60:02d}"
        # Counted from 1 for people; the record and NeMo's log count from 0. The bar fits into 80 columns.
        self.bar.update(self.task, description=f"loss {loss:.3f}", completed=step + 1, step=rates)
        self._line(f"step {step + 1}/{self.total}  loss {loss:.3f}  train_step_timing {rates}")

    def _line(self, text: str) -> None:
        if self.bar.disable:
            self.console.print(text, highlight=False)


def print_summary(console: Console, run: Run) -> None:
    """Print a run's numbers, each with what it assumes, and where the evidence is."""
    what = ", ".join(filter(None, (run.model, run.precision, run.gpu)))
    table = RichTable(title=f"Llama 3.1 {what}" if run.model else run.name, title_justify="left")
    table.add_column("", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("")
    for name, value, remark in summary_rows(run):
        table.add_row(name, value, Text(remark))
    console.print()
    console.print(table)
    # Not wrapped: a path is there to be copied.
    console.print(f"evidence: {run.path}", soft_wrap=True, highlight=False)


def summary_rows(run: Run) -> Iterator[tuple[str, str, str]]:
    """Yield (name, value, remark) of each number; of a run that is not final, why."""
    unit, t, n = run.unit, run.times, run.numbers
    if losses := tables.loss_text(run):
        yield "loss", losses, f"first step, mean of the last {LAST_LOSSES}"
    if t:
        yield f"step time{'' if run.final else ' so far'} (s)", significant(t.mean_s), f"mean of {t.description}"
        yield "  median (s)", significant(t.median_s), f"5% to 95%: {significant(t.p5_s)} to {significant(t.p95_s)}"
        yield "  last step (s)", significant(t.last_s), "what the 24.09 recipe reads"
    if n:
        yield "tokens/s", significant(n.tokens_per_s), f"{run.gpus} x {significant(n.tokens_per_s_per_gpu)} a {unit}"
        if n.tflops_per_gpu is not None:
            causal = f"causal convention: {significant(n.tflops_per_gpu_causal)}"
            yield f"TFLOP/s a {unit}", significant(n.tflops_per_gpu), causal
        if n.mfu is not None:
            peak = f"of {significant(n.peak_tflops)} TFLOP/s ({n.peak_source})"
            yield "MFU", percent(n.mfu), f"{peak}; causal convention: {percent(n.mfu_causal)}"
        yield f"days to {tokens_text(n.total_tokens)} tokens", f"{n.days_to_train:,.2f}", "at this throughput"
    if run.peak_memory_gib is not None:
        yield "peak memory (GiB)", f"{run.peak_memory_gib:.1f}", f"of one {unit}"
    if clocks := [device.sm_clock_mhz for device in run.devices if device.sm_clock_mhz]:
        yield "SM clock (MHz)", significant(statistics.fmean(clocks)), f"mean of {len(clocks)} {unit}s"
    for text in (*throttling(run), *run.remarks):
        yield "remark", "", text
    if run.why_not_final:
        yield "no result", "", run.why_not_final


def print_report(console: Console, report: Report) -> None:
    """Print points with their verdicts, the comparison with the baseline, runs and warnings."""
    print_table(console, tables.points_table(report))
    print_table(console, tables.comparison_table(report.comparisons))
    changes = tables.changes_table(report.comparisons).rows
    for key, before, now, *_ in changes[:SHOWN_CHANGES]:
        _print_line(console, key, f"{before} -> {now}")
    if len(changes) > SHOWN_CHANGES:
        _print_line(console, "...", f"{len(changes) - SHOWN_CHANGES} more changes, in results.md")
    for way in report.attributions:
        if len(report.attributions) <= SHOWN_WAYS:
            print_table(console, tables.attribution_table(way))
        else:
            _print_line(console, way.point, way.summary)
    for check in report.machine_checks:
        _print_line(console, "machine check", check)
    warnings = report.warnings
    if len(report.runs) == 1:
        print_summary(console, report.runs[0])
        warnings = report.runs[0].warnings + warnings
    elif len(report.runs) <= SHOWN_RUNS:
        print_table(console, tables.runs_table(report.runs))
    for text in warnings:
        _print_line(console, "warning", text, "yellow")


def print_table(console: Console, table: tables.Table) -> None:
    """Print as many of the first columns as fit, then the notes; a long name may wrap between its words."""
    if not table.rows:
        return
    wide, total = console.options.update(max_width=100_000), len(table.columns)
    for columns, name_width in [(total, 1000), *((count, NAME_WIDTH) for count in range(total, 0, -1))]:
        shown = RichTable(title=table.title, title_justify="left", box=box.SIMPLE_HEAD)
        for name, words in zip(table.columns[:columns], table.words):
            shown.add_column(name, justify="left" if words else "right", no_wrap=True)
        for name, *cells in table.rows:
            name = textwrap.fill(name, name_width, break_on_hyphens=False, break_long_words=False)
            cells = [name, *cells[: columns - 1]]
            shown.add_row(*(Text(cell, style=_STYLES.get(cell.partition(",")[0], "")) for cell in cells))
        if Measurement.get(console, wide, shown).maximum <= console.width:
            break
    console.print(shown)
    if columns < total:
        console.print(Text(f"{total - columns} more columns in a wider terminal and in results.md", style="dim"))
    for row, note in zip(table.rows, table.notes):
        if note:
            _print_line(console, row[0], note)


def _print_line(console: Console, name: str, text: str, style: str = "bold") -> None:
    """Print `name: text`: indented and wrapped at words on a terminal, one line elsewhere."""
    line = Text.assemble((name, style), ": ", text)
    if console.is_terminal:
        console.print(Padding(line, (0, 0, 0, 2)))
    else:
        console.print(Text("  ") + line, soft_wrap=True)
