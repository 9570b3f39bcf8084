"""The cluster that the other tests in this folder rely on."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from .cluster import processes_of, wait_for
from .conftest import require_slurm

PROJECT = Path(__file__).resolve().parents[2]
KILLED = """
from pathlib import Path
from tests.slurm.cluster import SlurmCluster
with SlurmCluster(Path({folder!r}), live_nodes=2, total_nodes=2) as cluster:
    job = cluster.submit("--nodes=2", script="srun bash -c 'setsid sleep 600 & sleep 600'")
    cluster.wait_for_state(job, "RUNNING")
    while len(cluster.pids("sleep")) < 4:
        pass
    print("running", flush=True)
    cluster.run("srun", "sleep", "600")
"""


def test_nothing_outlives_tests_that_are_killed(tmp_path: Path) -> None:
    """Daemons, job steps, ranks, and what ranks left in the background."""
    require_slurm()
    program = KILLED.format(folder=str(tmp_path / "cluster"))
    child = subprocess.Popen([sys.executable, "-c", program], cwd=PROJECT, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "running\n"
    assert processes_of(tmp_path)
    child.send_signal(signal.SIGKILL)
    child.wait()
    wait_for(lambda: not processes_of(tmp_path), "the end of all processes", 10)
