"""What the person at the terminal sees: progress while a run goes on, and its numbers at the end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from nemo_bench.config import TrainConfig
from nemo_bench.record import folder as record
from nemo_bench.report.model import Run
from nemo_bench.report.numbers import rows

_PHASES = {
    "importing": "importing NeMo and Megatron (about 20 s)",
    "building": "building model, data and optimizer",
    "training": "waiting for the first step",
    "validation": "validating",
    "checkpoint": "writing a checkpoint",
    "done": "finishing",
}


def make_console() -> Console:
    """A console as wide as the terminal; wide enough for a path on a line where there is none."""
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
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        self.times: list[float] = []

    def __enter__(self) -> Follower:
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.completed}/{task.total}"),
                TextColumn("{task.fields[step]}"),
                TimeElapsedColumn(),
                console=self.console,
                transient=False,
            )
            self.bar.start()
            self.task = self.bar.add_task("starting", total=self.total, step="")
        return self

    def __exit__(self, *exc: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def tick(self) -> None:
        """Shows what has been written since the last call."""
        news = [*self._new(record.EVENTS), *self._new(record.STEPS)]
        for row in sorted(news, key=lambda row: float(row["time"])):
            if "step" in row:
                self._step(row)
            elif text := _PHASES.get(row["event"]):
                self._phase(text)

    def _new(self, name: str) -> list[dict[str, Any]]:
        found, self.offsets[name] = record.read_lines(self.run_dir / name, self.offsets[name])
        return found

    def _phase(self, text: str) -> None:
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, description=text)
        else:
            self.console.print(f"{time.strftime('%H:%M:%S')} {text}", highlight=False)

    def _step(self, row: dict[str, Any]) -> None:
        step, seconds = int(row["step"]), float(row["train_step_timing_s"])
        self.times.append(seconds)
        tokens_per_s = self.cfg.model.seq_length * self.cfg.model.global_batch_size / seconds
        recent = sorted(self.times[-10:])[len(self.times[-10:]) // 2]
        left = recent * (self.total - step - 1)
        text = (
            f"loss {float(row['loss']):.3f}  train_step_timing {seconds:.4g} s  {tokens_per_s:,.0f} tokens/s  "
            f"ETA {int(left) // 60}:{int(left) % 60:02d}"
        )
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, description="training", completed=step + 1, step=text)
        else:
            # Counted from 1 for people; the record and NeMo's log count from 0.
            self.console.print(f"step {step + 1}/{self.total}  {text}", highlight=False)


def summary_table(run: Run) -> Table:
    """A run's numbers, each with what it assumes."""
    what = ", ".join(text for text in (run.model, run.precision, run.gpu) if text)
    table = Table(title=f"Llama 3.1 {what}" if run.model else run.name, title_justify="left")
    table.add_column("")
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("")
    for name, value, remark in rows(run):
        table.add_row(name, value, Text(remark))
    return table


def print_summary(console: Console, run: Run) -> None:
    """The summary table, and where the evidence lies."""
    console.print()
    console.print(summary_table(run))
    # Not wrapped: a path is there to be copied.
    console.print(f"evidence: {run.path}", soft_wrap=True, highlight=False)
