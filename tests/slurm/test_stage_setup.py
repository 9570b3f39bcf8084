"""`setup_stage.py hydra/launcher=submitit_slurm` against a real Slurm."""

from __future__ import annotations

from pathlib import Path

import pytest

from .cluster import SlurmCluster
from .conftest import SHARED, Scripts

SUBMIT = ("hydra/launcher=submitit_slurm", *SHARED)
ENROOT = """#!/bin/sh
[ "$1" = version ] && { echo 3.5.0; exit; }
while [ ! -e "$(dirname "$0")/go" ]; do sleep 0.1; done
echo "$SLURM_JOB_ID $*" >> "$(dirname "$0")/calls"
cp "$(dirname "$0")/prepared.sqsh" "$3"
"""


@pytest.fixture
def scripts(slurm: SlurmCluster, tmp_path: Path) -> Scripts:
    (tmp_path / "stage").mkdir()
    return Scripts(slurm, tmp_path / "stage")


@pytest.fixture
def enroot(tmp_path: Path) -> Path:
    """A fake that copies a prepared image once `go` exists."""
    path = tmp_path / "bin" / "enroot"
    path.parent.mkdir()
    path.write_text(ENROOT)
    path.chmod(0o755)
    (path.parent / "prepared.sqsh").write_bytes(b"layers")
    return path


def test_a_job_fills_the_folder_and_is_followed_by_its_id(scripts: Scripts, enroot: Path) -> None:
    secret = {"HF_TOKEN": "hf_secret"}
    parts = ("parts=[image,tokenizer]", "tokenizer=local", f"enroot={enroot}", "image_gib=0.001")
    done = scripts.run("setup_stage.py", *SUBMIT, *parts, **secret)
    job_id = done.stdout.split()[1].rstrip(":")
    watching = scripts.start("jobs.py", "follow", job_id)
    (enroot.parent / "go").touch()
    out, _ = watching.communicate(timeout=90)
    assert watching.returncode == 0, out
    assert f"slurm-{job_id}.out" in out and "image: made" in out
    (call,) = (enroot.parent / "calls").read_text().splitlines()
    assert call.startswith(f"{job_id} import --output ") and call.endswith("docker://nvcr.io#nvidia/nemo:25.11")
    checked = scripts.run("setup_stage.py", "check", "parts=[image,tokenizer]", "tokenizer=local")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    again = scripts.jobs("resubmit", job_id, code=2)
    assert "the same command again" in again and f"enroot={enroot}" in again
    for path in scripts.stage.rglob("*"):
        assert not path.is_file() or b"hf_secret" not in path.read_bytes(), path
