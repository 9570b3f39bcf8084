"""The run folder: everything a report needs, written so that a run killed at any moment is still readable.

========================  ============================================================================================
config.yaml               the composed configuration, every interpolation resolved
run.json                  command line, overrides, git revision, processes, state: written anew whole at each change
job.json                  of a submitted run: the job's id and when it was submitted
exit.json                 of a Slurm job: its exit status, by its batch script
node.json                 rank 0's machine: host, devices, driver, package versions, environment without secrets
steps.jsonl               a line a step (`step`, `loss`, `train_step_timing_s`, ...), flushed at once
events.jsonl              a line a phase, with its time: importing, building, training, validation, profile, done, ...
ranks.json                what each rank's device did, gathered after the last step (devices.py)
nemo_24_09.yaml           entrypoint=nemo_24_09: the whole configuration of its program, which logs in nemo/
rank<N>.out               everything rank N printed, NeMo's own `train_step_timing in s` lines on rank 0
rank<N>.error.json        the exception that ended rank N
peak_rank<N>.json         the measured matrix rate, on devices without a published peak
checkpoints/              where checkpoint.every_n_steps is set
profile/                  of a profiled run: rank<N>.trace.json.gz, and its time by kernel class: rank<N>.json, .txt;
                          or rank<N>.nsys-rep
========================  ============================================================================================
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shlex
import socket
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_bench.files import dated_name, write_json, write_text
from nemo_bench.project import PROJECT
from nemo_bench.record.redaction import is_secret

SCHEMA_VERSION = 1
CONFIG = "config.yaml"
RUN = "run.json"
JOB = "job.json"
NODE = "node.json"
STEPS = "steps.jsonl"
EVENTS = "events.jsonl"
CHECKPOINTS = "checkpoints"
PROFILE = "profile"
REQUEUE = "requeue"  # by rank 0 once a last checkpoint is safe; its batch script then asks for the requeue
EXIT = "exit.json"  # of a Slurm job, by its batch script

# What a benchmark's numbers can depend on. An allow list: a secret in an unexpected variable stays out of the record.
_KEPT_ENVIRONMENT = re.compile(
    r"^(SLURM|SBATCH|NCCL|NVTE|CUDA|CUBLAS|CUDNN|TORCH|PYTORCH|NVIDIA|NEMO|MEGATRON|OMP|MKL|GLOO|UCX|FI|PMI|PMIX|UB)_"
    r"|^(PATH|LD_LIBRARY_PATH|LD_PRELOAD|PYTHONPATH|PYTHONUNBUFFERED|STAGE_PATH|GSW_VERSION|VIRTUAL_ENV|CONDA_PREFIX"
    r"|RANK|LOCAL_RANK|WORLD_SIZE|MASTER_ADDR|MASTER_PORT|NODE_RANK|LOCAL_WORLD_SIZE|TOKENIZERS_PARALLELISM"
    r"|TRANSFORMERS_OFFLINE|HF_HUB_OFFLINE|HF_HOME|LANG|LC_ALL|TZ)$"
)

_PACKAGES = (
    "torch",
    "nemo_toolkit",
    "megatron-core",
    "transformer-engine",
    "lightning",
    "pytorch-lightning",
    "apex",
    "transformers",
    "tokenizers",
    "numpy",
    "hydra-core",
    "omegaconf",
    "triton",
)


def _strict(value: Any) -> Any:
    """JSON has no NaN and no infinity: they are written as the strings that float() reads."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


class _Lines:
    """A file of JSON lines, opened for each (some 30 us): NeMo copies callbacks, and an open file cannot be copied."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, row: dict[str, Any]) -> None:
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps({key: _strict(value) for key, value in row.items()}) + "\n")


class StepLog(_Lines):
    """`steps.jsonl`: adds `time`, seconds since 1970 at the end of the step."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir / STEPS)

    def write(self, row: dict[str, Any]) -> None:
        super().write({**row, "time": round(time.time(), 6)})


class EventLog:
    """`events.jsonl`; one rank writes it, the others hold one that is not enabled."""

    def __init__(self, run_dir: Path, *, enabled: bool = True) -> None:
        self._lines = _Lines(run_dir / EVENTS) if enabled else None

    def write(self, event: str, **details: Any) -> None:
        if self._lines is not None:
            self._lines.write({"event": event, "time": round(time.time(), 3), **details})


def read_lines(path: Path, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """The complete JSON lines of `path` from byte `offset` on, and the offset to go on from.

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
        try:
            rows.append(json.loads(line))
        except ValueError:  # cut off by a kill, and the next start's first line behind it
            continue
    return rows, offset + complete


@dataclass(frozen=True)
class Status:
    """How a run stands or ended. `state`: submitted, running, completed, failed, killed or interrupted."""

    state: str
    exit_code: int | None = None
    reason: str | None = None
    rank: int | None = None  # the rank that failed first
    ended_at: str | None = None

    @property
    def finished(self) -> bool:
        return self.state == "completed"


def timestamp() -> str:
    """Now, in UTC, ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def new_run_dir(results: Path) -> Path:
    """Makes `results/<date>-<time>-<random>`, unique also for runs started in the same second."""
    path = results / dated_name()
    path.mkdir(parents=True)
    return path


def create(
    run_dir: Path,
    *,
    config_yaml: str,
    command: list[str],
    overrides: list[str],
    ranks: int,
    state: str = "running",
) -> None:
    """Writes `config.yaml` and `run.json` of a run that this process is about to start, or to submit."""
    write_text(run_dir / CONFIG, config_yaml)
    write_json(
        run_dir / RUN,
        {
            "schema_version": SCHEMA_VERSION,
            "run": run_dir.name,
            "created_at": timestamp(),
            "command": shlex.join(command),
            "overrides": overrides,
            "git": git_revision(),
            "ranks": ranks,
            "launcher": _this_process(),
            "status": asdict(Status(state)),
        },
    )


def set_status(run_dir: Path, status: Status) -> None:
    """Records how the run ended, in `run.json`."""
    content = read_run(run_dir)
    if status.ended_at is None:
        status = Status(**{**asdict(status), "ended_at": timestamp()})
    content["status"] = asdict(status)
    try:
        write_json(run_dir / RUN, content)
    except OSError:
        # A full disk has no room for a second file, but the blocks of the first are ours.
        with open(run_dir / RUN, "r+", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=2) + "\n")
            file.truncate()


def set_job(run_dir: Path, job_id: str, **details: Any) -> None:
    """Records the job that runs this folder: Slurm's, or a background process's.

    In a file of its own: the job may have begun, and writes to `run.json`.
    """
    write_json(run_dir / JOB, {"id": job_id, "submitted_at": timestamp(), **details})


def read_job(run_dir: Path) -> dict[str, Any]:
    """`job.json` of a submitted run."""
    content = json.loads((run_dir / JOB).read_text())
    assert isinstance(content, dict)
    return content


def set_running(run_dir: Path) -> None:
    """Records that this process runs a submitted run."""
    content = read_run(run_dir)
    content["launcher"] = _this_process()
    content["status"] = asdict(Status("running"))
    write_json(run_dir / RUN, content)


def set_killed_with_launcher(run_dir: Path) -> None:
    """Records that the process that launched the run is gone, unless an end is recorded already."""
    if read_run(run_dir)["status"]["state"] == "running":
        set_status(run_dir, Status("killed", reason="the process that launched the run was killed"))


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, "started": process_start(pid)}


def read_run(run_dir: Path) -> dict[str, Any]:
    """`run.json`."""
    content = json.loads((run_dir / RUN).read_text())
    assert isinstance(content, dict)
    return content


def read_status(run_dir: Path) -> Status:
    """The recorded status; a run recorded as running whose launching process is gone from this host was killed.

    A Slurm job's end is in `exit.json`, which its batch script writes; where there is none, Slurm alone knows.
    """
    content = read_run(run_dir)
    status = Status(**content["status"])
    if status.state == "submitted":
        return _job_status(run_dir) or status
    launcher = content["launcher"]
    if (
        status.state == "running"
        and launcher["host"] == socket.gethostname()
        and process_start(launcher["pid"]) != launcher["started"]
    ):
        return Status("killed", reason="the launching process is gone and recorded no end: it was killed")
    return status


def _job_status(run_dir: Path) -> Status | None:
    try:
        end = json.loads((run_dir / EXIT).read_text())
    except FileNotFoundError:
        return None
    if end["exit_code"] == 0:
        return Status("completed", exit_code=0, ended_at=end["ended_at"])
    rank, reason = None, f"exit status {end['exit_code']}"
    errors = read_rank_errors(run_dir)
    if errors:
        rank = int(errors[0]["rank"])
        message = (str(errors[0]["message"]).strip().splitlines() or [""])[0]
        reason = f"rank {rank} on {errors[0]['host']}: {errors[0]['type']}: {message}"
    return Status("failed", exit_code=end["exit_code"], reason=reason, rank=rank, ended_at=end["ended_at"])


def process_start(pid: int) -> str | None:
    """When process `pid` started (boot ticks), which tells it from a later one of that number; None: there is none."""
    try:
        # The second field, the program's name in parentheses, may hold spaces.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def rank_log(run_dir: Path, rank: int) -> Path:
    """Where everything that `rank` prints goes."""
    return run_dir / f"rank{rank}.out"


def tail(path: Path, lines: int) -> list[str]:
    """The last lines of a log, however large it is."""
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 65536))
        text = file.read().decode("utf-8", errors="replace")
    # A progress bar overwrites its line with carriage returns: the last version counts.
    found = [line.rsplit("\r", 1)[-1].rstrip() for line in text.splitlines()]
    return [line for line in found if line][-lines:]


def write_rank_error(run_dir: Path, rank: int, error: BaseException) -> None:
    """The exception that ended `rank`, for the launching process to show."""
    write_json(
        run_dir / f"rank{rank}.error.json",
        {
            "rank": rank,
            "host": socket.gethostname(),
            "time": time.time(),
            "type": type(error).__name__,
            "message": str(error),
        },
    )


def read_rank_errors(run_dir: Path) -> list[dict[str, Any]]:
    """All ranks' exceptions, the first to happen first: the others are often its consequences."""
    errors = [json.loads(path.read_text()) for path in run_dir.glob("rank*.error.json")]
    return sorted(errors, key=lambda error: float(error["time"]))


def write_peak(run_dir: Path, rank: int, peak: dict[str, object]) -> None:
    """The matrix rate that `rank` measured."""
    write_json(run_dir / f"peak_rank{rank}.json", peak)


def read_peaks(run_dir: Path) -> list[dict[str, Any]]:
    """The matrix rates that the ranks measured; empty where the peak is a published one."""
    return [json.loads(path.read_text()) for path in sorted(run_dir.glob("peak_rank*.json"))]


def read_profiles(run_dir: Path) -> dict[str, dict[str, Any]]:
    """Where the time of profiled steps went, as step_profile.py wrote it: file name -> content; damaged ones are {}."""
    found: dict[str, dict[str, Any]] = {}
    paths = (run_dir / PROFILE).glob("rank*.json")
    for path in sorted(paths, key=lambda path: (len(path.name), path.name)):  # rank10 after rank9
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError):
            content = {}
        found[path.name] = content if isinstance(content, dict) else {}
    return found


def last_checkpoint(folder: Path) -> Path | None:
    """The last finished checkpoint of a run folder, or `folder` itself where that is one; None: there is none.

    NeMo marks a checkpoint that is being written by a file beside it, `<name>-unfinished`.
    """
    found = [
        (int(match[1]), path)
        for path in [folder, *(folder / CHECKPOINTS).glob("step=*")]
        if (match := re.match(r"step=(\d+)", path.name))
        and (path / "weights").is_dir()
        and not path.with_name(path.name + "-unfinished").exists()
    ]
    return max(found)[1] if found else None


def write_node(run_dir: Path) -> None:
    """`node.json`, about the machine and software that this process runs on. Imports nothing heavy."""
    write_json(
        run_dir / NODE,
        {
            "host": socket.gethostname(),
            "system": platform.platform(),
            "cpu": _cpu_model(),
            "cpu_cores": os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "gpus": _gpus(),
            "python": platform.python_version(),
            "packages": _package_versions(),
            "environment": kept_environment(dict(os.environ)),
        },
    )


def kept_environment(environment: dict[str, str]) -> dict[str, str]:
    """The variables that a benchmark can depend on, without anything that looks like a secret."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if _KEPT_ENVIRONMENT.match(name) and not is_secret(name)
    }


def _package_versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _cpu_model() -> str:
    try:
        match = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        match = None
    return match[1] if match else platform.machine()


def _output(command: list[str], cwd: Path | None = None) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=cwd, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _gpus() -> list[dict[str, str]]:
    fields = ("name", "driver_version", "memory.total", "power.limit")
    out = _output(["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"])
    return [dict(zip(fields, line.split(", "))) for line in (out or "").splitlines()]


def git_revision() -> dict[str, Any] | None:
    """Revision of this project, and whether its files differ from it; None where it is no checkout."""
    revision = _output(["git", "rev-parse", "HEAD"], cwd=PROJECT)
    if revision is None:
        return None
    changes = _output(["git", "status", "--porcelain"], cwd=PROJECT)
    return {"revision": revision.strip(), "modified": bool(changes and changes.strip())}
