"""Ranks watched by each other, as four real processes: one that lags or stands still is named, of healthy ones none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from nemo_bench.cluster import processes
from nemo_bench.record.folder import EVENTS, STALLED, STEPS, STRAGGLER, RunFolder, read_lines
from nemo_bench.record.stall import who_keeps_it
from nemo_bench.report.runs import load_run

from ..composing import PROJECT, composed
from ..slurm.cluster import sbin_path
from .conftest import wait_for

pytestmark = pytest.mark.train
RANKS = 4
SLOWED = "while :; do kill -STOP {0}; sleep 0.2; kill -CONT {0}; sleep 0.02; done"  # stopped for most of its time
STOPPED = "kill -STOP {0}; exec sleep 1000"


@contextmanager
def started(folder: Path, steps: int) -> Iterator[tuple[RunFolder, processes.ProcessGroup]]:
    """Run the loop of ranks from its first step on."""
    run = RunFolder(folder)
    cfg = composed("gpu=cpu", "precision=bf16", f"trainer.devices={RANKS}")
    run.create(config_yaml=OmegaConf.to_yaml(OmegaConf.structured(cfg)), command=["loop"], overrides=[])
    command = [sys.executable, "-m", "benchmarks.peer_loop", str(run.path), str(steps), "4"]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    with processes.started(command, environment, run.path, RANKS) as group:
        wait_for((run.path / STEPS).exists, "the first step")
        yield run, group


def said(run: RunFolder, after: int = 0) -> list[dict[str, Any]]:
    return [event for event in read_lines(run.path / EVENTS)[0] if "text" in event][after:]


@pytest.mark.parametrize(
    ("fault", "events", "words"),
    [
        (SLOWED, (STRAGGLER, "recovered"), "slower than its peers: "),
        (STOPPED, (STALLED, "resumed"), "waiting in all_reduce, called at benchmarks/peer_loop.py:"),
    ],
    ids=["slowed", "stopped"],
)
def test_a_rank_that_lags_or_has_stopped_is_named_while_it_does(
    tmp_path: Path, fault: str, events: tuple[str, str], words: str
) -> None:
    """Three times, also where it is the rank that speaks for all."""
    with started(tmp_path, 100_000) as (run, group):
        for rank in (2, 3, 0):
            pid, before = group.processes[rank].pid, len(said(run))
            with subprocess.Popen(["bash", "-c", fault.format(pid)]) as disturbing:
                try:
                    event = wait_for(partial(said, run, after=before), "words on the rank", 90)[0]
                finally:
                    disturbing.kill()
                    subprocess.run(["kill", "-CONT", str(pid)], check=True)
            assert event["event"] == events[0] and words in event["text"]
            assert f"rank {rank} (process {rank} of {os.uname().nodename}) " in event["text"]
            wait_for(lambda: said(run)[-1]["event"] == events[1], "the rank to keep up")
            time.sleep(2)
        named = said(run)
        assert {event["rank"] for event in named if event["event"] == STRAGGLER} <= {0, 2, 3}
        assert any(event["text"] in remark for event in named[-2:] for remark in load_run(run.path).remarks)
        logs = "".join(run.log(rank).read_text() for rank in (0, RANKS - 1))
        assert all(event["text"] in logs for event in named)


def test_the_ends_of_a_slow_link_are_named(tmp_path: Path) -> None:
    """Three links of 20 Mbit/s among four ranks in network namespaces; benchmarks/watching.py tries 16 more often."""
    if os.geteuid() or not shutil.which("tc", path=sbin_path()):
        pytest.skip("slowing a link down takes root, and tc of iproute2")
    script = [sys.executable, "benchmarks/watching.py", "--ranks=4", "--tries=3", "--faults", "slow link"]
    environment = {**os.environ, "PATH": sbin_path()}
    done = subprocess.run(script, cwd=PROJECT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "slow link: 3 of 3 right" in done.stdout, done.stdout


def test_of_healthy_ranks_none_is_named(tmp_path: Path) -> None:
    with started(tmp_path, 100) as (run, group):
        wait_for(group.poll, "the last step")
    assert said(run) == []


def test_a_rank_that_waits_for_no_other_is_named_first(tmp_path: Path) -> None:
    stacks = {0: ("/x/torch/distributed/distributed_c10d.py", "all_reduce"), 1: ("/x/data/reader.py", "read")}
    for rank, (path, function) in stacks.items():
        frames = f'  File "{path}", line 7 in {function}\n  File "/x/loop.py", line 9 in main\n'
        RunFolder(tmp_path).log(rank).write_text(f"Timeout (0:00:15)!\nThread 0x1 (most recent call first):\n{frames}")
    assert who_keeps_it(RunFolder(tmp_path), 2, "GPU {} of n01".format) == (
        "at data/reader.py:7 (read): rank 1 (GPU 1 of n01); "
        "waiting in all_reduce, called at x/loop.py:9 (main): rank 0 (GPU 0 of n01)"
    )
