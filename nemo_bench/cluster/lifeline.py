"""End a process when the one that started it is gone, however it died: the kernel then closes the pipe between them.

A signal would not do: a rank that waits in a collective ignores SIGTERM.
"""

from __future__ import annotations

import os
import signal
import threading

VARIABLE = "NEMO_BENCH_LIFELINE_FD"


def watch() -> None:
    """Where the launcher gave a pipe, of which it holds the other end, end this process group when that is closed."""

    def end_with_launcher() -> None:
        os.read(int(fd), 1)  # nobody writes
        os.killpg(os.getpgrp(), signal.SIGKILL)  # which a rank's data loaders belong to

    if fd := os.environ.pop(VARIABLE, ""):
        threading.Thread(target=end_with_launcher, daemon=True).start()
