"""One submitted job: how it stands, by what Slurm says and by what it left in its folder."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from submitit.slurm.slurm import SlurmJob

from nemo_bench.cluster import slurm
from nemo_bench.record import folder as record

# Slurm may know a job's end before a shared file system shows what the job left.
SETTLE_S = 10.0
LOG_LINES = 40
# The clocks of the submitting machine and of the controller may differ.
CLOCKS_S = 300
# A progress bar's count of finished steps, in logs of programs that write no record of ours.
_STEP = re.compile(r"(\d+)/(?:\d+|\?) \[.*?train_step_timing in s[=:] ?([\d.]+)")


class Job(SlurmJob[None]):
    """One submitted job as it stood when `done()` was last called.

    submitit's own gives the registration with Slurm's books, `cancel()` and `wait()`. Its executor stops short of what
    is needed here: it runs sbatch without a time limit and in our own environment, cannot tell a refusal from no
    answer, writes into another folder where the path holds `%j`, and forgets the id when its last file cannot be
    written. So slurm.submit() calls sbatch itself, and nothing is pickled.
    """

    watcher = slurm.Books()
    state = slurm.UNKNOWN  # Slurm's word

    def __init__(self, folder: Path, content: Mapping[str, Any]) -> None:
        self.folder, self.content = folder, content
        self.name = str(content.get("name") or folder.name)
        self.what = str(content.get("point") or self.name)
        self.is_run = "point" in content
        self.exit_code: int | None = None  # of the batch script, once it has ended
        self.steps = 0
        self.step_time_s: float | None = None  # of the last step
        self._ended_at: float | None = None  # when its end was first seen
        super().__init__(folder, str(content.get("id") or "?"))
        self.log = folder / f"slurm-{self.job_id}.out"

    def _register_in_watcher(self) -> None:
        self.registered = bool(self.content.get("id")) and self.content.get("cluster") in (None, slurm.cluster_name())
        if self.registered:
            self.watcher.names.add(self.name)
            super()._register_in_watcher()

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
        """Ask Slurm, if the last time is long enough ago, read what the job has left, and return whether it is over."""
        self.watcher.refresh(soon=self.active and self.exit_code is not None)
        if self.ended and self.exit_code is not None:
            return True
        self.exit_code = self._recorded_exit()
        self.state = self._slurm_state() or self._left_state()
        if self.is_run:
            self.steps, self.step_time_s = self._last_step()
        if self.ended and self.exit_code is None:
            self._ended_at = self._ended_at or time.monotonic()
            # A job that was cancelled or ran out of time leaves no exit status.
            if self.state not in ("COMPLETED", "FAILED") or time.monotonic() - self._ended_at > SETTLE_S:
                self.exit_code = int(self.failed)
        return self.over

    def _slurm_state(self) -> str | None:
        info = self.watcher.get_info(self.job_id, mode="cache") if self.registered else {}
        if not info or not self._is_ours(info):
            return None
        state = info["State"].split()[0]  # "CANCELLED by 0" is CANCELLED
        # A preempted job that can go on is on its way back: it was submitted with --requeue.
        return "REQUEUED" if state == "PREEMPTED" and self.content.get("requeue", True) else state

    def _is_ours(self, info: Mapping[str, str]) -> bool:
        """Return whether Slurm speaks of this job: ids start over when a controller is installed anew."""
        if info.get("JobName") != self.name:
            return False
        try:
            slurm_time = datetime.fromisoformat(info["Submit"]).astimezone()
            our_time = datetime.fromisoformat(self.content["submitted_at"].replace("Z", "+00:00"))
        except (KeyError, ValueError):
            return True
        later_s = (slurm_time - our_time).total_seconds()
        # By Slurm's account a requeued job was submitted when it was requeued.
        return later_s > -CLOCKS_S and (later_s < CLOCKS_S or self.content.get("requeue", True))

    def _recorded_exit(self) -> int | None:
        try:
            content = json.loads((self.folder / record.EXIT).read_bytes())
            return int(content["exit_code"]) if str(content["job_id"]) == self.job_id else None
        except (OSError, ValueError, KeyError, TypeError):  # not there, or cut off by a full disk
            return None

    def _left_state(self) -> str:
        if self.exit_code is not None:
            return "COMPLETED" if self.exit_code == 0 else "FAILED"
        ending = "\n".join(_tail(self.log, LOG_LINES))
        words = re.findall(rf"\*\*\* JOB {self.job_id} .*CANCELLED AT \S+(.*?) \*\*\*", ending)
        if not words:
            return slurm.UNKNOWN
        reasons = {"TIME LIMIT": "TIMEOUT", "NODE FAILURE": "NODE_FAIL", "PREEMPTION": "PREEMPTED"}
        return next((state for reason, state in reasons.items() if reason in words[-1]), "CANCELLED")

    def _last_step(self) -> tuple[int, float | None]:
        """Return the number of finished steps, and the time of the last one."""
        for line in reversed(_tail(self.folder / record.STEPS, 2)):
            try:
                row = json.loads(line)
                return int(row["step"]) + 1, float(row["train_step_timing_s"])
            except (ValueError, KeyError, TypeError):  # cut off
                continue
        shown = _STEP.findall("\n".join(_tail(record.RunFolder(self.folder).log(0), 1000)))
        return (int(shown[-1][0]), float(shown[-1][1])) if shown else (0, None)

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
            logs.append(run.log(next((int(error["rank"]) for error in run.rank_errors()), 0)))
        texts = ["\n".join([f"==> {log} <==", *_tail(log, LOG_LINES)]) for log in logs if log.exists()]
        if not texts:
            texts = [f"{self.log} does not exist: the job is {self.state}"]
            if self.state == "FAILED":
                texts.append(f"can the nodes write {self.folder}? STAGE_PATH must be a shared folder")
        return "\n\n".join(texts)


def _tail(path: Path, lines: int) -> list[str]:
    """Return the last lines of a file; none where it does not exist."""
    try:
        return record.tail(path, lines)
    except OSError:
        return []
