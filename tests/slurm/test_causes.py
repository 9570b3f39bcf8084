"""Jobs that fail before a rank starts: `jobs.py` names the cause, the first error's own line and its file."""

from __future__ import annotations

import pytest

from ..integration.conftest import SMALL
from .cluster import SlurmCluster
from .conftest import SHARED, Scripts

NONE = "cluster.container=null"
PLUGIN = "srun: error: Couldn't find the specified plugin name for mpi/nosuch"
CASES = {
    "starts no containers": (
        ["cluster.container.image=nvidia/nemo:1"],
        "srun: unrecognized option '--container-image=",
    ),
    "srun asks for other GPUs than the job has": ([NONE, "cluster.srun_args=['--gres=gpu:99']"], "srun: error: "),
    "this Slurm has no MPI plugin nosuch": ([NONE, "cluster.srun_args=['--mpi=nosuch']"], PLUGIN),
}


@pytest.mark.parametrize("cause", CASES)
def test_a_job_that_starts_no_rank_names_its_cause(cause: str, scripts: Scripts, slurm: SlurmCluster) -> None:
    overrides, line = CASES[cause]
    launcher = ("hydra/launcher=submitit_slurm", "scale=local", "cluster=slurm", "data=mock")
    done = scripts.run("train.py", *launcher, *SHARED, *SMALL, *overrides)
    assert done.returncode == 0, done.stderr
    job_id, run_dir = scripts.last()
    assert slurm.wait_for_end(job_id) == "FAILED"
    log = scripts.jobs("log", job_id)
    assert cause in log and f"first error, in {run_dir / f'slurm-{job_id}.out'}: {line}" in log
    assert line[:20] in scripts.jobs()
