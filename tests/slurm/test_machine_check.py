"""`check_machine.py` as a Slurm job of four nodes on CPUs: each fault is named, and nothing in a healthy machine.

benchmarks/machine_check.py does the same with 16 ranks, more often.
"""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from benchmarks import machine_check
from nemo_bench.record.folder import EXIT, read_object
from nemo_bench.record.machine import CHECK, CHECKS

from .cluster import SlurmCluster, wait_for
from .conftest import SHARED, SUBMIT, Scripts

NODES, TRIES = 4, 3
RANK = """#!/bin/bash
export MASTER_ADDR={} GLOO_SOCKET_IFNAME=e0 OMP_NUM_THREADS=1
exec nsenter --net=/run/netns/m$SLURM_PROCID "$@"
"""


@pytest.fixture(scope="module")
def networks(slurm: SlurmCluster) -> SlurmCluster:
    """The cluster, with a network namespace for each rank of a job and a link between every two."""
    for line in ("mkdir -p /run/netns", "mount -t tmpfs tmpfs /run/netns", machine_check.mesh(NODES)):
        slurm.tell(line)
    slurm.tell("touch log/mesh-is-there")
    wait_for((slurm.folder / "log" / "mesh-is-there").exists, "the network namespaces", 30)
    return slurm


@pytest.mark.parametrize("fault", machine_check.FAULTS)
def test_a_fault_is_named_and_nothing_else(fault: str, networks: SlurmCluster, scripts: Scripts) -> None:
    wrapper = scripts.stage / "in_its_namespace.sh"
    wrapper.write_text(RANK.format(machine_check.address(0)))
    wrapper.chmod(0o755)
    request = (*SUBMIT, *SHARED, "scale=local", f"trainer.num_nodes={NODES}", "cluster.nodelist='n[1-4]'")
    for node in range(TRIES):
        before = set(scripts.stage.glob(f"{CHECKS}/*/"))
        done = scripts.run("check_machine.py", *request, f"cluster.srun_args=[{wrapper}]")
        assert done.returncode == 0, done.stdout + done.stderr
        (folder,) = set(scripts.stage.glob(f"{CHECKS}/*/")) - before
        with ExitStack() as stack:
            if fault == "slow link":
                networks.tell(machine_check.tc("add", node, node + 1))
                stack.callback(networks.tell, machine_check.tc("del", node, node + 1))
            log = folder / f"rank{node}.out"
            wait_for(partial(says, log, "measures"), "the ranks to measure", 60)
            if fault == "slow node":
                machine_check.slow_down(os.getpgid(rank_processes(folder, node)[-1]))
            if fault == "stopped rank":
                os.kill(rank_processes(folder, node)[-1], signal.SIGSTOP)
            wait_for((folder / EXIT).exists, "the end of the check", 120)
        content, code = read_object(folder / CHECK), read_object(folder / EXIT)["exit_code"]
        named = {place["host"] for each in content["findings"] for place in each["where"]}
        guilty = {"none": set(), "slow link": {f"n{node + 1}", f"n{node + 2}"}}.get(fault, {f"n{node + 1}"})
        assert named == guilty, content["findings"]
        assert (code > 0) == bool(guilty)  # srun's is that of a rank that was ended, if it is greater
        (job_log,) = folder.glob("slurm-*.out")
        said = job_log.read_text()
        assert ("--exclude=" in said) == (fault in ("slow node", "stopped rank")), said


def says(log: Path, words: str) -> bool:
    return log.exists() and words in log.read_text()


def rank_processes(folder: Path, rank: int) -> list[int]:
    """The processes of a rank, the oldest first: rank 0's measures beneath the one that coordinates."""
    pids = [int(entry.name) for entry in Path("/proc").glob("[0-9]*")]
    found = []
    for pid in pids:
        try:
            command, environment = (Path(f"/proc/{pid}/{name}").read_bytes() for name in ("cmdline", "environ"))
        except OSError:
            continue
        if b"rank.py" in command and os.fsencode(folder) in command and b"SLURM_PROCID=%d\0" % rank in environment:
            found.append(pid)
    return sorted(found)
