"""`sbatch launch.sh`, NVIDIA's recipe's command: the point runs in the job that it is started in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..composing import PROJECT


def launched(tmp_path: Path, *overrides: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run launch.sh as Slurm would, with programs of its own in place of srun, scontrol and sbatch."""
    programs = {"srun": f'printf "%s\\n" "$@" > {tmp_path}/words', "scontrol": "echo n1", "sbatch": "exit 9"}
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "STAGE_PATH": str(tmp_path / "stage")}
    environment |= {"SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "16", "SLURM_NTASKS_PER_NODE": "8"}
    environment |= {"SLURM_JOB_NAME": "nemo_llama3.1", "SLURM_JOB_NODELIST": "n[1-16]", "PYTHON": sys.executable}
    command = ["bash", "launch.sh", "cluster.container=null", "data=mock", *overrides]
    return subprocess.run(command, cwd=PROJECT, env=environment | variables, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"DTYPE": "fp8", "MODEL_SIZE": "70b"}, "24.11/fp8/70b/128"),
        ({"DTYPE": "bf16", "MODEL_SIZE": "405b", "SLURM_JOB_NUM_NODES": "12"}, "24.11/bf16/405b/96"),
    ],
)
def test_the_recipes_command_runs_its_point_in_its_own_job(
    variables: dict[str, str], folder: str, tmp_path: Path
) -> None:
    done = launched(tmp_path, **variables)
    assert done.returncode == 0, done.stderr
    (run_dir,) = (tmp_path / "stage/results" / folder).iterdir()
    assert json.loads((run_dir / "exit.json").read_text())["job_id"] == "77"
    assert json.loads((run_dir / "job.json").read_text())["name"] == "nemo_llama3.1"
    words = (tmp_path / "words").read_text().splitlines()
    assert f"--ntasks={Path(folder).name}" in words and "--mpi=pmix" in words and "--in=/opt/NeMo" in words


@pytest.mark.parametrize(
    ("overrides", "variables", "message"),
    [
        ((), {"MODEL_SIZE": "70b"}, "DTYPE: set it to fp8 or bf16"),
        ((), {"DTYPE": "fp8", "MODEL_SIZE": "70b", "SLURM_JOB_NUM_NODES": ""}, "this is no Slurm job"),
        (("trainer.num_nodes=32",), {"DTYPE": "fp8", "MODEL_SIZE": "70b"}, "has 16 nodes, and the point needs 32"),
    ],
)
def test_what_cannot_run_there_is_refused(
    overrides: tuple[str, ...], variables: dict[str, str], message: str, tmp_path: Path
) -> None:
    done = launched(tmp_path, *overrides, **variables)
    assert done.returncode == 2 and message in done.stderr
    assert not (tmp_path / "words").exists()
