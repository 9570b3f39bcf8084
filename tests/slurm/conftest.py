"""The Slurm cluster of the tests in this folder."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from typing import Any

import pytest

from tests.slurm.cluster import SlurmCluster, processes_of, why_not


def require_slurm(*, accounting: bool = False) -> None:
    """Skips the test on a machine that cannot start a cluster; fails it where NEMO_BENCH_REQUIRE_SLURM=1 says so."""
    if reason := why_not(accounting=accounting):
        if os.environ.get("NEMO_BENCH_REQUIRE_SLURM") == "1":
            pytest.fail(f"NEMO_BENCH_REQUIRE_SLURM=1, but {reason}")
        pytest.skip(reason)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """One cluster for all tests: 18 live nodes of 256, each of 8 GPUs by its own account. It has no sacct."""
    require_slurm()
    folder = tmp_path_factory.mktemp("slurm")
    with SlurmCluster(folder, live_nodes=18, total_nodes=256) as cluster:
        yield cluster
    assert not processes_of(folder)


@pytest.fixture(scope="session")
def slurm_with_accounting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """A cluster with slurmdbd and its database behind it, started for the tests that need sacct or accounts."""
    require_slurm(accounting=True)
    folder = tmp_path_factory.mktemp("slurm-accounting")
    with SlurmCluster(folder, live_nodes=2, total_nodes=2, accounting=True) as cluster:
        yield cluster
    assert not processes_of(folder)


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
