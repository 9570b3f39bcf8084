"""The first error in a run's logs. Standard library only: this runs inside nemo:24.09, with Python 3.10."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# An error stands near the end of a log, before the stack traces that it causes.
READ_BYTES = 1 << 18
# A requeued job goes on in the file of its earlier start.
_EARLIER_START = re.compile(r"(?s)\A.*CANCELLED AT \S+ DUE TO (?:PREEMPTION|JOB REQUEUE)[^\n]*\n(?=.*\S)")
_LABEL = re.compile(r"^(?:\[rank\d+\]: ?|\d+: )")  # torch's and srun --label's, before each line of a traceback
# A traceback up to the line that names its exception, and what stands between it and one that it caused.
_TRACEBACK = re.compile(r"Traceback \(most recent call last\).*\n(?:\s.*\n|\n)*(?=\S)")
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
    r"|PMIX ERROR|pyxis: (?:child \d+ failed|container (?:start failed|exited too soon|was not)|printing enroot log)"
    r"|spank: required plugin|spank plugin stack"
)
# How srun saw ranks end, or that Slurm ended all of them.
_ENDING = re.compile(r"(?m)^.*?error: (?:\*\*\* |\S+: tasks? (?P<rank>\d+)(?P<others>[\d,-]*): (?P<ending>.*))")


@dataclass(frozen=True)
class FirstError:
    """An error, the log it stands in, and what the log says from there on."""

    log: Path
    line: str
    text: str
    rank: int | None = None  # which srun saw end before any other
    killed: bool = False  # that rank, by somebody or by the kernel


def first_ending(run_dir: Path) -> FirstError | None:
    """Return srun's line about the rank that ended first; None if there is none, or several ended at once."""
    for log in _job_log(run_dir):
        ending = _ENDING.search(text := read_end(log))
        if ending and ending["rank"]:
            killed = ending["ending"].startswith(("Killed", "Out Of Memory"))
            if killed or not ending["others"]:
                return FirstError(log, ending[0], text[ending.start() :], int(ending["rank"]), killed)
    return None


def first_error(run_dir: Path, rank: int | None = None) -> FirstError | None:
    """Return the first error in the logs of a failed run, of which `rank` failed first; None if they have none.

    A rank that was killed comes before all: the exceptions of others are consequences.
    """
    ending = first_ending(run_dir)
    if ending and ending.killed:
        return ending
    logs = [run_dir / f"rank{rank}.out", *_job_log(run_dir)]
    if rank is None:
        first_log = f"rank{ending.rank if ending else 0}.out"
        rank_logs = sorted(by_number(run_dir.glob("rank*.out")), key=lambda path: path.name != first_log)
        logs = [*_job_log(run_dir), *rank_logs]
    errors = [error for error in map(error_in, logs) if error]
    return min(errors, key=lambda error: bool(_CONSEQUENCE.search(error.line)), default=None)


def error_in(log: Path) -> FirstError | None:
    """Return the first error of one log: its last traceback's exception, else the first line that reads like one."""
    lines = read_end(log).splitlines() if log.exists() else []
    bare = [_LABEL.sub("", line) for line in lines]
    errors = _exceptions(bare) or [number for number, line in enumerate(lines) if _ERROR.search(line)]
    if not errors:
        return None
    first = min(errors, key=lambda number: bool(_CONSEQUENCE.search(lines[number])))
    return FirstError(log, bare[first].strip(), "\n".join(lines[first:]))


def _exceptions(lines: list[str]) -> list[int]:
    """Return the line that names the last traceback's exception, after those that it was caused by."""
    text, numbers, end = "\n".join(lines), list[int](), 0
    for traceback in _TRACEBACK.finditer(text):
        if not any(words in text[end : traceback.start()] for words in _CHAINED):
            numbers = []
        end = traceback.end()
        numbers.append(text.count("\n", 0, end))
    return numbers


def read_end(path: Path) -> str:
    """Return the end of a log: of a requeued job, what its last start said."""
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, 2) - READ_BYTES))
        return _EARLIER_START.sub("", file.read().decode("utf-8", errors="replace"))


def by_number(paths: Iterable[Path]) -> list[Path]:
    """Return paths in the order of the numbers in their names: rank10 after rank9."""
    return sorted(paths, key=lambda path: (len(path.name), path.name))


def _job_log(run_dir: Path) -> list[Path]:
    """Return the log of the last job in a folder, if there is one."""
    return sorted(run_dir.glob("slurm-*.out"), key=lambda path: path.stat().st_mtime)[-1:]
