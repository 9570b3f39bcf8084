"""What the user sees while something takes long: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from nemo_bench.report.terminal import make_console

REFRESH_S, LINE_EVERY_S = 0.2, 10.0


class Phase:
    """Shows, while its `with` block runs, how many bytes are done of `total_bytes` (None: unknown)."""

    def __init__(self, title: str, done_bytes: Callable[[], int], total_bytes: int | None = None) -> None:
        self.title, self.done_bytes, self.total_bytes = title, done_bytes, total_bytes
        self.console = make_console()
        columns = [TextColumn("{task.description}"), BarColumn(bar_width=20), DownloadColumn(), TransferSpeedColumn()]
        # Without a terminal it draws nothing and only measures the speed.
        hidden = not self.console.is_terminal
        self.bar = Progress(*columns, TimeRemainingColumn(), console=self.console, transient=True, disable=hidden)
        self.row = self.bar.add_task(title, total=None)
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._show, daemon=True)

    def __enter__(self) -> Phase:
        self._print(self.title)
        self.bar.start()
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()
        self.bar.stop()

    def set_total(self, total_bytes: int | None) -> None:
        self.total_bytes = total_bytes

    def _show(self) -> None:
        while not self.ended.wait(LINE_EVERY_S if self.bar.disable else REFRESH_S):
            done, total = self.done_bytes(), self.total_bytes
            self.bar.update(self.row, completed=done, total=total)
            if self.bar.disable:
                of = f" of {total / 1e6:,.0f}" if total else ""
                speed = (self.bar.tasks[self.row].speed or 0) / 1e6
                self._print(f"{self.title}: {done / 1e6:,.0f}{of} MB, {speed:,.0f} MB/s")

    def _print(self, line: str) -> None:
        self.console.print(f"{time.strftime('%H:%M:%S')} {line}", highlight=False, soft_wrap=True)
