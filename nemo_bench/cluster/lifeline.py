"""End a process when the one that started it is gone, however it died.

The launching process holds the writing end of a pipe and never writes; all that it started read. The kernel closes the
pipe with the launching process. A signal would not do: a rank that waits in a collective ignores SIGTERM.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

VARIABLE = "NEMO_BENCH_LIFELINE_FD"


def watch(when_gone: Callable[[], object]) -> None:
    """Where the launcher gave a pipe, watch it in a thread that calls `when_gone` and ends this process group."""

    def end_with_launcher() -> None:
        os.read(int(fd), 1)
        try:
            when_gone()
        finally:
            os.killpg(os.getpgrp(), signal.SIGKILL)  # which a rank's data loaders belong to

    if fd := os.environ.pop(VARIABLE, ""):
        threading.Thread(target=end_with_launcher, daemon=True).start()
