"""One submitted job: how it stands, by what Slurm says and by what it left in its folder."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from submitit.slurm.slurm import SlurmJob

from nemo_bench.cluster import slurm
from nemo_bench.record.folder import Progress, RunFolder, Status, job_end, tail

# Slurm may know a job's end before a shared file system shows what the job left.
SETTLE_S = 10.0
LOG_LINES = 40
INCOMPLETE = "INCOMPLETE"  # Slurm's COMPLETED, of a run that ended before its last step
FAILURES = (*slurm.FAILURES, INCOMPLETE)
_SLURMS_WORDS = {"TIME LIMIT": "TIMEOUT", "NODE FAILURE": "NODE_FAIL", "PREEMPTION": "PREEMPTED"}


class Job(SlurmJob[None]):
    """One submitted job as it stood when `done()` was last called.

    submitit's executor is not used: it runs sbatch without a time limit, cannot tell a refusal from no answer, and
    forgets the id when its last file cannot be written.
    """

    watcher = slurm.Books()
    state = slurm.UNKNOWN  # Slurm's word, or INCOMPLETE
    progress = Progress()
    exit_code: int | None = None  # of the batch script, once it has ended
    ended_at = 0.0  # when its end was first seen
    over = False  # whether nothing more will come of it

    def __init__(self, folder: Path, content: Mapping[str, Any]) -> None:
        self.folder, self.content = folder, content
        self.name = str(content.get("name") or folder.name)
        self.what = str(content.get("point") or self.name)
        self.is_run = "point" in content
        self.reason: str | None = content.get("problem")  # why it failed, or that its steps have stopped
        super().__init__(folder, str(content.get("id") or "?"))
        self.log = folder / f"slurm-{self.job_id}.out"

    def _register_in_watcher(self) -> None:
        self.registered = bool(self.content.get("id"))
        if self.registered:
            self.watcher.names.add(self.name)
            super()._register_in_watcher()

    @property
    def active(self) -> bool:
        """Whether it runs, or will without anybody's help; also while Slurm does not answer."""
        if self.state == slurm.UNKNOWN:
            return self.registered and not self.watcher.answered
        return self.state not in (*FAILURES, "COMPLETED", "CANCELLED")

    def done(self, force_check: bool = False) -> bool:
        """Ask Slurm, if the last time is long enough ago, read what the job has left, and return whether it is over."""
        if self.over:
            return True
        end = job_end(self.folder)
        self.exit_code = end.exit_code if end else None
        self.state = self._slurm_state() or _left_state(end)
        if self.is_run:
            self._read_record()
        if not self.active:
            self.ended_at = self.ended_at or time.monotonic()
            settled = end is not None or time.monotonic() - self.ended_at > SETTLE_S
            self.over = settled or self.state == slurm.UNKNOWN
        return self.over

    def _slurm_state(self) -> str | None:
        info = self.watcher.get_info(self.job_id) if self.registered else {}
        # Ids start over when a controller is installed anew, and other clusters have them too.
        if not info or not (self.content.get("adopted") or slurm.is_script_of(self.folder, info["Command"])):
            return None
        state = info["State"].split()[0]  # "CANCELLED by 0" is CANCELLED
        # A preempted job that can go on is on its way back: it was submitted with --requeue.
        return "REQUEUED" if state == "PREEMPTED" and self.content.get("requeue", True) else state

    def _read_record(self) -> None:
        run = RunFolder(self.folder)
        try:
            status = run.status()
            self.progress, self.reason = run.progress(), self.content.get("problem") or status.reason
            if self.state == "COMPLETED" and status.state == "failed":
                self.state = INCOMPLETE
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.reason = f"unreadable record: {error}"

    def log_text(self) -> str:
        """Return the ends of its logs; of a run, those of the rank that failed first, or of rank 0."""
        logs = [self.log]
        if self.is_run:
            run = RunFolder(self.folder)
            logs.append(run.log(next((int(error["rank"]) for error in run.rank_errors()), 0)))
        texts = ["\n".join([f"==> {log} <==", *tail(log, LOG_LINES)]) for log in logs if log.exists()]
        missing = f"{self.log} does not exist: the job is {self.state}; the nodes must be able to write {self.folder}"
        return "\n\n".join(texts) or missing


def _left_state(end: Status | None) -> str:
    """Return Slurm's word for what a job has left."""
    if end is None:
        return slurm.UNKNOWN
    if end.exit_code is not None:
        return "FAILED" if end.exit_code else "COMPLETED"
    return next((state for words, state in _SLURMS_WORDS.items() if words in str(end.reason)), "CANCELLED")
