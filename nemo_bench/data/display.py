"""What the user sees while shards are made: a bar for each on a terminal, else a line now and then."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from nemo_bench.data.shard import Shard

LINE_EVERY_S = 10.0


class ShardDisplay:
    """Shows shards by the records that their processes keep, and so serves jobs too."""

    def __init__(self, console: Console, shards: list[Shard]) -> None:
        self.console = console
        columns = [TextColumn("{task.description}"), BarColumn(bar_width=20), DownloadColumn(), TransferSpeedColumn()]
        counts = TextColumn("{task.fields[counts]}")
        # Without a terminal it draws nothing and only measures the speeds.
        self.bars = Progress(*columns, TimeRemainingColumn(), counts, console=console, disable=not console.is_terminal)
        self.rows = [(shard, self.bars.add_task(shard.name, total=None, counts="")) for shard in shards]
        self.shown: dict[str, tuple[str, str]] = {}  # phase and note of each shard
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
        for shard, row in self.rows:
            phase = shard.phase if shard.state == "running" else shard.state
            if shard.job_id and not shard.ended:
                phase = f"job {shard.job_id} {shard.state.lower()}" + (f": {shard.phase}" if shard.phase_began else "")
            shown_phase, shown_note = self.shown.get(shard.name, ("", ""))
            self.shown[shard.name] = (phase, shard.note)
            if shard.note != shown_note:
                self._print(f"{shard.name}: {shard.note}")
            if phase != shown_phase:
                self.bars.reset(row, description=f"{shard.name} {phase}", total=None)
            counts = f"{shard.documents:,} documents, {shard.tokens:,} tokens" if shard.documents else ""
            self.bars.update(row, total=shard.total_bytes, completed=shard.done_bytes, counts=counts)
            if self.bars.disable and (phase != shown_phase or (due and shard.state == "running")):
                line = f"{time.strftime('%H:%M:%S')} {shard.name}: {phase}"
                if shard.total_bytes and not shard.ended:
                    speed = (self.bars.tasks[row].speed or 0) / 1e6
                    line += f", {shard.done_bytes / 1e6:,.0f} of {shard.total_bytes / 1e6:,.0f} MB, {speed:,.0f} MB/s"
                self._print(f"{line}, {counts}" if counts else line)

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True)
