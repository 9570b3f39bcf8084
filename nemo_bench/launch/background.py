"""Runs one after the other on this machine, in the background: a sweep on a workstation, with no scheduler.

One process works through them, `python -m nemo_bench.launch.background RUN_FOLDER ...`: one at a time, since two
benchmarks at once would measure each other. Not submitit's local executor: it starts all points at once, keeps the
terminal's output open, and reads a pickled call with the pkg_resources that setuptools no longer has.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from nemo_bench.config import load
from nemo_bench.errors import RunFailed
from nemo_bench.project import python_path
from nemo_bench.record import folder as record

JOB_PREFIX = "local-"


def run_in_turn(run_dirs: list[Path]) -> None:
    """Runs the submitted runs in these folders; one that fails does not keep the others from running."""
    from nemo_bench.launch.point import execute

    waiting = list(run_dirs)
    while waiting:
        run_dir = waiting.pop(0)
        record.RunFolder(run_dir).set_running()
        try:
            execute(load(run_dir / record.CONFIG), run_dir, lambda: None)
        except RunFailed as failure:
            print(failure, flush=True)
            if failure.exit_code > 128:  # a signal: meant for the whole sweep
                for other in waiting:
                    record.RunFolder(other).set_status(record.Status("killed", reason="cancelled before it started"))
                return


def start(run_dirs: list[Path], folder: Path) -> list[str]:
    """Starts the background process, its output in `folder`, and returns each run's job id, `local-<pid>.<number>`."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "background.out", "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "nemo_bench.launch.background", *map(str, run_dirs)],
            env={**os.environ, "PYTHONPATH": python_path(os.environ.get("PYTHONPATH"))},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # Of a session of its own: it outlives the terminal, and Ctrl-C does not reach it.
            start_new_session=True,
        )
    return [f"{JOB_PREFIX}{process.pid}.{number}" for number in range(len(run_dirs))]


def pid(job_id: str) -> int:
    """The background process of a job id."""
    return int(job_id.removeprefix(JOB_PREFIX).partition(".")[0])


def state(job: dict[str, str], status: record.Status) -> str:
    """The run's state in Slurm's words."""
    if status.state == "submitted":
        return "PENDING" if _alive(job) else "FAILED"
    words = {"running": "RUNNING", "completed": "COMPLETED", "interrupted": "CANCELLED", "killed": "CANCELLED"}
    return words.get(status.state, "FAILED")


def cancel(job: dict[str, str]) -> None:
    """Ends the background process with its run, and those that wait behind it."""
    if _alive(job):
        os.kill(pid(job["id"]), signal.SIGTERM)


def _alive(job: dict[str, str]) -> bool:
    """Whether it is still that process: numbers are given again."""
    return job["started"] is not None and record.process_start(pid(job["id"])) == job["started"]


if __name__ == "__main__":
    run_in_turn([Path(argument) for argument in sys.argv[1:]])
