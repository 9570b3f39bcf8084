"""What the user sees while shards are made: a bar for each on a terminal, else a line now and then."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from nemo_bench.data.shard import Shard

LINE_EVERY_S = 10.0


class ShardDisplay:
    """Shows shards by the records that their processes keep, and so serves jobs too."""

    def __init__(self, console: Console, shards: list[Shard]) -> None:
        self.console = console
        self.shards = shards
        columns = [TextColumn("{task.description}"), BarColumn(bar_width=20), DownloadColumn(), TransferSpeedColumn()]
        counts = TextColumn("{task.fields[counts]}")
        # Without a terminal it draws nothing and only measures the speeds.
        self.bars = Progress(*columns, TimeRemainingColumn(), counts, console=console, disable=not console.is_terminal)
        self.rows: list[TaskID] = [self.bars.add_task(shard.name, total=None, counts="") for shard in shards]
        self.phases = [""] * len(shards)
        self.notes = [""] * len(shards)
        self.last_lines = time.monotonic()

    def __enter__(self) -> ShardDisplay:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.update()
        self.bars.stop()

    def update(self) -> None:
        """Show the shards as they are now."""
        due = time.monotonic() - self.last_lines > LINE_EVERY_S
        if due:
            self.last_lines = time.monotonic()
        for number, shard in enumerate(self.shards):
            if shard.note != self.notes[number]:
                self.notes[number] = shard.note
                self._print(f"{shard.name}: {shard.note}")
            phase = shard.phase if shard.state == "running" else shard.state
            if shard.job_id and not shard.ended:
                phase = f"job {shard.job_id} {shard.state.lower()}" + (f": {shard.phase}" if shard.phase_began else "")
            changed, self.phases[number] = phase != self.phases[number], phase
            row = self.rows[number]
            if changed:
                self.bars.reset(row, description=f"{shard.name} {phase}", total=None)
            counts = f"{shard.documents:,} documents, {shard.tokens:,} tokens" if shard.documents else ""
            self.bars.update(row, total=shard.total_bytes, completed=shard.done_bytes, counts=counts)
            if self.bars.disable and (changed or (due and shard.state == "running")):
                self._print(self._line(number, counts))

    def _line(self, number: int, counts: str) -> str:
        shard = self.shards[number]
        parts = [f"{time.strftime('%H:%M:%S')} {shard.name}: {self.phases[number]}"]
        if shard.total_bytes and not shard.ended:
            parts.append(f"{shard.done_bytes / 1e6:,.0f} of {shard.total_bytes / 1e6:,.0f} MB")
            if speed := self.bars.tasks[number].speed:
                parts.append(f"{speed / 1e6:,.0f} MB/s")
        return ", ".join([*parts, counts] if counts else parts)

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True)
