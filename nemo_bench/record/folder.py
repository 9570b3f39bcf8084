"""The run folder: everything a report needs, written so that a run killed at any moment is still readable.

========================  ============================================================================================
config.yaml               the composed configuration, every interpolation resolved
run.json                  command line, overrides, git revision, processes, state: rewritten whole at each change
job.json                  of a submitted run: the job's id, cluster, name, when it was submitted, and what it is
exit.json                 of a Slurm job: its exit status, by its batch script
node.json                 rank 0's machine: host, devices, driver, package versions, environment without secrets
steps.jsonl               a line a step (`step`, `loss`, `train_step_timing_s`, ...), flushed at once
events.jsonl              a line a phase, with its time: importing, building, training, validation, profile, done, ...
ranks.json                what each rank's device did, gathered after the last step
nemo_24_09.yaml           entrypoint=nemo_24_09: the whole configuration of its program, which logs in nemo/
rank<N>.out               everything rank N printed, NeMo's own `train_step_timing in s` lines on rank 0
rank<N>.error.json        the exception that ended rank N
peak_rank<N>.json         the measured matrix rate, on devices without a published peak
checkpoints/              where checkpoint.every_n_steps is set
profile/                  of a profiled run: rank<N>.trace.json.gz, and its time by kernel class: rank<N>.json, .txt;
                          or rank<N>.nsys-rep
========================  ============================================================================================

This module needs the standard library only: it runs inside nemo:24.09, with Python 3.10.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shlex
import socket
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nemo_bench.files import dated_name, write_json, write_text
from nemo_bench.record.first_error import first_error
from nemo_bench.record.node import git_revision

SCHEMA_VERSION = 1
CONFIG = "config.yaml"
RUN = "run.json"
JOB = "job.json"
STEPS = "steps.jsonl"
EVENTS = "events.jsonl"
CHECKPOINTS = "checkpoints"
PROFILE = "profile"
REQUEUE = "requeue"  # by rank 0 once a last checkpoint is safe; its batch script then asks for the requeue
EXIT = "exit.json"  # of a Slurm job, by its batch script


@dataclass(frozen=True)
class Status:
    """How a run stands or ended."""

    state: str  # submitted, running, completed, failed, killed or interrupted
    exit_code: int | None = None
    reason: str | None = None
    rank: int | None = None  # the rank that failed first
    ended_at: str | None = None

    @property
    def finished(self) -> bool:
        return self.state == "completed"


@dataclass(frozen=True)
class RunFolder:
    """One run's folder. Methods that read raise OSError where the file is missing, ValueError where it is damaged."""

    path: Path

    @classmethod
    def new(cls, results: Path) -> RunFolder:
        """Return `results/<date>-<time>-<random>`, unique also for runs started in the same second."""
        return cls(results / dated_name())

    def create(
        self,
        *,
        config_yaml: str,
        command: list[str],
        overrides: list[str],
        ranks: int,
        state: str = "running",
    ) -> None:
        """Make the folder of a run that this process is about to start, or to submit."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / CONFIG, config_yaml)
        write_json(
            self.path / RUN,
            {
                "schema_version": SCHEMA_VERSION,
                "run": self.path.name,
                "created_at": timestamp(),
                "command": shlex.join(command),
                "overrides": overrides,
                "git": git_revision(),
                "ranks": ranks,
                "launcher": {"host": socket.gethostname(), "pid": os.getpid(), "started": _process_start(os.getpid())},
                "status": asdict(Status(state)),
            },
        )

    def read(self) -> dict[str, Any]:
        """Return the content of `run.json`."""
        return _read_object(self.path / RUN)

    def job(self) -> dict[str, Any]:
        """Return the content of a submitted run's `job.json`."""
        return _read_object(self.path / JOB)

    def status(self) -> Status:
        """Return the recorded status; a running run whose launching process is gone from this host was killed.

        A Slurm job's end is in `exit.json`, which its batch script writes; without it, only Slurm knows.
        """
        content = self.read()
        status = Status(**content["status"])
        if status.state == "submitted":
            return self._job_status() or status
        launcher = content["launcher"]
        if (
            status.state == "running"
            and launcher["host"] == socket.gethostname()
            and _process_start(launcher["pid"]) != launcher["started"]
        ):
            return Status("killed", reason="the launching process is gone and recorded no end: it was killed")
        return status

    def _job_status(self) -> Status | None:
        try:
            end = _read_object(self.path / EXIT)
        except (FileNotFoundError, ValueError):  # a full disk leaves an empty file
            return None
        if end["exit_code"] == 0:
            return Status("completed", exit_code=0, ended_at=end["ended_at"])
        reason = f"exit status {end['exit_code']}"
        errors = self.rank_errors()
        rank = int(errors[0]["rank"]) if errors else None
        error = first_error(self.path, rank)
        if error and error.killed_rank is not None:
            rank, reason = error.killed_rank, error.line
        elif errors:
            message = (str(errors[0]["message"]).strip().splitlines() or [""])[0]
            reason = f"rank {rank} on {errors[0]['host']}: {errors[0]['type']}: {message}"
        elif error:
            reason += f": {error.line}"
        return Status("failed", exit_code=end["exit_code"], reason=reason, rank=rank, ended_at=end["ended_at"])

    def set_status(self, status: Status) -> None:
        """Record in `run.json` how the run ended."""
        content = self.read()
        content["status"] = asdict(replace(status, ended_at=status.ended_at or timestamp()))
        try:
            write_json(self.path / RUN, content)
        except OSError:
            # A full disk has no room for a second file, but the blocks of the first are ours.
            with open(self.path / RUN, "r+", encoding="utf-8") as file:
                file.write(json.dumps(content, indent=2) + "\n")
                file.truncate()

    def set_killed_with_launcher(self) -> None:
        """Record that the process that launched the run is gone, unless an end is recorded already."""
        if self.read()["status"]["state"] == "running":
            self.set_status(Status("killed", reason="the process that launched the run was killed"))

    def log(self, rank: int) -> Path:
        """Return the file of everything that `rank` prints."""
        return self.path / f"rank{rank}.out"

    def write_rank_error(self, rank: int, error: BaseException) -> None:
        """Record the exception that ended `rank`, for the launching process to show."""
        write_json(
            self.path / f"rank{rank}.error.json",
            {
                "rank": rank,
                "host": socket.gethostname(),
                "time": time.time(),
                "type": type(error).__name__,
                "message": str(error),
            },
        )

    def rank_errors(self) -> list[dict[str, Any]]:
        """Return all ranks' exceptions, the earliest first: later ones are often its consequences."""
        errors = [_read_object(path) for path in self.path.glob("rank*.error.json")]
        return sorted(errors, key=lambda error: float(error["time"]))

    def write_step(self, row: dict[str, Any]) -> None:
        """Append a line to `steps.jsonl`, with `time`: seconds since 1970 at the end of the step."""
        _append(self.path / STEPS, {**row, "time": round(time.time(), 6)})

    def write_peak(self, rank: int, peak: dict[str, object]) -> None:
        """Record the matrix rate that `rank` measured."""
        write_json(self.path / f"peak_rank{rank}.json", peak)

    def peaks(self) -> list[dict[str, Any]]:
        """Return the matrix rates that the ranks measured; empty where the peak is a published one."""
        return [_read_object(path) for path in sorted(self.path.glob("peak_rank*.json"))]

    def profiles(self) -> dict[str, dict[str, Any]]:
        """Return the time by kernel class of each profiled rank: file name -> content; {} where it is damaged."""
        profiles: dict[str, dict[str, Any]] = {}
        paths = (self.path / PROFILE).glob("rank*.json")
        for path in sorted(paths, key=lambda path: (len(path.name), path.name)):  # rank10 after rank9
            profiles[path.name] = {}
            with contextlib.suppress(OSError, ValueError):
                profiles[path.name] = _read_object(path)
        return profiles

    def last_checkpoint(self) -> Path | None:
        """Return the last finished checkpoint, or this folder itself where it is one; None if there is none.

        NeMo marks a checkpoint that is being written by a file next to it, `<name>-unfinished`.
        """
        checkpoints = [
            (int(match[1]), path)
            for path in [self.path, *(self.path / CHECKPOINTS).glob("step=*")]
            if (match := re.match(r"step=(\d+)", path.name))
            and (path / "weights").is_dir()
            and not path.with_name(path.name + "-unfinished").exists()
        ]
        return max(checkpoints)[1] if checkpoints else None


class EventLog:
    """`events.jsonl`; one rank writes it, the others hold one that is not enabled."""

    def __init__(self, run: RunFolder, *, enabled: bool = True) -> None:
        self.run, self.enabled = run, enabled

    def write(self, event: str, **details: Any) -> None:
        if self.enabled:
            _append(self.run.path / EVENTS, {"event": event, "time": round(time.time(), 3), **details})


def _append(path: Path, row: dict[str, Any]) -> None:
    """Append a JSON line. NaN and infinity, which JSON lacks, become the strings that float() reads."""
    infinite = {key: str(value) for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
    # Opened for each line (some 30 us): NeMo copies callbacks, and an open file cannot be copied.
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({**row, **infinite}) + "\n")


def read_lines(path: Path, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """Return the complete JSON lines of `path` from byte `offset` on, and the offset to go on from.

    A last line without its end, from a process that is writing it or was killed over it, is left for the next call.
    """
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read()
    except FileNotFoundError:
        return [], offset
    complete = data.rfind(b"\n") + 1
    rows = []
    for line in data[:complete].splitlines():
        with contextlib.suppress(ValueError):  # cut off by a kill, and the next start's first line behind it
            rows.append(json.loads(line))
    return rows, offset + complete


def tail(path: Path, lines: int) -> list[str]:
    """Return the last lines of a log, however large it is."""
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 65536))
        text = file.read().decode("utf-8", errors="replace")
    # A progress bar overwrites its line with carriage returns: the last version counts.
    last_versions = [line.rsplit("\r", 1)[-1].rstrip() for line in text.splitlines()]
    return [line for line in last_versions if line][-lines:]


def timestamp() -> str:
    """Return the time now, in UTC, ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _process_start(pid: int) -> str | None:
    """Return when a process started, in boot ticks: it tells it from a later one of that number. None: it is gone."""
    try:
        # The second field, the program's name in parentheses, may hold blanks.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _read_object(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text())
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content
