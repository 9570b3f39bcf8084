"""`hydra/launcher=submitit_local`: a sweep in the background of this machine, and `jobs.py` on it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import PROJECT, SMALL, environment, wait_for

pytestmark = pytest.mark.train


@pytest.fixture
def own_stage(tmp_path: Path) -> Path:
    return tmp_path


def script(stage: Path, name: str, *args: str) -> str:
    done = subprocess.run(
        [sys.executable, str(PROJECT / name), *args],
        cwd=stage,
        env={**environment(stage), "COLUMNS": "200"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


def test_points_run_in_turn_and_can_be_cancelled_together(own_stage: Path) -> None:
    shown = script(own_stage, "train.py", "hydra/launcher=submitit_local", *SMALL, "trainer.max_steps=2,100000,3")
    assert "3 jobs submitted" in shown
    first, second, _ = dict.fromkeys(re.findall(r"local-\d+\.\d", shown))

    def states() -> list[str]:
        return re.findall(r"(PENDING|RUNNING|COMPLETED|CANCELLED|FAILED)", script(own_stage, "jobs.py"))

    wait_for(lambda: states() == ["COMPLETED", "RUNNING", "PENDING"], "the second point to run", 120)
    # The first is done, the second would take hours, the third waits for it.
    assert script(own_stage, "jobs.py", "cancel", first, second) == f"cancelled: {second}\n"
    wait_for(lambda: states() == ["COMPLETED", "CANCELLED", "CANCELLED"], "all to have ended", 60)
    pid = re.findall(r"\d+", first)[0]
    wait_for(lambda: not os.path.exists(f"/proc/{pid}"), "the background process to be gone", 30)


def test_wrong_points_are_refused_before_any_starts(own_stage: Path) -> None:
    said = script(own_stage, "train.py", "hydra/launcher=submitit_local", "model.num_query_groups=4,3")
    assert "nothing was submitted" in said and "model.num_query_groups=3" in said
    said = script(own_stage, "train.py", "hydra/launcher=submitit_local", "cluster=slurm")
    assert "the value that works: local" in said
    assert list(own_stage.iterdir()) == []
