"""Submitted jobs, runs of train.py and other commands alike: submitted, listed, followed, cancelled.

A job is a folder. It holds the batch script, `job.json` (what was submitted, and the id), the log `slurm-<id>.out` and,
once the batch script has ended, `exit.json`.
"""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from nemo_bench.cluster import slurm
from nemo_bench.cluster.job import Job
from nemo_bench.config import ClusterConfig
from nemo_bench.errors import BenchError, RunFailed
from nemo_bench.files import write_json
from nemo_bench.record import folder as record
from nemo_bench.report.runs import load_run
from nemo_bench.report.terminal import print_summary

FOLDERS = ("results/*/*/*/*/*", "results.data_preparation/*/*", "results.stage_setup/*")
TICK_S = 1.0
SHOWN_IDS = 12


def require_slurm(cluster: ClusterConfig) -> None:
    if cluster.scheduler != "slurm":
        raise BenchError(f"cluster={cluster.name}: hydra/launcher=submitit_slurm needs cluster=slurm")


def require_sbatch() -> None:
    if not slurm.have_sbatch():
        raise BenchError(
            "sbatch is not on this machine: submit from a login node of the cluster.\n"
            "launch=dry prints the scripts; without hydra/launcher=... (train.py: and with scale=local) it is done here"
        )


def show(script: str, *files: str) -> bool:
    """Print a batch script and the text of other files of the job; return whether Slurm, if it is there, takes it."""
    print(script, *files, sep="\n")
    if not slurm.have_sbatch():
        return True
    accepted, words = slurm.test_only(script)
    print(f"sbatch --test-only: {words}")
    return accepted


def submit(script: str, folder: Path, **details: Any) -> Job:
    """Submit a batch script as the job of `folder`.

    `job.json` is there before the job is, without an id: whatever happens then, the job is looked for by its script.

    Args:
        details: what `job.json` is to hold besides; `point` makes it a run.

    Raises:
        slurm.Refused: the scheduler does not take it; no `job.json` is left.
        BenchError: the job may have been submitted; the message says how to get hold of it.
    """
    name = slurm.job_name(script)
    content = {
        "id": None,
        "cluster": slurm.cluster_name(),
        "name": name,
        "submitted_at": record.timestamp(),
        "command": shlex.join(["python", *sys.argv]),
        **details,
    }
    write_json(folder / record.JOB, content)
    try:
        content["id"] = job_id = slurm.submit(script, folder, name)
    except slurm.Refused:
        (folder / record.JOB).unlink()
        raise
    try:
        write_json(folder / record.JOB, content)
    except OSError as error:
        raise BenchError(f"job {job_id} was submitted, then: {error}\n`scancel {job_id}` takes it back") from None
    job = Job(folder, content)
    job.state = "PENDING"
    return job


def submitted(stage: Path) -> list[Job]:
    """Return all jobs that were submitted from this stage folder, the oldest first, as they stand now."""
    folders = [path.parent for pattern in FOLDERS for path in stage.glob(f"{pattern}/{record.JOB}")]
    contents = sorted(((folder, _content(folder)) for folder in folders), key=_age)
    # Of several jobs of one id Slurm knows the last: ids start over when a controller is installed anew.
    newest = {(content.get("cluster"), content.get("id")): folder for folder, content in contents}
    jobs = []
    for folder, content in contents:
        cluster = content.get("cluster")
        if content.get("id") and newest[cluster, content["id"]] != folder:
            content["cluster"] = f"{cluster} before its ids started over"
        jobs.append(Job(folder, content))
    for job in jobs:
        job.done()
    return jobs


def _age(job: tuple[Path, dict[str, Any]]) -> tuple[str, int, str]:
    _, content = job
    job_id = str(content.get("id"))
    return str(content.get("submitted_at", "")), len(job_id), job_id


def _content(folder: Path) -> dict[str, Any]:
    """Return what `job.json` holds, with the id that Slurm knows where its submission was interrupted."""
    try:
        content = record.RunFolder(folder).job()
    except (OSError, ValueError) as error:
        return {"problem": f"unreadable {record.JOB}: {error}"}
    if content.get("id") is None:
        content["id"] = slurm.find(folder, str(content.get("name")))
        if content["id"] is None:
            return {**content, "problem": "its submission was interrupted, and Slurm knows no job of this folder"}
        with contextlib.suppress(OSError):  # another user's
            write_json(folder / record.JOB, content)
    return content


def find(jobs: Sequence[Job], job_id: str, stage: Path) -> Job:
    """Return the job of that id among those of a stage folder.

    Raises:
        BenchError: there is none.
    """
    for job in reversed(jobs):
        if job.job_id == job_id:
            return job
    last = ", ".join(job.job_id for job in jobs[-SHOWN_IDS:]) or "none"
    raise BenchError(
        f"no job {job_id} was submitted from {stage}; the last ones: {last}\n"
        "--stage (or STAGE_PATH) names another stage folder"
    )


def cancel(jobs: Iterable[Job]) -> list[str]:
    """Cancel the jobs that are still active and return their ids.

    Raises:
        BenchError: scancel refused.
    """
    active = [job for job in jobs if job.active]
    for job in active:
        try:
            job.cancel()
        except subprocess.CalledProcessError:
            raise BenchError(f"scancel {job.job_id} failed") from None
    return [job.job_id for job in active]


def table(jobs: Iterable[Job]) -> Table:
    """Return the listing."""
    listing = Table()
    for name in ("job", "state", "point or command"):
        listing.add_column(name, overflow="fold")
    for name in ("step", "step time (s)", "ETA"):
        listing.add_column(name, justify="right")
    listing.add_column("folder", overflow="fold")
    for job in jobs:
        max_steps = int(job.content.get("max_steps", 0))
        left_s = int((max_steps - job.steps) * (job.step_time_s or 0))
        cells = (
            job.job_id,
            ": ".join(filter(None, [job.state, job.reason()])),
            job.what,
            f"{job.steps}/{max_steps}" if job.is_run else "",
            f"{job.step_time_s:.4g}" if job.step_time_s is not None else "",
            f"{left_s // 60}:{left_s % 60:02d}" if job.active and job.step_time_s else "",
            str(job.folder),
        )
        listing.add_row(*map(Text, cells))  # plain: an error may hold square brackets, rich's own markup
    return listing


def wait(jobs: Sequence[Job], tick: Callable[[], None]) -> None:
    """Wait until all jobs are over, calling `tick` at each look; Ctrl-C leaves them running.

    Raises:
        RunFailed: the watching was interrupted.
    """
    try:
        while not all([job.done() for job in jobs]):
            tick()
            time.sleep(TICK_S)
        tick()
    except KeyboardInterrupt:
        ids = " ".join(job.job_id for job in jobs if not job.over)
        raise RunFailed(f"stopped watching; the jobs go on ({ids}): python jobs.py follow shows them", 130) from None


def follow(console: Console, jobs: Sequence[Job], explain: Callable[[Path], str] | None = None) -> None:
    """Show these jobs until all are over, then the numbers of the runs and the logs of the commands.

    Args:
        explain: returns why the run in a folder failed, and what to do.

    Raises:
        RunFailed: a job did not complete, or the watching was interrupted.
    """
    if not jobs:
        console.print("no job is active")
        return
    if console.is_terminal:
        with Live(console=console, refresh_per_second=2) as live:
            wait(jobs, lambda: live.update(table(jobs)))
    else:
        shown: dict[str, str] = {}
        wait(jobs, lambda: _print_changes(jobs, shown))
    for job in jobs:
        if not job.is_run:
            print(job.log_text())
        elif job.state == "COMPLETED":
            print_summary(console, load_run(job.folder))
    failed = [job for job in jobs if job.state != "COMPLETED"]
    if failed:
        lines = [f"{len(failed)} of {len(jobs)} jobs did not complete:"]
        for job in failed:
            lines.append(f"  job {job.job_id} ({job.what}): {job.state}: {job.reason() or 'see its log'}")
            if explain is not None and job.is_run:
                lines += [f"    {line}" for line in explain(job.folder).splitlines()]
        lines += ["python jobs.py log JOB shows more"]
        raise RunFailed("\n".join(lines), 1 if failed[0].is_run else failed[0].exit_code or 1)
    print(f"all {len(jobs)} jobs completed")


def _print_changes(jobs: Sequence[Job], shown: dict[str, str]) -> None:
    """Print a line for each job whose state or step has changed."""
    for job in jobs:
        timing = "" if job.step_time_s is None else f", {job.step_time_s:.4g} s a step"
        step = f", step {job.steps}/{job.content.get('max_steps')}{timing}" if job.is_run else ""
        line = f"job {job.job_id} ({job.what}): {job.state}{step}"
        if shown.get(job.job_id) != line:
            shown[job.job_id] = line
            print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)
