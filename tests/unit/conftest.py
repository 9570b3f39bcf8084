"""Unit tests see nothing of a scheduler that this machine may have, nor of a job that they may run in."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def outside_of_any_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("SLURM_", "SBATCH_")) or name == "GSW_VERSION":
            monkeypatch.delenv(name)
