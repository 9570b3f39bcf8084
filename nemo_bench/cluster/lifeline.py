"""End a process when the one that started it is gone, however it died.

The launching process holds the writing end of a pipe and never writes; all that it started read. The kernel closes the
pipe when the launching process ends, SIGKILL included, and the read returns. Signals alone would not do: a rank that
waits in a collective ignores SIGTERM, and nobody sends one when the launcher is killed.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

VARIABLE = "NEMO_BENCH_LIFELINE_FD"


def watch(when_gone: Callable[[], object]) -> None:
    """Where the launcher gave a pipe, watch it in a thread that calls `when_gone` and ends this process group."""
    fd = os.environ.pop(VARIABLE, None)
    if fd is None:
        return

    def end_with_launcher() -> None:
        os.read(int(fd), 1)
        try:
            when_gone()
        finally:
            # Each leads a process group of its own: a rank's data loaders go with it.
            os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=end_with_launcher, daemon=True).start()
