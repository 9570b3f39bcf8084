"""Slurm's word that a job is about to end, to every process of every rank.

SIGUSR1 comes ahead of the time limit (sbatch's --signal), SIGTERM when a job of higher priority takes the nodes.
"""

from __future__ import annotations

import signal
import threading

_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
received = threading.Event()  # one of them has come to this process


def listen() -> None:
    """Note both signals from now on; to be called before there is another thread.

    They are blocked, and so they stay in processes that this one starts (checkpoint writers, data loaders).
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    threading.Thread(target=_wait, daemon=True).start()


def _wait() -> None:
    signal.sigwait(_SIGNALS)  # the next one stays blocked
    received.set()
