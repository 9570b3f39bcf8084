"""The first error in a run's logs: its own line, and the log it stands in.

This module needs the standard library only: it runs inside nemo:24.09, with Python 3.10.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

# An error stands near the end of a log, before the stack traces that it causes.
READ_BYTES = 1 << 18
# A requeued job goes on in the file of its earlier start.
_EARLIER_START = re.compile(r"(?s)\A.*CANCELLED AT \S+ DUE TO (?:PREEMPTION|JOB REQUEUE)[^\n]*\n(?=.*\S)")
_LABEL = re.compile(r"^(?:\[rank\d+\]: ?|\d+: )")  # torch's and srun --label's, before each line of a traceback
_TRACEBACK = "Traceback (most recent call last)"
_CHAINED = ("During handling of the above exception", "The above exception was the direct cause")
_ERROR = re.compile(
    r"\b(?:srun|slurmstepd|slurmd|sbatch)(?:-[\w.-]+)?: (?:error|fatal): |srun: unrecognized option|\[ERROR\]"
    r"|(?:^|\()[\w.]*(?:Error|Exception): |\[E\d+ .*\]|NCCL WARN|CUDA error|Cuda failure|Fatal Python error"
    r"|terminate called|Segmentation fault|\*\*\* JOB .* CANCELLED|PMIX ERROR|\bexpecting \d+ got \d+"
    r"|: command not found|: \d+: .*: not found$|: No such file or directory|: Permission denied"
    r"|No space left on device"
)
# What Slurm and PMIx say of the other ranks once one has failed, and PyXis before it says what failed.
_CONSEQUENCE = re.compile(
    r"error: \S+: tasks? [\d,-]+: |error: \*\*\* STEP|Job step aborted|Terminating (?:StepId|job step)|Terminated"
    r"|PMIX ERROR|pyxis: (?:child \d+ failed|container start failed|printing enroot log)"
)
# How a rank ended, or that Slurm ended all of them.
_ENDING = re.compile(r"error: (?:\*\*\* |\S+: tasks? (?P<rank>\d+)[\d,-]*: (?P<ending>.*))")


@dataclass(frozen=True)
class FirstError:
    """An error, the log it stands in, and what the log says from there on."""

    log: Path
    line: str
    text: str
    killed_rank: int | None = None  # which Slurm saw killed before any other ended


def first_error(run_dir: Path, rank: int | None = None) -> FirstError | None:
    """Return the first error in the logs of a failed run; None if they have none.

    A rank that Slurm saw killed before any other ended comes first: the exceptions of others are consequences. Then
    comes the log of `rank`, the one that failed first; if that is not known, Slurm's log and after it those of all
    ranks.
    """
    first_rank = 0
    job_logs = sorted(run_dir.glob("slurm-*.out"), key=lambda path: path.stat().st_mtime)[-1:]
    for log in job_logs:
        text = _read_end(log)
        if (ending := _ENDING.search(text)) and ending["rank"]:
            if ending["ending"].startswith(("Killed", "Out Of Memory")):
                text = text[text.rfind("\n", 0, ending.start()) + 1 :]
                return FirstError(log, text.splitlines()[0], text, int(ending["rank"]))
            first_rank = int(ending["rank"])
    if rank is not None:
        logs = [run_dir / f"rank{rank}.out", *job_logs]
    else:
        rank_logs = sorted(run_dir.glob("rank*.out"), key=lambda path: (len(path.name), path.name))
        logs = job_logs + sorted(rank_logs, key=lambda path: path.name != f"rank{first_rank}.out")
    consequence = None
    for log in logs:
        error = error_in(log)
        if error is not None and not _CONSEQUENCE.search(error.line):
            return error
        consequence = consequence or error
    return consequence


def error_in(log: Path) -> FirstError | None:
    """Return the first error of one log: its last traceback's exception, else the first line that reads like one."""
    lines = _read_end(log).splitlines() if log.exists() else []
    number = _exception(lines)
    if number is None:
        errors = [number for number, line in enumerate(lines) if _ERROR.search(line)]
        causes = [number for number in errors if not _CONSEQUENCE.search(lines[number])]
        number = next(iter(causes or errors), None)
    if number is None:
        return None
    return FirstError(log, _LABEL.sub("", lines[number]).strip(), "\n".join(lines[number:]))


def _read_end(path: Path) -> str:
    """Return the end of a log: of a requeued job, what its last start said."""
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, 2) - READ_BYTES))
        return _EARLIER_START.sub("", file.read().decode("utf-8", errors="replace"))


def _exception(lines: list[str]) -> int | None:
    """Return the number of the line that names the last traceback's exception, or the one that it was caused by."""
    exception, in_traceback, chained = None, False, False
    for number, labelled in enumerate(lines):
        line = _LABEL.sub("", labelled)
        if _TRACEBACK in line:
            in_traceback = True
            if not chained:
                exception = None
        elif in_traceback and line.strip() and not line[0].isspace():
            in_traceback = chained = False
            exception = number if exception is None else exception
        elif line.startswith(_CHAINED):
            chained = True
    return exception
