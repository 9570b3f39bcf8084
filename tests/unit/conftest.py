"""Unit tests see nothing of a scheduler that this machine may have, nor of a job that they may run in; and a report."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nemo_bench.report.bare_logs import Given
from nemo_bench.report.build import build_report
from nemo_bench.report.model import Report

from ..reports import write_logs

RUNS = Path(__file__).parents[1] / "runs"


@pytest.fixture(autouse=True)
def outside_of_any_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("SLURM_", "SBATCH_")) or name == "GSW_VERSION":
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Real runs on CPU and on an H200, and logs with all kinds of outcomes, with a baseline that was quicker."""
    root = tmp_path_factory.mktemp("logs")
    now, before = write_logs(root / "now", 1.0), write_logs(root / "before", 0.9)
    return build_report([RUNS, now], baseline=[before], given=Given(gpu="h100"))
