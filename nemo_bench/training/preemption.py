"""Slurm's word that a job is about to end, to every process of every rank.

SIGUSR1 comes ahead of the time limit (sbatch's --signal), SIGTERM when a job of higher priority takes the nodes.
"""

from __future__ import annotations

import signal
import threading

_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
_received = threading.Event()


def listen() -> None:
    """Note both signals from now on; to be called before there is another thread.

    They are blocked, and a thread waits for them. A handler would do for this process, but processes that it starts
    (checkpoint writers, data loaders) would be ended by the same signals: a blocked one stays blocked in them.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    threading.Thread(target=_wait, daemon=True).start()


def _wait() -> None:
    while True:
        signal.sigwait(_SIGNALS)
        _received.set()


def received() -> bool:
    """Return whether one of the signals has come to this process."""
    return _received.is_set()
