"""`setup_stage.py hydra/launcher=submitit_slurm` against a real Slurm."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..squashfs import squashfs
from .cluster import SlurmCluster
from .test_submission import CLOSED, PROJECT, SHARED, Scripts

SUBMIT = ("hydra/launcher=submitit_slurm", *SHARED)
ENROOT = """#!/bin/sh
[ "$1" = version ] && { echo 3.5.0; exit; }
echo "$SLURM_JOB_ID $*" >> "$(dirname "$0")/calls"
cp "$(dirname "$0")/prepared.sqsh" "$3"
"""


@pytest.fixture
def scripts(slurm: SlurmCluster, tmp_path: Path) -> Scripts:
    return Scripts(slurm, tmp_path / "stage")


def test_the_image_is_imported_on_a_node(scripts: Scripts, slurm: SlurmCluster, tmp_path: Path) -> None:
    scripts.stage.mkdir()
    enroot = tmp_path / "bin" / "enroot"
    enroot.parent.mkdir()
    enroot.write_text(ENROOT)
    enroot.chmod(0o755)
    (enroot.parent / "prepared.sqsh").write_bytes(squashfs())
    asked = (*SUBMIT, f"enroot={enroot}", "image_gib=0.001", "tokenizer=local", "hydra.launcher.wait=true")
    done = scripts.run("setup_stage.py", *asked)
    assert done.returncode == 0, done.stdout + done.stderr
    (call,) = (enroot.parent / "calls").read_text().splitlines()
    job_id, _, arguments = call.partition(" ")
    assert f"job {job_id}: " in done.stdout and slurm.wait_for_end(job_id) == "COMPLETED"
    assert arguments.startswith("import --output ") and arguments.endswith("docker://nvcr.io#nvidia/nemo:25.11")
    assert (scripts.stage / "nvidia+nemo+25.11.sqsh").exists()
    checked = scripts.run("setup_stage.py", "check", "tokenizer=local")
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_a_job_that_fails_says_why(scripts: Scripts, slurm: SlurmCluster) -> None:
    scripts.stage.mkdir()
    done = scripts.run("setup_stage.py", *SUBMIT, "parts=[image]", "enroot=/no/enroot", "hydra.launcher.wait=true")
    assert done.returncode == 2 and "Traceback" not in done.stdout + done.stderr
    assert "/no/enroot" in done.stdout and "did not complete (FAILED)" in done.stderr


def test_the_token_is_written_nowhere(scripts: Scripts) -> None:
    scripts.stage.mkdir()
    done = scripts.run("setup_stage.py", *SUBMIT, "parts=[code]", "hydra.launcher.wait=true", HF_TOKEN="hf_secret")
    assert done.returncode == 0, done.stdout + done.stderr
    for path in scripts.stage.rglob("*"):
        assert not path.is_file() or b"hf_secret" not in path.read_bytes(), path
    assert os.path.exists(scripts.stage / "nemo_bench" / "train.py")


def test_a_job_without_any_environment_fills_the_same_folder(scripts: Scripts) -> None:
    scripts.stage.mkdir()
    alone = ("parts=[code]", "hydra.launcher.wait=true", "+cluster.additional_parameters.export=NONE")
    done = scripts.run("setup_stage.py", *SUBMIT, *alone)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (scripts.stage / "nemo_bench" / "train.py").exists()


def test_cancelled_before_it_began(scripts: Scripts, slurm: SlurmCluster) -> None:
    """No log is there to be shown, and the command that waits for it says how it stands."""
    scripts.stage.mkdir()
    watching = subprocess.Popen(
        [sys.executable, "-u", str(PROJECT / "setup_stage.py"), *SUBMIT, *CLOSED, "hydra.launcher.wait=true"],
        cwd=scripts.stage,
        env={**slurm.environment, "STAGE_PATH": str(scripts.stage)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert watching.stdout is not None
    job_id = watching.stdout.readline().split()[1].rstrip(":")
    assert "PENDING" in scripts.jobs()
    slurm.run("scancel", job_id)
    out, err = watching.communicate(timeout=90)
    assert watching.returncode == 1 and "Traceback" not in err
    assert "is not there: the job is CANCELLED" in out and f"job {job_id} did not complete (CANCELLED)" in err


def test_followed_by_its_id(scripts: Scripts, slurm: SlurmCluster, tmp_path: Path) -> None:
    scripts.stage.mkdir()
    enroot = tmp_path / "bin" / "enroot"
    enroot.parent.mkdir()
    enroot.write_text('#!/bin/sh\n[ "$1" = version ] && exit\nread -r _ < "$(dirname "$0")/go"\n' + ENROOT)
    enroot.chmod(0o755)
    (enroot.parent / "prepared.sqsh").write_bytes(squashfs())
    os.mkfifo(enroot.parent / "go")
    done = scripts.run("setup_stage.py", *SUBMIT, "parts=[image]", f"enroot={enroot}", "image_gib=0.001")
    job_id = done.stdout.split()[1].rstrip(":")
    watching = subprocess.Popen(
        [sys.executable, "-u", str(PROJECT / "jobs.py"), "follow", job_id],
        cwd=scripts.stage,
        env={**slurm.environment, "STAGE_PATH": str(scripts.stage)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    (enroot.parent / "go").write_text("go\n")
    out, err = watching.communicate(timeout=90)
    assert watching.returncode == 0, out + err
    assert f"slurm-{job_id}.out" in out and "image: made" in out
    assert "image: made" in scripts.jobs("follow", job_id)  # and of one that has ended
    again = scripts.jobs("resubmit", job_id, code=2)
    assert "the same command again" in again and f"enroot={enroot}" in again


def test_dry_and_refused(scripts: Scripts) -> None:
    scripts.stage.mkdir()
    done = scripts.run("setup_stage.py", *SUBMIT, "launch=dry", "parts=[image]")
    assert done.returncode == 0 and "sbatch --test-only: accepted" in done.stdout
    assert "setup_stage.py cluster=local 'parts=[image]'" in done.stdout
    assert list(scripts.stage.iterdir()) == []
    refused = scripts.run("setup_stage.py", "hydra/launcher=submitit_local")
    assert refused.returncode == 2 and "hydra/launcher=submitit_slurm" in refused.stderr
