"""The run folder (docs/run_folder.md), readable at any moment. Standard library only, for nemo:24.09's Python 3.10."""

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
from typing import Any, TypeVar

from nemo_bench.files import write_json, write_text
from nemo_bench.record.first_error import first_ending, first_error, read_end
from nemo_bench.record.node import git_revision

T = TypeVar("T")
CONFIG, RUN, JOB = "config.yaml", "run.json", "job.json"
STEPS, EVENTS = "steps.jsonl", "events.jsonl"
STRAGGLER, STALLED = "straggler", "stalled"  # events whose `text` names ranks
CHECKPOINTS, PROFILE, LOGGER = "checkpoints", "profile", "logger"
REQUEUE = "requeue"  # by rank 0 once a last checkpoint is safe; its batch script then asks for the requeue
EXIT = "exit.json"  # of a Slurm job, by its batch script

SILENCE_S = 300  # then rank 0 prints where it stands; a first step may take minutes
KILL_S = 60  # Slurm kills ranks within this time of saying so
# A progress bar's count of finished steps, in logs of programs that write no record of ours.
_BAR = re.compile(r"(\d+)/(?:\d+|\?) \[[^\]]*train_step_timing in s[=:] ?([\d.]+)")
# Slurm's last words about a job, in its log.
_CANCELLED = re.compile(r"\*\*\* JOB \d+ .*(CANCELLED AT \S+(?: DUE TO [A-Z ]*[A-Z])?)")


@dataclass(frozen=True)
class Status:
    """How a run stands or ended."""

    state: str  # submitted, running, completed, failed, killed or interrupted
    exit_code: int | None = None
    reason: str | None = None
    rank: int | None = None  # the rank that failed first
    ended_at: str | None = None


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    steps: int = 0  # finished
    step_time_s: float | None = None  # of the last
    age_s: float = 0.0  # since the last, or since the run's last event

    @property
    def stall(self) -> str | None:
        """That steps have stopped: no step for ten step times, and a minute, is worth a word."""
        minutes = f"{self.age_s / 60:,.0f} min"
        if self.step_time_s is None and self.age_s > SILENCE_S:
            return f"no first step for {minutes}: the end of rank 0's log says where it stands"
        if self.step_time_s is not None and self.age_s > max(10 * self.step_time_s, 60):
            return f"no step for {minutes}, and the last took {self.step_time_s:.3g} s"
        return None


def job_end(folder: Path) -> Status | None:
    """Return how the Slurm job of a folder ended; None if nothing there says that it did."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a full disk leaves a cut-off file
        end = read_object(folder / EXIT)
        code = int(end["exit_code"])
        return Status("failed" if code else "completed", code, ended_at=end["ended_at"])
    steps = folder / STEPS
    for log in folder.glob("slurm-*.out"):
        # A requeued job makes steps again, and may print nothing into this log.
        again = steps.exists() and _age_s(log) - _age_s(steps) > KILL_S
        if (words := _CANCELLED.findall(read_end(log))) and not again:
            return Status("killed", reason=words[-1])
    return None


@dataclass(frozen=True)
class RunFolder:
    """One run's folder. Methods that read raise OSError where the file is missing, ValueError where it is damaged."""

    path: Path

    def create(
        self, *, config_yaml: str, command: list[str], overrides: list[str], max_steps: int = 0, state: str = "running"
    ) -> None:
        """Make the folder of a run that this process is about to start, or to submit."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / CONFIG, config_yaml)
        content = {
            "schema_version": 1,
            "run": self.path.name,
            "created_at": timestamp(),
            "command": shlex.join(command),
            "overrides": overrides,
            "git": git_revision(),
            "max_steps": max_steps,
            "launcher": _process(os.getpid()),
            "status": asdict(Status(state)),
        }
        write_json(self.path / RUN, content)

    def read(self) -> dict[str, Any]:
        """Return the content of `run.json`."""
        return read_object(self.path / RUN)

    def status(self) -> Status:
        """Return how the run stands, by the record and by what its processes and its Slurm job left."""
        content = self.read()
        status, launcher = Status(**content["status"]), content["launcher"]
        if status.state == "submitted" and (end := job_end(self.path)):
            status = self._with_reason(end) if end.state == "failed" else end
        here = launcher["host"] == socket.gethostname()
        if status.state == "running" and here and launcher != _process(launcher["pid"]):
            return Status("killed", reason="the process that launched the run was killed")
        progress, max_steps = self.progress(), content.get("max_steps", 0)
        if progress.steps >= max_steps or status.state not in ("submitted", "running", "completed"):
            return status
        last: dict[str, Any] = next(reversed(read_lines(self.path / EVENTS)[0]), {})
        if status.state != "completed":
            named = last["text"] if last.get("event") in (STRAGGLER, STALLED) else None
            return replace(status, reason=named or progress.stall)
        if not progress.steps and last.get("event") == "done":  # a program may print no steps
            return status
        reason = f"its ranks ended with exit status 0 at step {progress.steps} of {max_steps}"
        return replace(status, state="failed", reason=reason)

    def _with_reason(self, end: Status) -> Status:
        first = next(iter(self.rank_errors()), {})
        error, rank = first_error(self.path, first.get("rank")), first.get("rank")
        if error and error.killed:
            return replace(end, reason=error.line, rank=error.rank)
        if first:
            message = str(first["message"]).strip().partition("\n")[0]
            return replace(end, reason=f"rank {rank} on {first['host']}: {first['type']}: {message}", rank=rank)
        return replace(end, reason=f"exit status {end.exit_code}{f': {error.line}' if error else ''}")

    def progress(self) -> Progress:
        """Return how far the run has come, by its record or by the progress bar in rank 0's log."""
        steps, log = self.path / STEPS, self.log(0)
        for line in reversed(tail(steps, 2) if steps.exists() else []):
            with contextlib.suppress(ValueError, KeyError, TypeError):  # cut off
                row = json.loads(line)
                return Progress(int(row["step"]) + 1, float(row["train_step_timing_s"]), _age_s(steps))
        if log.exists() and (bars := _BAR.findall(read_end(log))):
            return Progress(int(bars[-1][0]), float(bars[-1][1]), _age_s(log))
        events = self.path / EVENTS
        return Progress(age_s=_age_s(events) if events.exists() else 0)

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

    def log(self, rank: int) -> Path:
        """Return the file of everything that `rank` prints."""
        return self.path / f"rank{rank}.out"

    def measured_peaks(self) -> dict[int, dict[str, Any]]:
        """Return the matrix rate that each rank measured: on a CPU all at once, for which nothing is published."""
        paths = self.path.glob("peak_rank*.json")
        return dict(sorted((int(path.stem.removeprefix("peak_rank")), read_object(path)) for path in paths))

    def write_rank_error(self, rank: int, error: BaseException) -> None:
        """Record the exception that ended `rank`, for the launching process to show."""
        what = {"type": type(error).__name__, "message": str(error), "time": time.time()}
        write_json(self.path / f"rank{rank}.error.json", {"rank": rank, "host": socket.gethostname(), **what})

    def rank_errors(self) -> list[dict[str, Any]]:
        """Return all ranks' exceptions, the earliest first: by srun's word, else by the hosts' clocks."""
        errors, ending = [], first_ending(self.path)
        for path in self.path.glob("rank*.error.json"):
            with contextlib.suppress(OSError, ValueError):  # a full disk may have cut it off
                errors.append(read_object(path))
        return sorted(errors, key=lambda error: (not ending or error["rank"] != ending.rank, float(error["time"])))

    def write_step(self, row: dict[str, Any]) -> None:
        """Append a line to `steps.jsonl`, with `time`: seconds since 1970 at the end of the step."""
        _append(self.path / STEPS, {**row, "time": round(time.time(), 6)})

    def write_event(self, event: str, **details: Any) -> None:
        """Append a line to `events.jsonl`, with its `time`; one rank does."""
        _append(self.path / EVENTS, {"event": event, "time": round(time.time(), 3), **details})

    def last_checkpoint(self) -> Path | None:
        """Return the last finished checkpoint, or this folder itself where it is one; None if there is none."""
        checkpoints = {}
        for path in (self.path, *(self.path / CHECKPOINTS).glob("step=*")):
            # NeMo marks a checkpoint that it is writing by a file next to it.
            match, mark = re.match(r"step=(\d+)", path.name), path.with_name(f"{path.name}-unfinished")
            if match and (path / "weights").is_dir() and not mark.exists():
                checkpoints[int(match[1])] = path
        return checkpoints[max(checkpoints)] if checkpoints else None


def _append(path: Path, row: dict[str, Any]) -> None:
    """Append a JSON line. NaN and infinity, which JSON lacks, become the strings that float() reads."""
    infinite = {key: str(value) for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
    # Opened for each line (some 30 us): NeMo copies callbacks, and an open file cannot be copied.
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({**row, **infinite}) + "\n")


def read_lines(path: Path, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """Return the complete JSON lines of `path` from byte `offset` on, and the offset to go on from."""
    if not path.exists():
        return [], offset
    with open(path, "rb") as file:
        file.seek(offset)
        data = file.read()
    complete = data.rfind(b"\n") + 1  # a process may be writing the last line, or was killed over it
    rows = []
    for line in data[:complete].splitlines():
        with contextlib.suppress(ValueError):  # cut off by a kill, and the next start's first line behind it
            rows.append(json.loads(line))
    return rows, offset + complete


def tail(path: Path, lines: int) -> list[str]:
    """Return the last lines of a log, however large it is; of a progress bar its last version."""
    texts = (line.rstrip().rpartition("\r")[2] for line in read_end(path).split("\n"))
    return [text for text in texts if text][-lines:]


def timestamp() -> str:
    """Return the time now, in UTC, ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _age_s(path: Path) -> float:
    return time.time() - path.stat().st_mtime


def _process(pid: int) -> dict[str, Any]:
    """Return what tells a process of this host from a later one of its number: when it started, in boot ticks."""
    started = None
    with contextlib.suppress(OSError, IndexError):  # it is gone
        # The second field, the program's name in parentheses, may hold blanks.
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return {"host": socket.gethostname(), "pid": pid, "started": started}


def typed(kind: type[T], content: dict[str, Any]) -> T:
    """Return the dataclass that a record holds; raise TypeError or AttributeError where one of its numbers is none."""
    for name, expected in kind.__annotations__.items():
        value: Any = content.get(name)
        if re.search("int|float", expected) and not (value is None and ("None" in expected or name not in content)):
            sum(value.values() if expected.startswith("dict") else value if expected.startswith("tuple") else [value])
    return kind(**{name: content[name] for name in kind.__annotations__ if name in content})


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; raise ValueError if it holds none."""
    content = json.loads(path.read_text())
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content
