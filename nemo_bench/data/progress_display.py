"""What the person who prepares data sees: a bar a shard on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from nemo_bench.data.shard import ERROR, RESULT

if TYPE_CHECKING:
    from nemo_bench.data.preparation import Shard

LINE_EVERY_S = 10.0


class ShardDisplay:
    """Shows shards under way by what their processes leave, so that it works for jobs too."""

    def __init__(self, console: Console, shards: list[Shard]) -> None:
        self.console, self.shards = console, shards
        self.bar: Progress | None = None
        self.rows: dict[str, TaskID] = {}
        self.phases: dict[str, str] = {}
        self.said: dict[str, int] = {}
        self.last_line = time.monotonic()
        self.meters: dict[str, _Meter] = {one.task.name: _Meter() for one in shards}

    def __enter__(self) -> ShardDisplay:
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                DownloadColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[more]}"),
                console=self.console,
            )
            self.bar.start()
            for one in self.shards:
                self.rows[one.task.name] = self.bar.add_task(
                    f"{one.task.name} {one.state}", total=None, rate="", more=""
                )
        return self

    def __exit__(self, *_: object) -> None:
        self.update(final=True)
        if self.bar is not None:
            self.bar.stop()

    def update(self, final: bool = False) -> None:
        """Shows how the shards stand now."""
        due = final or time.monotonic() - self.last_line > LINE_EVERY_S
        for one in self.shards:
            row = one.progress()
            phase = one.state if one.ended or one.state == "waiting" else row.get("phase", "starting")
            if one.job_id is not None and not one.ended:
                phase = f"job {one.job_id} {one.state.lower()}" + (f": {row['phase']}" if row else "")
            for line in self._new_words(one):
                self.console.print(f"{one.task.name}: {line}", highlight=False, soft_wrap=True)
            changed = phase != self.phases.get(one.task.name)
            self.phases[one.task.name] = phase
            rate = self.meters[one.task.name].rate(row)
            if self.bar is not None:
                self._show(one, phase, row, rate)
            elif changed or (due and not final and not one.ended and one.state != "waiting"):
                self.console.print(_line(one, phase, row, rate), highlight=False, soft_wrap=True)
        if due:
            self.last_line = time.monotonic()

    def _show(self, one: Shard, phase: str, row: dict[str, Any], rate: float | None) -> None:
        assert self.bar is not None
        task = self.bar.tasks[self.rows[one.task.name]]
        total, done = row.get("total_bytes"), row.get("done_bytes", 0)
        if one.state == "done":
            total = done = task.total or 1  # of its last phase that had one
        elif one.state == "failed" or total is None:
            total, done = task.total, task.completed
        self.bar.update(
            self.rows[one.task.name],
            description=f"{one.task.name} {phase}",
            total=total,
            completed=done,
            rate="" if rate is None else f"{rate / 1e6:,.0f} MB/s",
            more=_counts(row) or task.fields["more"],
        )

    def _new_words(self, one: Shard) -> list[str]:
        """What the process said since the last look: retries, bad documents."""
        new = []
        for path in (one.folder / "log.out", one.folder / f"slurm-{one.job_id}.out"):
            with contextlib.suppress(OSError), open(path, "rb") as log:
                log.seek(self.said.get(str(path), 0))
                whole = log.read().rpartition(b"\n")
                self.said[str(path)] = self.said.get(str(path), 0) + len(whole[0]) + len(whole[1])
                new += whole[0].decode("utf-8", "replace").splitlines()
        # Its last words are its result or its error, which are told at the end.
        return [] if one.ended or any((one.folder / name).exists() for name in (RESULT, ERROR)) else new


class _Meter:
    """Bytes a second of what a shard does now: of text while it tokenises, of the file while it downloads."""

    def __init__(self) -> None:
        self.phase = ""
        self.start = (0.0, 0.0)

    def rate(self, row: dict[str, Any]) -> float | None:
        done = float(row.get("text_bytes", row.get("done_bytes", 0)))
        now = float(row.get("time", 0.0))
        if row.get("phase") != self.phase:
            self.phase, self.start = row.get("phase", ""), (now, done)
        passed = now - self.start[0]
        return (done - self.start[1]) / passed if passed > 0.5 and done > self.start[1] else None


def _counts(row: dict[str, Any]) -> str:
    return f"{row['documents']:,} documents, {row['tokens']:,} tokens" if row.get("documents") else ""


def _line(one: Shard, phase: str, row: dict[str, Any], rate: float | None) -> str:
    parts = [f"{time.strftime('%H:%M:%S')} {one.task.name}: {phase}"]
    if not one.ended and row.get("total_bytes"):
        done, total = row["done_bytes"], row["total_bytes"]
        parts.append(f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB")
        if rate is not None:
            parts.append(f"{rate / 1e6:,.0f} MB/s")
    if counts := _counts(row):
        parts.append(counts)
    return ", ".join(parts)
