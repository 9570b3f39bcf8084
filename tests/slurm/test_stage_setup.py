"""`setup_stage.py hydra/launcher=submitit_slurm` against a real Slurm."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from .cluster import SlurmCluster
from .test_submission import SHARED, Scripts

SUBMIT = ("hydra/launcher=submitit_slurm", *SHARED)
ENROOT = """#!/bin/sh
[ "$1" = version ] && { echo 3.5.0; exit; }
echo "$SLURM_JOB_ID $*" >> "$(dirname "$0")/calls"
printf 'hsqs and the layers of an image' > "$3"
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
    assert "/no/enroot" in done.stdout and "failed" in done.stderr


def test_the_token_is_written_nowhere(scripts: Scripts) -> None:
    scripts.stage.mkdir()
    done = scripts.run("setup_stage.py", *SUBMIT, "parts=[code]", "hydra.launcher.wait=true", HF_TOKEN="hf_secret")
    assert done.returncode == 0, done.stdout + done.stderr
    for path in scripts.stage.rglob("*"):
        assert not path.is_file() or b"hf_secret" not in path.read_bytes(), path
    assert os.path.exists(scripts.stage / "nemo_bench" / "train.py")


def test_dry_and_refused(scripts: Scripts) -> None:
    scripts.stage.mkdir()
    done = scripts.run("setup_stage.py", *SUBMIT, "launch=dry", "parts=[image]")
    assert done.returncode == 0 and "sbatch --test-only: accepted" in done.stdout
    assert "setup_stage.py cluster=local 'parts=[image]'" in done.stdout
    assert list(scripts.stage.iterdir()) == []
    refused = scripts.run("setup_stage.py", "hydra/launcher=submitit_local")
    assert refused.returncode == 2 and "hydra/launcher=submitit_slurm" in refused.stderr
