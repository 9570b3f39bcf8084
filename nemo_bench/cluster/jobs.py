"""A command of this project as a Slurm job on one node: data preparation, filling the stage folder.

Its folder holds the batch script, `job.json` with the id, the log `slurm-<id>.out`, and at its end `exit.json`.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_bench.cluster import slurm
from nemo_bench.config import ClusterConfig
from nemo_bench.errors import BenchError, RunFailed
from nemo_bench.record import folder as record

FOLLOW_INTERVAL_S = 1.0
# Slurm may know a job's end before the shared file system shows what it left.
_SETTLE_S = 10.0


@dataclass
class CommandJob:
    """A submitted command as it stands."""

    name: str
    job_id: str
    folder: Path
    command: str  # as the user gave it
    state: str = "PENDING"  # Slurm's word
    exit_code: int | None = None  # of the command, once it has ended

    @property
    def log(self) -> Path:
        return self.folder / f"slurm-{self.job_id}.out"

    @property
    def ended(self) -> bool:
        return self.exit_code is not None


def require_slurm(cluster: ClusterConfig) -> None:
    """Raise BenchError if these jobs cannot be submitted as configured."""
    if cluster.scheduler != "slurm":
        raise BenchError(f"cluster={cluster.name}: hydra/launcher=submitit_slurm needs cluster=slurm")


def require_sbatch() -> None:
    """Raises BenchError where there is no Slurm."""
    if not slurm.have_sbatch():
        raise BenchError(
            "sbatch is not on this machine: submit from a login node of the cluster, or leave hydra/launcher=... out "
            "to do it here; launch=dry prints the scripts"
        )


def show(cluster: ClusterConfig, name: str, command: list[str], folder: Path) -> None:
    """Prints what would be submitted, and whether Slurm would take it."""
    script = slurm.command_script(cluster, name, command, folder)
    print(script)
    if slurm.have_sbatch():
        answer = slurm.test_only(script)
        print(f"sbatch --test-only: {'accepted' if answer.accepted else 'REFUSED'}: {answer.message}")


def submit(cluster: ClusterConfig, name: str, command: list[str], folder: Path) -> CommandJob:
    """Submits one command.

    Raises:
        BenchError: the scheduler refused.
    """
    job_id = slurm.submit(slurm.command_script(cluster, name, command, folder), name, folder)
    given = shlex.join(["python", *sys.argv])
    record.RunFolder(folder).set_job(job_id, name=name, command=given)
    return CommandJob(name, job_id, folder, given)


def submitted(stage: Path) -> list[CommandJob]:
    """The commands that were submitted from this stage folder, the oldest first, as they stand now."""
    found = []
    for path in [
        *stage.glob(f"results.data_preparation/*/*/{record.JOB}"),
        *stage.glob(f"results.stage_setup/*/{record.JOB}"),
    ]:
        try:
            content = record.RunFolder(path.parent).job()
            job = CommandJob(content["name"], content["id"], path.parent, content["command"])
            found.append((content["submitted_at"], job))
        except (OSError, ValueError, KeyError) as error:
            print(f"left out: {path}: {type(error).__name__}: {error}", file=sys.stderr)
    jobs = [job for _, job in sorted(found, key=lambda row: (row[0], row[1].name))]
    states = slurm.states(job.job_id for job in jobs)
    for job in jobs:
        job.exit_code = _exit_code(job)
        ended = {None: slurm.UNKNOWN, 0: "COMPLETED"}.get(job.exit_code, "FAILED")
        job.state = states.get(job.job_id, ended)
    return jobs


def log_text(job: CommandJob) -> str:
    """The end of the job's log."""
    if not job.log.exists():
        return f"{job.log} is not there: the job is {job.state}"
    return f"==> {job.log} <==\n" + "\n".join(record.tail(job.log, 40))


def not_resubmitted(job: CommandJob) -> BenchError:
    """The error that tells how a command is run again."""
    return BenchError(
        f"job {job.job_id} ({job.name}) is no run of train.py: the same command again does what is still missing\n"
        f"  {job.command}"
    )


def table(jobs: list[CommandJob]) -> Any:
    """The listing, for rich."""
    from rich.table import Table

    result = Table()
    for name in ("job", "state", "command", "folder"):
        result.add_column(name, overflow="fold")
    for job in jobs:
        result.add_row(job.job_id, job.state, job.name, str(job.folder))
    return result


def follow(jobs: list[CommandJob], tick: Callable[[], None]) -> None:
    """Waits until all have ended, calling `tick` at each look; Ctrl-C leaves them running.

    Raises:
        RunFailed: the watching was interrupted.
    """
    over: dict[str, float] = {}  # when Slurm was first seen to say so
    try:
        while True:
            states = slurm.states(job.job_id for job in jobs if not job.ended)
            for job in jobs:
                if job.ended:
                    continue
                job.state = states.get(job.job_id, job.state)
                job.exit_code = _exit_code(job)
                if job.exit_code is None and job.state in (*slurm.FAILURES, "CANCELLED", "COMPLETED"):
                    if time.monotonic() - over.setdefault(job.job_id, time.monotonic()) > _SETTLE_S:
                        job.exit_code = 1  # it never came to write its exit status
                elif job.exit_code is not None:
                    job.state = "COMPLETED" if job.exit_code == 0 else "FAILED"
            tick()
            if all(job.ended for job in jobs):
                return
            time.sleep(FOLLOW_INTERVAL_S)
    except KeyboardInterrupt:
        ids = " ".join(job.job_id for job in jobs if not job.ended)
        raise RunFailed(
            f"stopped watching; the jobs go on ({ids}): python jobs.py follow shows them",
            130,
        ) from None


def follow_to_end(jobs: list[CommandJob]) -> None:
    """Waits until all have ended, and prints the ends of their logs; Ctrl-C leaves them running.

    Raises:
        RunFailed: a job did not complete, or the watching was interrupted.
    """
    # Of a job that Slurm has forgotten no end will come.
    follow([job for job in jobs if job.state != slurm.UNKNOWN], lambda: None)
    for job in jobs:
        print(log_text(job))
    failed = [job for job in jobs if job.exit_code != 0]
    if failed:
        told = ", ".join(f"job {job.job_id} did not complete ({job.state})" for job in failed)
        raise RunFailed(f"{told}: the end of its log, where it has one, is above", failed[0].exit_code or 1)


def _exit_code(job: CommandJob) -> int | None:
    try:
        content: dict[str, Any] = json.loads((job.folder / record.EXIT).read_bytes())
    except (OSError, ValueError):
        return None
    return int(content["exit_code"]) if str(content.get("job_id")) == job.job_id else None
