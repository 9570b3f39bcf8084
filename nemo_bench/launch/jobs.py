"""Submitted jobs afterwards: listed, followed, shown, cancelled, resubmitted.

What is known of a Slurm job comes from three places: sacct, where the cluster keeps accounts; squeue, which forgets a
job minutes after its end; and the run folder, where the batch script leaves the exit status.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf.errors import OmegaConfBaseException

from nemo_bench.cluster import slurm
from nemo_bench.config import load
from nemo_bench.errors import BenchError, RunFailed
from nemo_bench.files import write_json
from nemo_bench.launch.diagnosis import failure_text
from nemo_bench.launch.plan import point_name
from nemo_bench.record import folder as record
from nemo_bench.report.logs import read_log

FOLLOW_INTERVAL_S = 2.0


@dataclass(frozen=True)
class Job:
    """One submitted run as it stands now."""

    job_id: str
    state: str  # Slurm's word
    run_dir: Path
    point: str
    max_steps: int
    steps: int  # recorded so far
    step_time_s: float | None  # of the last one
    reason: str | None = None

    @property
    def active(self) -> bool:
        return self.state in slurm.ACTIVE

    @property
    def failed(self) -> bool:
        return self.state in (*slurm.FAILURES, "CANCELLED")

    @property
    def ended(self) -> bool:
        return self.failed or self.state == "COMPLETED"


def submitted_runs(stage: Path) -> list[Path]:
    """Run folders under a stage folder that were submitted, the oldest first."""
    order = {}
    for path in stage.glob(f"results/*/*/*/*/*/{record.JOB}"):
        try:
            job = record.RunFolder(path.parent).job()
            number = [int(part) for part in job["id"].split("_")]
            order[path.parent] = (job["submitted_at"], number)
        except (OSError, ValueError, KeyError) as error:
            print(f"left out: {path}: {type(error).__name__}: {error}", file=sys.stderr)
    return sorted(order, key=lambda run_dir: order[run_dir])


def look(run_dirs: list[Path]) -> list[Job]:
    """How these runs stand now."""
    jobs = {run_dir: record.RunFolder(run_dir).job() for run_dir in run_dirs}
    states = slurm.states(job["id"] for job in jobs.values())
    found = []
    for run_dir, job in jobs.items():
        try:
            found.append(_job(run_dir, job, states))
        except (OSError, ValueError, OmegaConfBaseException) as error:  # one bad folder does not hide the others
            print(f"left out: {run_dir}: {str(error).splitlines()[0]}", file=sys.stderr)
    return found


def _job(run_dir: Path, job: dict[str, Any], states: dict[str, str]) -> Job:
    job_id = job["id"]
    cfg = load(run_dir / record.CONFIG)
    step, step_time_s = _last_step(run_dir)
    status = record.RunFolder(run_dir).status()
    state = states.get(job_id)
    if state is None:
        # Slurm has forgotten it: what the batch script left counts.
        state = {"completed": "COMPLETED", "failed": "FAILED", "killed": "FAILED"}.get(status.state, slurm.UNKNOWN)
    elif state == "PREEMPTED" and cfg.checkpoint.every_n_steps is not None:
        state = "REQUEUED"  # on its way back: it was submitted with --requeue
    return Job(
        job_id=job_id,
        state=state,
        run_dir=run_dir,
        point=point_name(cfg),
        max_steps=cfg.trainer.max_steps,
        steps=step + 1,
        step_time_s=step_time_s,
        reason=status.reason,
    )


def _last_step(run_dir: Path) -> tuple[int, float | None]:
    """Number and time of the last step so far; -1 before the first one."""
    rows, _ = record.read_lines(run_dir / record.STEPS)
    if rows:
        return int(rows[-1]["step"]), float(rows[-1]["train_step_timing_s"])
    try:
        log = read_log(record.RunFolder(run_dir).log(0))  # of a program that writes no record of ours
    except OSError:
        return -1, None
    return (log.step[-1], log.time_s[-1]) if log.step else (-1, None)


def table(jobs: list[Job]) -> Any:
    """The listing, for rich."""
    from rich.table import Table

    result = Table()
    for name in ("job", "state", "point", "step", "step time (s)", "ETA", "run folder"):
        right = name in ("step", "step time (s)", "ETA")
        result.add_column(name, justify="right" if right else "left", overflow="fold")
    for job in jobs:
        left = (job.max_steps - job.steps) * (job.step_time_s or 0)
        result.add_row(
            job.job_id,
            job.state + (f": {job.reason}" if job.failed and job.reason else ""),
            job.point,
            f"{job.steps}/{job.max_steps}",
            "" if job.step_time_s is None else f"{job.step_time_s:.4g}",
            f"{int(left) // 60}:{int(left) % 60:02d}" if job.active and job.step_time_s else "",
            str(job.run_dir),
        )
    return result


def follow(console: Any, run_dirs: list[Path]) -> None:
    """Shows these jobs until all have ended; Ctrl-C leaves them running.

    Raises:
        RunFailed: a job did not complete.
    """
    from rich.live import Live

    from nemo_bench.report.numbers import summarise
    from nemo_bench.report.terminal import print_summary

    if not run_dirs:
        console.print("no job is active")
        return
    try:
        if console.is_terminal:
            with Live(console=console, refresh_per_second=2) as live:
                while True:
                    jobs = look(run_dirs)
                    live.update(table(jobs))
                    if all(job.ended for job in jobs):
                        break
                    time.sleep(FOLLOW_INTERVAL_S)
        else:
            jobs = _follow_in_lines(console, run_dirs)
    except KeyboardInterrupt:
        raise RunFailed("stopped watching; the jobs go on: python jobs.py lists them", 130) from None
    if len(jobs) < len(run_dirs):
        raise RunFailed(f"{len(run_dirs) - len(jobs)} of {len(run_dirs)} run folders could not be read: see above")
    for job in jobs:
        if not job.failed:
            print_summary(console, summarise(job.run_dir))
    failed = [job for job in jobs if job.failed]
    if failed:
        told = "\n".join(f"  job {j.job_id} ({j.point}): {j.state}: {j.reason or 'see its log'}" for j in failed)
        raise RunFailed(
            f"{len(failed)} of {len(jobs)} jobs did not complete:\n{told}\npython jobs.py log JOB shows more"
        )
    console.print(f"all {len(jobs)} jobs completed")


def _follow_in_lines(console: Any, run_dirs: list[Path]) -> list[Job]:
    """A line for each change of state and each step."""
    shown: dict[str, tuple[str, int]] = {}
    while True:
        jobs = look(run_dirs)
        for job in jobs:
            now = (job.state, job.steps)
            if shown.get(job.job_id) != now:
                shown[job.job_id] = now
                timing = "" if job.step_time_s is None else f", {job.step_time_s:.4g} s a step"
                console.print(
                    f"{time.strftime('%H:%M:%S')} job {job.job_id} ({job.point}): {job.state}, "
                    f"step {job.steps}/{job.max_steps}{timing}",
                    highlight=False,
                )
        if all(job.ended for job in jobs):
            return jobs
        time.sleep(FOLLOW_INTERVAL_S)


def find(stage: Path, job_id: str) -> Path:
    """The run folder of a job.

    Raises:
        BenchError: no run under this stage folder has it.
    """
    runs = submitted_runs(stage)
    for run_dir in runs:
        if job_id == record.RunFolder(run_dir).job()["id"]:
            return run_dir
    known = [record.RunFolder(run_dir).job()["id"] for run_dir in runs]
    raise BenchError(
        f"no run under {stage} has the job {job_id}; known: {', '.join(known) or 'none'}\n"
        "--stage (or STAGE_PATH) names another stage folder"
    )


def log_text(run_dir: Path) -> str:
    """What a reader of a failed job looks for: its first error, what that means, then the end of the logs."""
    failure = failure_text(run_dir)
    parts = [failure] if failure else []
    logs = sorted(run_dir.glob("slurm-*.out"), key=lambda path: path.stat().st_mtime)
    failed = [int(error["rank"]) for error in record.RunFolder(run_dir).rank_errors()[:1]]
    logs += [record.RunFolder(run_dir).log(rank) for rank in (failed or [0])]
    for log in logs:
        if log.exists():
            parts.append(f"==> {log} <==\n" + "\n".join(record.tail(log, 40)))
    if parts:
        return "\n\n".join(parts)
    (job,) = look([run_dir])
    if job.failed:
        return f"{job.state}, and no log: are the nodes able to write {run_dir}? (STAGE_PATH must be a shared folder)"
    return f"{run_dir} has no log yet: the job is {job.state}"


def cancel(run_dirs: list[Path]) -> list[str]:
    """Cancels the jobs that are still active and returns their ids.

    Raises:
        BenchError: scancel refused.
    """
    active = [job for job in look(run_dirs) if not job.ended]
    slurm.scancel([job.job_id for job in active])
    return [job.job_id for job in active]


def resubmit(run_dir: Path) -> Any:
    """Submits a run again, with the very configuration it had, into a run folder of its own.

    Raises:
        BenchError: it is still active, or the scheduler refused.
    """
    from nemo_bench.launch.submission import submit_run

    (job,) = look([run_dir])
    if not job.ended:
        raise BenchError(f"job {job.job_id} is {job.state}: cancel it first (python jobs.py cancel {job.job_id})")
    old = record.RunFolder(run_dir).read()
    again = record.RunFolder.new(run_dir.parent).path
    cfg = load(run_dir / record.CONFIG)
    record.RunFolder(again).create(
        config_yaml=(run_dir / record.CONFIG).read_text(),
        command=["python", "jobs.py", "resubmit", job.job_id],
        overrides=old["overrides"],
        ranks=old["ranks"],
        state="submitted",
    )
    submitted = submit_run(cfg, again, old["overrides"])
    details = record.RunFolder(run_dir).job()
    write_json(run_dir / record.JOB, {**details, "resubmitted_as": submitted.job_id})
    return submitted


def to_resubmit(stage: Path) -> list[Path]:
    """Slurm's failed runs that were not submitted again yet; what was cancelled was meant to end."""
    return [
        job.run_dir
        for job in look(submitted_runs(stage))
        if job.state in slurm.FAILURES and "resubmitted_as" not in record.RunFolder(job.run_dir).job()
    ]
