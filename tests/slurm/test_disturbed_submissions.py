"""Submissions that are killed, interrupted or left without an answer: no job may run that jobs.py does not list."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from ..integration.conftest import SMALL
from .cluster import SlurmCluster, sbin_path, wait_for
from .conftest import CLOSED, SHARED, SUBMIT, Scripts


def wrapped_sbatch(folder: Path, body: str) -> str:
    """Return a PATH on which `sbatch` is this script; `real` calls the cluster's own and keeps its answer."""
    folder.mkdir()
    sbatch = shutil.which("sbatch")
    (folder / "sbatch").write_text(f'#!/bin/bash\nreal() {{ {sbatch} "$@"; }}\n{body}\n')
    (folder / "sbatch").chmod(0o755)
    return f"{folder}{os.pathsep}{sbin_path()}"


QUICK = ("scale=local", *SHARED, *SMALL, "data=mock")


def test_a_submitter_that_is_killed_leaves_no_orphan(scripts: Scripts, slurm: SlurmCluster) -> None:
    path = wrapped_sbatch(scripts.stage / "bin", 'real "$@" > /dev/null; kill -9 $PPID')
    waiting = scripts.run("train.py", *SUBMIT, *QUICK, *CLOSED, PATH=path)
    assert waiting.returncode < 0 or waiting.returncode == 137
    assert scripts.jobs().count("PENDING") == 1  # found by its script
    scripts.run("train.py", *SUBMIT, *QUICK, "cluster.setup=['exit 3']", PATH=path)
    jobs = wait_for(lambda: [job for job in _contents(scripts.stage) if job["id"]][1:], "the script to name itself", 30)
    assert slurm.wait_for_end(jobs[0]["id"]) == "FAILED"
    assert scripts.jobs().count("FAILED") == 1
    for job in _contents(scripts.stage):
        scripts.jobs("cancel", job["id"])


def _contents(stage: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(stage.glob("results/*/*/*/*/*/job.json"))]


def test_ctrl_c_between_submissions_names_what_was_submitted(scripts: Scripts) -> None:
    body = 'real "$@"; [ $(ls -d "$STAGE_PATH"/results/*/*/*/*/* | wc -l) -lt 2 ] || kill -INT $PPID; sleep 1'
    path = wrapped_sbatch(scripts.stage / "bin", body)
    said = scripts.submit(*QUICK, *CLOSED, "trainer.max_steps=5,6,7", code=130, PATH=path)
    first, _ = (job["id"] for job in _contents(scripts.stage))
    assert "1 of 3 jobs submitted" in said and f"`scancel {first}` takes them back" in said
    assert scripts.jobs().count("PENDING") == 2
    scripts.jobs("cancel", *(job["id"] for job in _contents(scripts.stage)))


def test_percent_signs_in_the_stage_folder_are_no_patterns(scripts: Scripts, slurm: SlurmCluster) -> None:
    stage = scripts.stage / "100%j %t"
    stage.mkdir()
    scripts = Scripts(slurm, stage)
    scripts.submit(*QUICK, "gpu=h100", "precision=bf16", "cluster.setup=['exit 3']")
    job_id, run_dir = scripts.last()
    assert slurm.wait_for_end(job_id) == "FAILED"
    assert (run_dir / f"slurm-{job_id}.out").exists() and "FAILED" in scripts.jobs()
