"""What the person at the terminal sees: progress while a run goes on, and its numbers at the end."""

from __future__ import annotations

import statistics
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
from nemo_bench.report.numbers import LAST_LOSSES, counted, tokens_text, unit_name

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


def rows(run: Run) -> list[tuple[str, str, str]]:
    """Return (name, value, remark) of each number, for the terminal; of a run that is not final, why."""
    unit = unit_name(run)
    shown = []
    if run.first_loss is not None and run.last_loss is not None:
        shown.append(
            ("loss", f"{run.first_loss:.3f} to {run.last_loss:.3f}", f"first step, mean of the last {LAST_LOSSES}")
        )
    t, n = run.times, run.numbers
    if t is not None:
        remark = f"mean of {counted(t)}"
        shown.append(("step time (s)" if run.final else "step time so far (s)", f"{t.mean_s:.4g}", remark))
        shown.append(("  median (s)", f"{t.median_s:.4g}", f"90% of the steps from {t.p5_s:.4g} to {t.p95_s:.4g}"))
        shown.append(("  last step (s)", f"{t.last_s:.4g}", "what the recipe reads"))
    if n is not None:
        shown += [
            (
                "tokens/s",
                f"{n.tokens_per_s:,.0f}",
                f"{n.tokens_per_s_per_gpu:,.0f} a {unit}, {run.gpus} in all",
            ),
            (f"days to {tokens_text(n.total_tokens)} tokens", f"{n.days_to_train:,.2f}", "at this throughput"),
        ]
        if n.tflops_per_gpu is not None:
            shown.insert(
                -1,
                (f"TFLOP/s a {unit}", f"{n.tflops_per_gpu:.4g}", f"causal convention: {n.tflops_per_gpu_causal:.4g}"),
            )
        if n.mfu is not None:
            shown.insert(-1, ("MFU", f"{n.mfu:.2%}", f"causal convention: {n.mfu_causal:.2%}"))
            shown.insert(-1, ("  of a peak of", f"{n.peak_tflops:.4g} TFLOP/s", n.peak_source or ""))
    if run.peak_memory_gib is not None:
        shown.append(("peak memory (GiB)", f"{run.peak_memory_gib:.1f}", f"of one {unit}"))
    shown += device_rows(run)
    if not run.final:
        shown.append(("no result", "", run.why_not_final or ""))
    return shown


def device_rows(run: Run) -> list[tuple[str, str, str]]:
    """Return (name, value, remark) of what the GPUs did: power, energy, clocks, and what held these back."""
    shown = []
    asked = "" if len(run.devices) == 1 else f"of {len(run.devices)} GPUs"
    powers = [each.power_w for each in run.devices if each.power_w is not None]
    if powers:
        power_w = statistics.fmean(powers)
        energy = ""
        if run.numbers is not None:
            per_joule = run.numbers.tokens_per_s_per_gpu / power_w
            energy = f"{power_w * run.numbers.step_time_s:,.0f} J a step and GPU, {per_joule:.3g} tokens/J"
        shown.append(
            ("power (W)", f"{power_w:,.0f}", ", ".join(text for text in (f"mean {asked}".strip(), energy) if text))
        )
    clocks = [each.sm_clock_mhz for each in run.devices if each.sm_clock_mhz is not None]
    lowest = [(each.sm_clock_min_mhz, each.rank) for each in run.devices if each.sm_clock_min_mhz is not None]
    if clocks and lowest:
        low, rank = min(lowest)
        remark = f"mean {asked}".strip() + f", lowest {low:,.0f}" + (f" (rank {rank})" if len(lowest) > 1 else "")
        shown.append(("SM clock (MHz)", f"{statistics.fmean(clocks):,.0f}", remark))
    hottest = [(each.temperature_max_c, each.rank) for each in run.devices if each.temperature_max_c is not None]
    if hottest:
        degrees, rank = max(hottest)
        shown.append(("temperature (°C)", f"{degrees:.0f}", "highest" + (f", rank {rank}" if len(hottest) > 1 else "")))
    reasons: dict[str, list[float]] = {}
    for each in run.devices:
        for reason, share in each.throttled.items():
            reasons.setdefault(reason, []).append(share)
    for reason, shares in sorted(reasons.items()):
        where = f" on {len(shares)} of {len(run.devices)} GPUs" if len(run.devices) > 1 else ""
        usual = ", usual at full load" if reason == "sw_power_cap" else ""
        shown.append((f"  {reason.replace('_', ' ')}", f"{max(shares):.0%}", f"of the steps{where}{usual}"))
    return shown


def print_summary(console: Console, run: Run) -> None:
    """The summary table, and where the evidence lies."""
    console.print()
    console.print(summary_table(run))
    # Not wrapped: a path is there to be copied.
    console.print(f"evidence: {run.path}", soft_wrap=True, highlight=False)
