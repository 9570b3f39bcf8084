"""What the user sees while something takes long: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from nemo_bench.report.terminal import make_console

REFRESH_S, LINE_EVERY_S = 0.2, 10.0


@contextmanager
def shown(title: str, done_bytes: Callable[[], int], total_bytes: Callable[[], int | None]) -> Iterator[None]:
    """Show, until the block ends, how many bytes are done, of how many if that is known."""
    console = make_console()
    columns = [TextColumn("{task.description}"), BarColumn(bar_width=20), DownloadColumn(), TransferSpeedColumn()]
    # Without a terminal it draws nothing and only measures the speed.
    bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal)
    row, ended = bar.add_task(title, total=None), threading.Event()

    def show() -> None:
        console.print(f"{time.strftime('%H:%M:%S')} {title}", highlight=False, soft_wrap=True)
        while not ended.wait(LINE_EVERY_S if bar.disable else REFRESH_S):
            done, total, speed = done_bytes(), total_bytes(), (bar.tasks[row].speed or 0) / 1e6
            bar.update(row, completed=done, total=total)
            if bar.disable:
                of = f" of {total / 1e6:,.0f}" if total else ""
                line = f"{time.strftime('%H:%M:%S')} {title}: {done / 1e6:,.0f}{of} MB, {speed:,.0f} MB/s"
                console.print(line, highlight=False, soft_wrap=True)

    thread = threading.Thread(target=show, daemon=True)
    with bar:
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
