"""Ranks watched by each other, as four real processes: one that lags or stands still is named, of healthy ones none."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from nemo_bench.cluster import processes
from nemo_bench.record.folder import EVENTS, STALLED, STEPS, STRAGGLER, RunFolder, read_lines
from nemo_bench.report.runs import load_run

from ..composing import PROJECT, composed

pytest.importorskip("torch")

RANKS = 4
Group = processes.ProcessGroup


@contextmanager
def slowed(group: Group, rank: int) -> Iterator[None]:
    """Stop a rank for most of its time."""
    ended = threading.Event()

    def alternate() -> None:
        while not ended.is_set():
            for signum, seconds in ((signal.SIGSTOP, 0.2), (signal.SIGCONT, 0.02)):
                os.kill(group.processes[rank].pid, signum)
                time.sleep(seconds)

    thread = threading.Thread(target=alternate)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def nice(group: Group, rank: int) -> Iterator[None]:
    """Give a rank's core to another program, which has more right to run."""
    pid, cores = group.processes[rank].pid, os.sched_getaffinity(0)

    def yielding(level: int, allowed: set[int]) -> None:
        os.setpriority(os.PRIO_PROCESS, pid, level)
        os.sched_setaffinity(pid, allowed)
        with suppress(OSError):  # kernels that share cores between sessions first
            Path(f"/proc/{pid}/autogroup").write_text(str(level))

    yielding(10, {min(cores)})
    with subprocess.Popen(["taskset", "-c", str(min(cores)), sys.executable, "-c", "while True: pass"]) as busy:
        try:
            yield
        finally:
            busy.kill()
            yielding(0, cores)


@contextmanager
def stopped(group: Group, rank: int) -> Iterator[None]:
    os.kill(group.processes[rank].pid, signal.SIGSTOP)
    yield
    os.kill(group.processes[rank].pid, signal.SIGCONT)


@contextmanager
def started(folder: Path, steps: int) -> Iterator[tuple[RunFolder, Group]]:
    """Run the loop of ranks from its first step on."""
    run = RunFolder(folder)
    cfg = composed("gpu=cpu", "precision=bf16", f"trainer.devices={RANKS}")
    run.create(config_yaml=OmegaConf.to_yaml(OmegaConf.structured(cfg)), command=["loop"], overrides=[])
    command = [sys.executable, "-m", "tests.peer_loop", str(run.path), str(steps)]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    with processes.started(command, environment, run.path, RANKS) as group:
        wait_for((run.path / STEPS).exists)
        yield run, group


def wait_for(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 90
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return value


def said(run: RunFolder, after: int = 0) -> list[dict[str, Any]]:
    return [event for event in read_lines(run.path / EVENTS)[0] if "text" in event][after:]


@pytest.mark.parametrize(
    ("fault", "events", "words"),
    [
        (slowed, [STRAGGLER, "recovered"], "slower than its peers: "),
        (nice, [STRAGGLER, "recovered"], "slower than its peers: "),
        (stopped, [STALLED, "resumed"], "waiting in all_reduce, called at tests/peer_loop.py:"),
    ],
)
def test_a_rank_that_lags_or_has_stopped_is_named_while_it_does(
    tmp_path: Path, fault: Callable[[Group, int], Any], events: list[str], words: str
) -> None:
    """Three times, also where it is the rank that speaks for all."""
    with started(tmp_path, 100_000) as (run, group):
        for rank in (2, 3, 0):
            before = len(said(run))
            with fault(group, rank):
                event, *_ = wait_for(partial(said, run, after=before))
                assert event["event"] == events[0] and words in event["text"]
                assert f"rank {rank} (process {rank} of {os.uname().nodename}) " in event["text"]
            wait_for(lambda: said(run)[-1]["event"] == events[1])
            time.sleep(2)
        named = said(run)
        assert {event["rank"] for event in named if event["event"] == STRAGGLER} <= {0, 2, 3}
        assert any(event["text"] in remark for event in named[-2:] for remark in load_run(run.path).remarks)
        logs = "".join(run.log(rank).read_text() for rank in (0, RANKS - 1))
        assert all(event["text"] in logs for event in named)


def test_of_healthy_ranks_none_is_named(tmp_path: Path) -> None:
    with started(tmp_path, 100) as (run, group):
        wait_for(group.poll)
    assert said(run) == []
