"""Slurm's warning that a job will be ended soon: SIGUSR1, to every process of every rank."""

from __future__ import annotations

import signal
import threading

_received = threading.Event()


def listen() -> None:
    """Notes SIGUSR1 from now on. To be called first: unheard it ends a process. Data loaders inherit this."""
    signal.signal(signal.SIGUSR1, lambda signum, frame: _received.set())


def received() -> bool:
    """Whether this process was warned."""
    return _received.is_set()
