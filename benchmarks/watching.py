"""Are ranks that lag or stop, and links that get slow, named while a run goes on? Are healthy ones left alone?

    python benchmarks/watching.py --ranks 16 --tries 20 --output benchmarks/results/watching.json

The machine and the faults are those of machine_check.py; a slow node has 3% of a core here (a cgroup), where a healthy
one of sixteen on two cores has 12%. In place of NeMo ranks run peer_loop.py, with the hooks that training calls, in a
run folder as train.py makes it: a matrix product and a ring-wise all-reduce of 4 MiB a step. The fault comes after step
10. Right is a try whose terminal and whose report name the ranks with the fault, the two at the ends of a link, and
nobody else.
"""

from __future__ import annotations

import io
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from rich.console import Console  # noqa: E402

from benchmarks.machine_check import Machine, main, named_nodes, processes_of, tc  # noqa: E402
from nemo_bench.cluster import processes  # noqa: E402
from nemo_bench.launch.batch_script import rank_environment  # noqa: E402
from nemo_bench.launch.point import new_run  # noqa: E402
from nemo_bench.record.folder import EVENTS, Status, read_lines  # noqa: E402
from nemo_bench.report.build import build_report  # noqa: E402
from nemo_bench.report.terminal import Follower, print_report  # noqa: E402

STEPS, FIRST, GRADIENT_KIB = 60, 10, 4096
LIMIT_S = 90.0  # to wait for a name
ON_S = 4.0  # once there is one, others might follow
SHARE = 0.03  # of a core
_NAMED = re.compile(r"rank (\d+) \(process 0 of n\d+\)")


@contextmanager
def slowed(leader: int) -> Iterator[None]:
    """Give a process group a small share of a core, by a control group of its own."""
    first, root = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")
    period_us, parent = 100_000, first if first.is_dir() else root
    group = parent / f"watching-{os.getpid()}-{leader}"
    group.mkdir()
    quota_us = int(SHARE * period_us)
    if first.is_dir():
        (group / "cpu.cfs_quota_us").write_text(f"{quota_us}")
    else:
        (group / "cpu.max").write_text(f"{quota_us} {period_us}")
    for pid in processes_of(leader):
        (group / "cgroup.procs").write_text(f"{pid}")
    yield
    for pid in processes_of(leader):
        (parent / "cgroup.procs").write_text(f"{pid}")
    group.rmdir()


def watch(machine: Machine, fault: str, random_numbers: random.Random) -> dict[str, Any]:
    """Run the loop of ranks with a fault, and return who was named where."""
    ranks = len(machine.servers)
    node = random_numbers.randrange(ranks)
    other = (node + 1) % ranks  # the all-reduce's next
    guilty = {"none": set(), "slow link": {node, other}}.get(fault, {node})
    cfg = replace(machine.cfg, trainer=replace(machine.cfg.trainer, max_steps=STEPS))
    run, shown = new_run(cfg, []), io.StringIO()
    command = [sys.executable, "-m", "benchmarks.peer_loop", str(run.path), str(STEPS), str(GRADIENT_KIB)]
    environment = {**rank_environment(cfg, os.environ), "OMP_NUM_THREADS": "1"}
    with (
        processes.started(command, environment, run.path, ranks, machine.popen) as group,
        Follower(cfg, run.path, Console(file=shown, width=10_000)) as follower,
        ExitStack() as stack,
    ):

        def follow(seconds: float, until: Any) -> None:
            end = time.monotonic() + seconds
            while group.poll() is None and time.monotonic() < end and not until():
                follower.tick()
                time.sleep(0.1)

        follow(LIMIT_S, lambda: run.progress().steps >= FIRST)
        if fault == "slow link":
            for way in ((node, other), (other, node)):
                subprocess.run(tc("add", *way).split(), check=True)
                stack.callback(subprocess.run, tc("del", *way).split(), check=True)
        elif fault == "slow node":
            stack.enter_context(slowed(machine.pids[node]))
        elif fault == "stopped rank":
            os.kill(machine.pids[node], signal.SIGSTOP)
        begin = time.monotonic()
        follow(LIMIT_S, lambda: fault != "none" and named(shown.getvalue()))
        named_after_s = time.monotonic() - begin
        follow(ON_S, lambda: False)
        outcome = group.poll()
    run.set_status(Status("completed" if outcome else "interrupted"))
    printed = io.StringIO()
    print_report(Console(file=printed, width=10_000), build_report([run.path]))
    rows = read_lines(run.path / EVENTS)[0]
    displayed, reported = named(shown.getvalue()), named(printed.getvalue())
    return {
        "at": named_nodes(guilty),
        "displayed": named_nodes(displayed),
        "reported": named_nodes(reported),
        "said": [row["text"][:300] for row in rows if "text" in row],
        "right": displayed == reported == guilty and (fault != "none" or run.status().state == "completed"),
        "steps": run.progress().steps,
        "named_after_s": round(named_after_s, 1) if displayed else None,
    }


def named(text: str) -> set[int]:
    """Return the ranks that a text names, those that wait for others left out."""
    lines = (line.partition("waiting in ")[0] for line in text.splitlines())
    return {int(rank) for line in lines for rank in _NAMED.findall(line)}


if __name__ == "__main__":
    main(watch, __doc__ or "")
