"""Submissions that are killed, starved or left without an answer: jobs.py lists what Slurm has, and no more."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from nemo_bench.cli import quoted_path
from nemo_bench.cluster import jobs
from nemo_bench.cluster import slurm as slurm_commands
from nemo_bench.cluster.job import Job
from nemo_bench.cluster.slurm import Books
from nemo_bench.config import ComposedPoint
from nemo_bench.errors import BenchError
from nemo_bench.launch.submission import submit_points

from ..integration.conftest import SMALL
from .cluster import SlurmCluster, process_name, processes_of, sbin_path, wait_for
from .conftest import CLOSED, PROJECT, SHARED, SUBMIT, Scripts

KILLS = 200
QUICK = ("scale=local", *SHARED, *SMALL, "data=mock")
POINT = ("scale=64gpu", "data=mock", "cluster=slurm", "cluster.container=null", *SHARED, *CLOSED)


class Submitter:
    """Submits composed points, each time in a forked process."""

    def __init__(self, cluster: SlurmCluster, stage: Path) -> None:
        self.cluster, self.stage = cluster, stage
        with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
            cfg = compose("train", [*POINT, f"stage_path={quoted_path(stage)}"])
        self.points = [ComposedPoint(cfg, [*POINT])]

    def start(self) -> int:
        """Return the number of the new process, which leads a group of its own."""
        pid = os.fork()
        if pid == 0:
            os.setsid()
            with open(self.stage.with_suffix(".out"), "w") as output, contextlib.redirect_stdout(output):
                try:
                    submit_points(self.points, wait=False)
                except Exception as error:
                    print(error if isinstance(error, (BenchError, OSError)) else traceback.format_exc())
            os._exit(0)
        return pid

    def run(self) -> tuple[str, float]:
        """Return what a submission prints, and the seconds that it takes."""
        begin = time.monotonic()
        os.waitpid(self.start(), 0)
        return self.stage.with_suffix(".out").read_text(), time.monotonic() - begin

    def check(self) -> tuple[int, int]:
        """Hold the listing to what Slurm has; return how many jobs there are, and how many interrupted submissions."""
        wait_for(lambda: "sbatch" not in map(process_name, processes_of(self.cluster.folder)), "sbatch to end", 30)
        rows = self.cluster.run("squeue", "-h", "-o", "%i|%o", check=True).stdout.splitlines()
        real = {row.partition("|")[0] for row in rows if f"{self.stage}/" in row}
        listed = jobs.submitted(self.stage)
        known = [job for job in listed if job.job_id != "?"]
        assert {job.job_id for job in known} == real and len(known) == len(real)
        assert {job.state for job in known} <= {"PENDING"}
        assert all("interrupted" in str(job.reason) for job in listed if job not in known)
        return len(known), len(listed) - len(known)


@pytest.fixture
def submitter(slurm: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Submitter]:
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Job, "watcher", Books())
    yield Submitter(slurm, tmp_path / "stage")
    slurm.run("scancel", "--partition=closed", check=True)


def test_kills_at_random_moments_leave_no_orphan_and_invent_no_job(submitter: Submitter) -> None:
    moments, signalled = random.Random(1), (os.kill, os.killpg)  # as kill -9, or as the end of a session
    seconds, whole = 0.0, 0
    for number in range(KILLS):
        if number % 20 == 0:  # what else the machine does changes
            _, seconds = submitter.run()
            whole += 1
        pid = submitter.start()
        time.sleep(moments.uniform(0, 1.2 * seconds))
        with contextlib.suppress(ProcessLookupError):
            signalled[number % 2](pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    taken, interrupted = submitter.check()
    assert taken - whole > KILLS / 20 and interrupted > 0, (taken, interrupted)


def test_a_disk_that_fills_up_at_each_write_hides_no_job(submitter: Submitter) -> None:
    submitter.stage.mkdir()
    submitter.points *= 2
    jobs_taken = []
    for inodes in range(2, 24):
        tmpfs = ["mount", "-t", "tmpfs", "-o", f"nr_inodes={inodes}", "tmpfs", str(submitter.stage)]
        subprocess.run(tmpfs, check=True)
        try:
            said, _ = submitter.run()
            taken, _ = submitter.check()
            jobs_taken.append(taken)
            named = {word for advice in re.findall("`scancel (.*?)`", said) for word in advice.split()}
            assert "Traceback" not in said and len(named) == taken, said
        finally:
            subprocess.run(["umount", str(submitter.stage)], check=True)
        submitter.cluster.run("scancel", "--partition=closed", check=True)
        wait_for(lambda: not submitter.cluster.run("squeue", "-h", "-p", "closed").stdout, "cancelled jobs to go", 30)
    assert sorted(jobs_taken) == jobs_taken and {*jobs_taken} == {0, 1, 2}


def test_a_controller_that_does_not_answer_may_have_taken_the_job(
    submitter: Submitter, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitter.run()
    monkeypatch.setattr(slurm_commands, "TIMEOUT_S", 2)
    (controller,) = [pid for pid in processes_of(submitter.cluster.folder) if process_name(pid) == "slurmctld"]
    os.kill(controller, signal.SIGSTOP)
    try:
        said, _ = submitter.run()
    finally:
        os.kill(controller, signal.SIGCONT)
    assert "sbatch did not say whether Slurm took" in said
    time.sleep(2)
    assert sum(submitter.check()) == 2


def wrapped_sbatch(folder: Path, body: str) -> str:
    """Return a PATH on which `sbatch` is this script; `real` calls the cluster's own and keeps its answer."""
    folder.mkdir()
    sbatch = shutil.which("sbatch")
    (folder / "sbatch").write_text(f'#!/bin/bash\nreal() {{ {sbatch} "$@"; }}\n{body}\n')
    (folder / "sbatch").chmod(0o755)
    return f"{folder}{os.pathsep}{sbin_path()}"


def contents(stage: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(stage.glob("results/*/*/*/*/*/job.json"))]


def test_a_job_whose_submitter_was_killed_names_itself(scripts: Scripts, slurm: SlurmCluster) -> None:
    path = wrapped_sbatch(scripts.stage / "bin", 'real "$@" > /dev/null; kill -9 $PPID')
    done = scripts.run("train.py", *SUBMIT, *QUICK, "cluster.setup=['exit 3']", PATH=path)
    assert done.returncode < 0 or done.returncode == 137
    (job,) = wait_for(lambda: [job for job in contents(scripts.stage) if job["id"]], "the script to name itself", 30)
    assert slurm.wait_for_end(job["id"]) == "FAILED"
    assert scripts.jobs().count("FAILED") == 1


def test_ctrl_c_between_submissions_names_what_was_submitted(scripts: Scripts) -> None:
    body = 'real "$@"; [ $(ls -d "$STAGE_PATH"/results/*/*/*/*/* | wc -l) -lt 2 ] || kill -INT $PPID; sleep 1'
    path = wrapped_sbatch(scripts.stage / "bin", body)
    said = scripts.submit(*QUICK, *CLOSED, "trainer.max_steps=5,6,7", code=130, PATH=path)
    first, _ = (job["id"] for job in contents(scripts.stage))
    assert "1 of 3 jobs submitted" in said and f"`scancel {first}` takes them back" in said
    assert scripts.jobs().count("PENDING") == 2
    scripts.jobs("cancel", *(job["id"] for job in contents(scripts.stage)))


def test_percent_signs_in_the_stage_folder_are_no_patterns(scripts: Scripts, slurm: SlurmCluster) -> None:
    stage = scripts.stage / "100%j %t"
    stage.mkdir()
    scripts = Scripts(slurm, stage)
    scripts.submit(*QUICK, "gpu=h100", "precision=bf16", "cluster.setup=['exit 3']")
    job_id, run_dir = scripts.last()
    assert slurm.wait_for_end(job_id) == "FAILED"
    assert (run_dir / f"slurm-{job_id}.out").exists() and "FAILED" in scripts.jobs()
