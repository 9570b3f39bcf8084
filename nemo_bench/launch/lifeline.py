"""Ends a rank when the process that started it is gone, however that died.

The launching process holds the writing end of a pipe and never writes; every rank reads. The kernel closes the pipe
when the launching process ends, SIGKILL included, and the read returns. Signals alone would not do: a rank that waits
in a collective ignores SIGTERM, and nobody sends one when the launcher is killed.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

VARIABLE = "NEMO_BENCH_LIFELINE_FD"


def watch(run_dir: Path) -> None:
    """Watches the pipe in a thread of this rank; does nothing where no launching process gave one."""
    fd = os.environ.pop(VARIABLE, None)
    if fd is not None:
        threading.Thread(target=_end_with_launcher, args=(int(fd), run_dir), daemon=True).start()


def _end_with_launcher(fd: int, run_dir: Path) -> None:
    os.read(fd, 1)
    from nemo_bench.results.record import Status, read_run, set_status

    try:
        if read_run(run_dir)["status"]["state"] == "running":
            set_status(run_dir, Status("killed", reason="the process that launched the run was killed"))
    finally:
        # Each rank leads a process group of its own: its data loaders go with it.
        os.killpg(os.getpgrp(), signal.SIGKILL)
