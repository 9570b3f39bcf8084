"""Submitted jobs, runs of train.py and other commands alike: submitted, listed, followed, cancelled.

A job is a folder. It holds the batch script, `job.json` (what was submitted, and the id), the log `slurm-<id>.out` and,
once the batch script has ended, `exit.json`. How a job stands is Slurm's to say; where Slurm has forgotten it, what it
left in its folder counts.
"""

from __future__ import annotations

import calendar
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from submitit.slurm.slurm import SlurmJob

from nemo_bench.cluster import slurm
from nemo_bench.config import ClusterConfig
from nemo_bench.errors import BenchError, RunFailed
from nemo_bench.files import write_json
from nemo_bench.record import folder as record
from nemo_bench.report.runs import load_run
from nemo_bench.report.terminal import print_summary

FOLDERS = ("results/*/*/*/*/*", "results.data_preparation/*/*", "results.stage_setup/*")
NO_ID = "?"
# Slurm may know a job's end before a shared file system shows what the job left.
SETTLE_S = 10.0
TICK_S = 1.0
LOG_LINES = 40
TAIL_BYTES = 65536
# The clocks of the submitting machine and of the controller may differ.
CLOCKS_S = 300
# A progress bar's count of finished steps, in logs of programs that write no record of ours.
_STEP = re.compile(r"(\d+)/(?:\d+|\?) \[.*?train_step_timing in s[=:] ?([\d.]+)")


class Job(SlurmJob[None]):
    """One submitted job as it stood at the last `refresh`.

    submitit's own gives the registration with Slurm's books, `cancel()` and `wait()`. Its executor stops short of what
    is needed here: it runs sbatch without a time limit and in our own environment, cannot tell a refusal from no
    answer, writes into another folder where the path holds `%j`, and forgets the id when its last file cannot be
    written. So slurm.submit() calls sbatch itself, and nothing is pickled.
    """

    watcher = slurm.Books()

    def __init__(self, folder: Path, content: Mapping[str, Any]) -> None:
        self.folder, self.content = folder, content
        self.name = str(content.get("name") or folder.name)
        self.exit_code: int | None = None  # of the batch script, once it has ended
        self.steps = 0
        self.step_time_s: float | None = None  # of the last step
        self.current_state = slurm.UNKNOWN
        self.ended_at: float | None = None  # when its end was first seen
        super().__init__(folder, content.get("id") or NO_ID)

    def _register_in_watcher(self) -> None:
        self.registered = self.job_id != NO_ID and self.content.get("cluster") in (None, slurm.cluster_name())
        if self.registered:
            self.watcher.names.add(self.name)
            super()._register_in_watcher()

    @property
    def what(self) -> str:
        """The point, or the command's name."""
        return str(self.content.get("point") or self.name)

    @property
    def is_run(self) -> bool:
        return "point" in self.content

    @property
    def log(self) -> Path:
        return self.folder / f"slurm-{self.job_id}.out"

    @property
    def state(self) -> str:
        """Slurm's word."""
        return self.current_state

    @property
    def active(self) -> bool:
        return self.state in slurm.ACTIVE

    @property
    def failed(self) -> bool:
        return self.state in (*slurm.FAILURES, "CANCELLED")

    @property
    def ended(self) -> bool:
        return self.failed or self.state == "COMPLETED"

    @property
    def lost(self) -> bool:
        """Whether Slurm was asked and does not know the job, and the job left no sign of its end."""
        return self.state == slurm.UNKNOWN and self.watcher.answered

    @property
    def over(self) -> bool:
        """Whether nothing more will come of it."""
        return self.lost or (self.ended and self.exit_code is not None)

    def done(self, force_check: bool = False) -> bool:
        """Return whether it is over; submitit's own looks for a pickled result."""
        refresh([self])
        return self.over

    def refresh(self) -> None:
        """Read what Slurm said last, and what the job has left in its folder."""
        if self.ended and self.exit_code is not None:
            return
        self.exit_code = self._recorded_exit()
        self.current_state = self._slurm_state() or self._left_state() or slurm.UNKNOWN
        if self.is_run:
            self.steps, self.step_time_s = _last_step(self.folder)
        if self.ended and self.exit_code is None:
            self.ended_at = self.ended_at or time.monotonic()
            # A job that was cancelled or ran out of time leaves no exit status.
            if self.state not in ("COMPLETED", "FAILED") or time.monotonic() - self.ended_at > SETTLE_S:
                self.exit_code = int(self.failed)

    def _slurm_state(self) -> str | None:
        if not self.registered:
            return None
        info = self.watcher.get_info(self.job_id, mode="cache")
        if not info or not self._is_ours(info):
            return None
        state = info["State"].split()[0]  # "CANCELLED by 0" is CANCELLED
        # A preempted job that can go on is on its way back: it was submitted with --requeue.
        return "REQUEUED" if state == "PREEMPTED" and self.content.get("requeue", True) else state

    def _is_ours(self, info: Mapping[str, str]) -> bool:
        """Return whether Slurm speaks of this job: ids start over when a controller is installed anew."""
        if info.get("JobName", self.name) != self.name:
            return False
        try:
            later_s = time.mktime(time.strptime(info["Submit"], "%Y-%m-%dT%H:%M:%S")) - calendar.timegm(
                time.strptime(self.content["submitted_at"], "%Y-%m-%dT%H:%M:%SZ")
            )
        except (KeyError, ValueError):
            return True
        # By Slurm's account a requeued job was submitted when it was requeued.
        return later_s > -CLOCKS_S and (later_s < CLOCKS_S or self.content.get("requeue", True))

    def _recorded_exit(self) -> int | None:
        try:
            content = json.loads((self.folder / record.EXIT).read_bytes())
            return int(content["exit_code"]) if str(content["job_id"]) == self.job_id else None
        except (OSError, ValueError, KeyError, TypeError):  # not there, or cut off by a full disk
            return None

    def _left_state(self) -> str | None:
        if self.exit_code is not None:
            return "COMPLETED" if self.exit_code == 0 else "FAILED"
        try:
            ending = "\n".join(record.tail(self.log, LOG_LINES))
        except OSError:
            return None
        words = re.findall(rf"\*\*\* JOB {self.job_id} .*CANCELLED AT \S+(.*?) \*\*\*", ending)
        if not words:
            return None
        reasons = {"TIME LIMIT": "TIMEOUT", "NODE FAILURE": "NODE_FAIL", "PREEMPTION": "PREEMPTED"}
        return next((state for reason, state in reasons.items() if reason in words[-1]), "CANCELLED")

    def reason(self) -> str | None:
        """Return why it failed, in a line, where that is recorded."""
        if problem := self.content.get("problem"):
            return str(problem)
        if not (self.is_run and self.failed):
            return None
        try:
            return record.RunFolder(self.folder).status().reason
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"unreadable record: {error}"

    def log_text(self) -> str:
        """Return the ends of its logs; of a run, those of the rank that failed first, or of rank 0."""
        logs = [self.log]
        if self.is_run:
            run = record.RunFolder(self.folder)
            logs += [run.log(int(error["rank"])) for error in run.rank_errors()[:1]] or [run.log(0)]
        texts = [f"==> {log} <==\n" + "\n".join(record.tail(log, LOG_LINES)) for log in logs if log.exists()]
        if texts:
            return "\n\n".join(texts)
        if self.failed:
            return (
                f"{self.log} does not exist, and the job is {self.state}: can the nodes write {self.folder}? "
                "(STAGE_PATH must be a shared folder)"
            )
        return f"{self.log} does not exist yet: the job is {self.state}"


def _last_step(run_dir: Path) -> tuple[int, float | None]:
    """Return the number of finished steps, and the time of the last one."""
    for line in reversed(_tail(run_dir / record.STEPS).splitlines()):
        try:
            row = json.loads(line)
            return int(row["step"]) + 1, float(row["train_step_timing_s"])
        except (ValueError, KeyError, TypeError):  # cut off at either end
            continue
    shown = _STEP.findall(_tail(record.RunFolder(run_dir).log(0)))
    return (int(shown[-1][0]), float(shown[-1][1])) if shown else (0, None)


def _tail(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
            return file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""


def require_slurm(cluster: ClusterConfig) -> None:
    """Raise BenchError if these jobs cannot be submitted as configured."""
    if cluster.scheduler != "slurm":
        raise BenchError(f"cluster={cluster.name}: hydra/launcher=submitit_slurm needs cluster=slurm")


def require_sbatch() -> None:
    """Raise BenchError if this machine has no Slurm."""
    if not slurm.have_sbatch():
        raise BenchError(
            "sbatch is not on this machine: submit from a login node of the cluster, or leave hydra/launcher=... out "
            "to do it here; launch=dry prints the scripts"
        )


def show(script: str, *files: str) -> None:
    """Print a batch script, the text of other files of the job, and whether Slurm would take it."""
    print(script, *files, sep="\n")
    if slurm.have_sbatch():
        answer = slurm.test_only(script)
        print(f"sbatch --test-only: {'accepted' if answer.accepted else 'REFUSED'}: {answer.message}")


def submit(script: str, folder: Path, **details: Any) -> Job:
    """Submit a batch script as the job of `folder`.

    `job.json` is there before the job is, without an id: whatever happens then, the job is looked for by its script.

    Args:
        script: its batch script.
        folder: the job's folder.
        details: what `job.json` is to hold besides; `point` makes it a run.

    Raises:
        slurm.Refused: the scheduler does not take it; no `job.json` is left.
        BenchError: the job may have been submitted; the message says how to get hold of it.
    """
    content = {
        "id": None,
        "cluster": slurm.cluster_name(),
        "name": slurm.job_name(script),
        "submitted_at": record.timestamp(),
        "command": shlex.join(["python", *sys.argv]),
        **details,
    }
    write_json(folder / record.JOB, content)
    try:
        content["id"] = slurm.submit(script, folder)
    except slurm.Refused:
        (folder / record.JOB).unlink()
        raise
    try:
        write_json(folder / record.JOB, content)
    except OSError as error:
        job_id = content["id"]
        raise BenchError(f"job {job_id} was submitted, then: {error}\n`scancel {job_id}` takes it back") from None
    job = Job(folder, content)
    job.current_state = "PENDING"
    return job


def submitted(stage: Path) -> list[Job]:
    """Return all jobs that were submitted from this stage folder, the oldest first, as they stand now."""
    folders = [path.parent for pattern in FOLDERS for path in stage.glob(f"{pattern}/{record.JOB}")]
    contents = sorted(((_content(folder), folder) for folder in folders), key=lambda job: _age(job[0]))
    # Of several jobs of one id Slurm knows the last: ids start over when a controller is installed anew.
    newest = {(content.get("cluster"), content.get("id")): folder for content, folder in contents}
    jobs = []
    for content, folder in contents:
        if content.get("id") and newest[content.get("cluster"), content["id"]] != folder:
            content = {**content, "cluster": f"{content.get('cluster')} before its ids started over"}
        jobs.append(Job(folder, content))
    refresh(jobs)
    return jobs


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
        write_json(folder / record.JOB, content)
    return content


def _age(content: Mapping[str, Any]) -> tuple[str, int]:
    job_id = str(content.get("id"))
    return str(content.get("submitted_at", "")), int(job_id) if job_id.isdigit() else 0


def refresh(jobs: Iterable[Job]) -> None:
    """Ask Slurm again, if the last time is long enough ago, and read again how these jobs stand."""
    jobs = list(jobs)
    # A batch script that has ended is a reason to ask at once.
    ending = any(job.active and job.exit_code is not None for job in jobs)
    Job.watcher.update_if_long_enough("force" if ending else "standard")
    for job in jobs:
        job.refresh()


def find(jobs: Sequence[Job], job_id: str, stage: Path) -> Job:
    """Return the job of that id among those of a stage folder.

    Raises:
        BenchError: there is none.
    """
    for job in reversed(jobs):
        if job.job_id == job_id:
            return job
    known = ", ".join(job.job_id for job in jobs) or "none"
    raise BenchError(
        f"no job {job_id} was submitted from {stage}; known: {known}\n"
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
    """Return the listing. Cells are plain text: an error may hold square brackets, rich's own markup."""
    listing = Table()
    for name in ("job", "state", "point or command", "step", "step time (s)", "ETA", "folder"):
        right = name in ("step", "step time (s)", "ETA")
        listing.add_column(name, justify="right" if right else "left", overflow="fold")
    for job in jobs:
        max_steps = int(job.content.get("max_steps", 0))
        left_s = int((max_steps - job.steps) * (job.step_time_s or 0))
        reason = job.reason()
        cells = (
            job.job_id,
            job.state + (f": {reason}" if reason else ""),
            job.what,
            f"{job.steps}/{max_steps}" if job.is_run else "",
            f"{job.step_time_s:.4g}" if job.step_time_s is not None else "",
            f"{left_s // 60}:{left_s % 60:02d}" if job.active and job.step_time_s else "",
            str(job.folder),
        )
        listing.add_row(*(Text(cell) for cell in cells))
    return listing


def wait(jobs: Sequence[Job], tick: Callable[[], None]) -> None:
    """Wait until all jobs are over, calling `tick` at each look; Ctrl-C leaves them running.

    Raises:
        RunFailed: the watching was interrupted.
    """
    try:
        while True:
            refresh(jobs)
            tick()
            if all(job.over for job in jobs):
                return
            time.sleep(TICK_S)
    except KeyboardInterrupt:
        ids = " ".join(job.job_id for job in jobs if not job.over)
        raise RunFailed(f"stopped watching; the jobs go on ({ids}): python jobs.py follow shows them", 130) from None


def follow(console: Console, jobs: Sequence[Job]) -> None:
    """Show these jobs until all are over, then the numbers of the runs and the logs of the commands.

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
        lines = [f"  job {job.job_id} ({job.what}): {job.state}: {job.reason() or 'see its log'}" for job in failed]
        head = f"{len(failed)} of {len(jobs)} jobs did not complete:"
        exit_code = 1 if failed[0].is_run else failed[0].exit_code or 1
        raise RunFailed("\n".join([head, *lines, "python jobs.py log JOB shows more"]), exit_code)
    print(f"all {len(jobs)} jobs completed")


def _print_changes(jobs: Sequence[Job], shown: dict[str, str]) -> None:
    """Print a line for each job whose state or step has changed."""
    for job in jobs:
        timing = "" if job.step_time_s is None else f", {job.step_time_s:.4g} s a step"
        step = f", step {job.steps}/{job.content['max_steps']}{timing}" if job.is_run else ""
        line = f"job {job.job_id} ({job.what}): {job.state}{step}"
        if shown.get(job.job_id) != line:
            shown[job.job_id] = line
            print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)
