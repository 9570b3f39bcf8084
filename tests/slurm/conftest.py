"""The Slurm cluster of the tests in this folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import SlurmCluster, processes_of, why_not

PROJECT = Path(__file__).resolve().parents[2]
SUBMIT = ("hydra/launcher=submitit_slurm", "cluster=slurm", "cluster.container=null")
# The nodes of the test cluster are this one machine: jobs share it.
SHARED = ("cluster.exclusive=false", "cluster.mem=null")
CLOSED = ("cluster.partition=closed",)


def require_slurm(*, accounting: bool = False) -> None:
    """Skips the test on a machine that cannot start a cluster; fails it where NEMO_BENCH_REQUIRE_SLURM=1 says so."""
    if reason := why_not(accounting=accounting):
        skip_unless_required(reason)


def skip_unless_required(reason: str) -> None:
    if os.environ.get("NEMO_BENCH_REQUIRE_SLURM") == "1":
        pytest.fail(f"NEMO_BENCH_REQUIRE_SLURM=1, but {reason}")
    pytest.skip(reason)


@contextmanager
def started(folder: Path, *, accounting: bool = False, **options: Any) -> Iterator[SlurmCluster]:
    require_slurm(accounting=accounting)
    with SlurmCluster(folder, accounting=accounting, **options) as cluster:
        yield cluster
    assert not processes_of(folder)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """One cluster for all tests: 18 live nodes of 256, each of 8 GPUs by its own account. It has no sacct."""
    with started(tmp_path_factory.mktemp("slurm"), live_nodes=18, total_nodes=256) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def slurm_with_accounting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """A cluster with slurmdbd and its database behind it, for what needs sacct or accounts."""
    folder = tmp_path_factory.mktemp("slurm-accounting")
    with started(folder, live_nodes=2, total_nodes=2, accounting=True) as cluster:
        yield cluster


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Adds the daemons' logs to a failure."""
    report = yield
    fixtures: dict[str, Any] = getattr(item, "funcargs", {})
    if report.failed:
        for name, value in fixtures.items():
            if isinstance(value, SlurmCluster):
                report.sections.append((f"logs of {name}", value.logs()))
    return report


@dataclass(frozen=True)
class Scripts:
    """The project's scripts as a user of the cluster runs them, in a stage folder of their own."""

    slurm: SlurmCluster
    stage: Path

    def run(self, script: str, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.slurm.run(
            sys.executable,
            str(PROJECT / script),
            *args,
            cwd=self.stage,
            timeout=300,
            env={"STAGE_PATH": str(self.stage), **environment},
        )

    def start(self, script: str, *args: str) -> subprocess.Popen[str]:
        """Start a script, to be watched, interrupted or joined; it prints all to one pipe."""
        return subprocess.Popen(
            [sys.executable, "-u", str(PROJECT / script), *args],
            cwd=self.stage,
            env={**self.slurm.environment, "STAGE_PATH": str(self.stage)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def submit(self, *overrides: str, code: int = 0, **environment: str) -> str:
        done = self.run("train.py", *SUBMIT, *overrides, **environment)
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    def jobs(self, *args: str, code: int = 0) -> str:
        done = self.run("jobs.py", *args)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def submitted(self) -> list[dict[str, Any]]:
        """What `job.json` of each run holds, and its folder; the last submitted comes last."""
        paths = self.stage.glob("results/*/*/*/*/*/job.json")
        rows = [{**json.loads(path.read_text()), "folder": path.parent} for path in paths]
        return sorted(rows, key=lambda row: int(row["id"] or 0))

    def last(self) -> tuple[str, Path]:
        """Job id and run folder of the last submission."""
        return self.submitted()[-1]["id"], self.submitted()[-1]["folder"]


@pytest.fixture
def scripts(slurm: SlurmCluster, tmp_path: Path) -> Scripts:
    return Scripts(slurm, tmp_path)
