"""Run the ranks of a run as processes of this machine, which all end when one fails and when this process is killed.

Not torchrun: it imports torch, and leaves its ranks behind when it is killed.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_bench.errors import RunFailed
from nemo_bench.record.folder import RunFolder

# A rank that waits in a collective ignores SIGTERM; it gets this long to write its logs all the same.
GRACE_S = 3.0
LIFELINE = "NEMO_BENCH_LIFELINE_FD"  # a pipe, of which the launcher alone holds the writing end


@dataclass(frozen=True)
class Outcome:
    """How the process group ended: the first rank that failed, or None."""

    failed_rank: int | None = None
    exit_code: int = 0  # negative: the signal that killed it
    seen_at: float = 0.0  # seconds since 1970; what ranks say later, they say because they are being ended


@dataclass
class ProcessGroup:
    """Running ranks; `processes[i]` is rank i."""

    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def poll(self) -> Outcome | None:
        """Return how the group ended; None while ranks run and none has failed."""
        codes = [process.poll() for process in self.processes]
        if failed := [(code, rank) for rank, code in enumerate(codes) if code]:
            # A rank killed by a signal comes first (its code is negative): the others fail for its sake.
            code, rank = min(failed)
            return Outcome(rank, code, time.time())
        return None if None in codes else Outcome()

    def stop(self, grace_s: float = GRACE_S) -> None:
        """End every rank and every process that a rank started; return when they are gone."""
        deadline = time.monotonic() + grace_s
        # SIGKILL also after a rank has ended: its data loaders are in its group and may live on.
        for signum in (signal.SIGTERM, signal.SIGKILL):
            for process in self.processes:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signum)
            while time.monotonic() < deadline and None in [process.poll() for process in self.processes]:
                time.sleep(0.05)
        for process in self.processes:
            process.wait()


@contextmanager
def started(
    command: list[str],
    environment: dict[str, str],
    run_dir: Path,
    ranks: int,
    popen: Callable[..., Any] = subprocess.Popen,
) -> Iterator[ProcessGroup]:
    """Start `ranks` ranks of `run_dir`, and end them all when the block is left, however it is left.

    Each rank's place is added to `environment`, as torchrun sets it. `popen` may fork a rank instead of starting it.
    """
    read_fd, write_fd = os.pipe()  # not inherited unless passed on: the writing end stays with this process
    group = ProcessGroup()
    common = {**environment, LIFELINE: str(read_fd), "NODE_RANK": "0", "WORLD_SIZE": str(ranks)}
    common |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    try:
        for rank in range(ranks):
            with open(RunFolder(run_dir).log(rank), "wb") as log:
                process = popen(
                    command,
                    env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=[read_fd],
                    # A group of its own: Ctrl-C reaches this process alone, which then ends the ranks in order.
                    start_new_session=True,
                )
            group.processes.append(process)
        os.close(read_fd)
        yield group
    finally:
        group.stop()
        os.close(write_fd)


def end_with_launcher() -> None:
    """End this process group when the launcher, if it gave a pipe, is gone: the kernel then closes the writing end.

    A signal would not do: a rank that waits in a collective ignores SIGTERM.
    """

    def wait() -> None:
        os.read(int(fd), 1)  # nobody writes
        os.killpg(os.getpgrp(), signal.SIGKILL)  # which a rank's data loaders belong to

    if fd := os.environ.pop(LIFELINE, ""):
        threading.Thread(target=wait, daemon=True).start()


@contextmanager
def explained_signals(advice: str) -> Iterator[None]:
    """End the block on Ctrl-C, SIGTERM and SIGHUP by RunFailed, whose message is how it ended, a colon and `advice`."""

    def handler(signum: int, frame: object) -> None:
        raise KeyboardInterrupt(signum)  # which passes every `except Exception`

    before = {signum: signal.signal(signum, handler) for signum in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    except KeyboardInterrupt as ended:
        (signum,) = ended.args or (signal.SIGINT,)
        how = "interrupted" if signum == signal.SIGINT else f"ended by {signal.Signals(signum).name}"
        raise RunFailed(f"{how}: {advice}", 128 + signum) from None
    finally:
        for signum, previous in before.items():
            signal.signal(signum, previous)


def free_port() -> int:
    """Return a TCP port that nobody listens on now; rank 0 will, in a few seconds.

    It is below those that the kernel gives to connections, which would take it until then.
    """
    while True:
        port = secrets.choice(range(15_000, 32_000))
        with suppress(OSError), socket.create_server(("", port)):
            return port
