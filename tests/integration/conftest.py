"""Real runs of `train.py` on this machine's CPU, each with all its processes."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from benchmarks.fork_server import ForkServer
from nemo_bench.cli import quoted_path
from nemo_bench.cluster import processes
from nemo_bench.config import typed
from nemo_bench.launch import point

PROJECT = Path(__file__).resolve().parents[2]

# A Llama that takes milliseconds a step; four layers, so that PP2 VP2 fits, and heads for TP2.
SMALL = (
    "model.hidden_size=64",
    "model.ffn_hidden_size=224",
    "model.seq_length=64",
    "model.vocab_size=512",
    "model.micro_batch_size=1",
    "model.global_batch_size=8",
    "data.corpus_bytes=1000000",
    "trainer.max_steps=20",
)


@dataclass(frozen=True)
class Run:
    """What a finished `train.py` left."""

    run_dir: Path
    stdout: str
    stderr: str = ""

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run_dir / "steps.jsonl").read_text().splitlines()]

    @property
    def losses(self) -> list[float]:
        return [row["loss"] for row in self.steps]


def environment(stage: Path) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "HYDRA_"))}
    return {**env, "STAGE_PATH": str(stage)}


def run_dirs(stage: Path) -> set[Path]:
    return {path.parent for path in stage.glob("results/**/run.json")}


def run_script(stage: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script of this project to its end, in this stage folder."""
    return subprocess.run(
        [sys.executable, str(PROJECT / script), *arguments],
        cwd=stage,
        env=environment(stage),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=400,
    )


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One stage folder for all runs: its dataset is built once."""
    return tmp_path_factory.mktemp("stage")


@pytest.fixture(scope="session")
def train(stage: Path) -> Callable[..., Run]:
    """Runs `train.py` with these overrides on the small model to its end."""

    def run(*overrides: str, small: bool = True) -> Run:
        before = run_dirs(stage)
        done = run_script(stage, "train.py", *(SMALL if small else ()), *overrides)
        assert done.returncode == 0, done.stdout + done.stderr
        (run_dir,) = run_dirs(stage) - before
        return Run(run_dir, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """A process that has imported NeMo, to fork ranks from."""
    with ForkServer("cpu", {**os.environ, "OMP_NUM_THREADS": "1"}) as server:
        yield server


@pytest.fixture
def python(fork_server: ForkServer) -> Callable[..., str]:
    """Runs a program where NeMo is imported already, and returns what it printed."""

    def run(program: str, *arguments: str) -> str:
        done = fork_server.run([sys.executable, "-c", program, *arguments], env=dict(os.environ))
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="session")
def forked(stage: Path, fork_server: ForkServer) -> Callable[..., Run]:
    """As `train`, in this process and with ranks that are forked: the same code but for the start of the ranks.

    One thread a rank: so small a model is slower on several, which spin while they wait for each other.
    """

    def run(*overrides: str) -> Run:
        before = run_dirs(stage)
        with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
            cfg = typed(compose("train", [*SMALL, *overrides, f"stage_path={quoted_path(stage)}"]))
        started = partial(processes.started, popen=fork_server.popen)
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
            patch.setattr(processes, "started", started)
            patch.setenv("OMP_NUM_THREADS", "1")
            point.run_point(cfg)
        (run_dir,) = run_dirs(stage) - before
        return Run(run_dir, printed.getvalue())

    return run


class Started:
    """A running `train.py`, to be disturbed."""

    def __init__(self, stage: Path, *overrides: str) -> None:
        before = run_dirs(stage)
        self.process = subprocess.Popen(
            [sys.executable, str(PROJECT / "train.py"), *SMALL, "trainer.max_steps=100000", *overrides],
            cwd=stage,
            env=environment(stage),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # A test suite run in the background of a shell ignores Ctrl-C, and would pass that on.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        self.run_dir = wait_for(lambda: next(iter(run_dirs(stage) - before), None), "a run folder")

    def wait_for_steps(self, count: int) -> None:
        steps = self.run_dir / "steps.jsonl"
        wait_for(lambda: steps.exists() and steps.read_text().count("\n") >= count, f"step {count}", 200)

    def rank_pids(self) -> list[int]:
        """Processes of this run: ranks and their data loaders."""
        return processes_of(self.run_dir)

    def wait_until_ranks_are_gone(self) -> None:
        wait_for(lambda: not self.rank_pids(), "the end of all ranks", 30)

    def status(self) -> dict[str, Any]:
        status = json.loads((self.run_dir / "run.json").read_text())["status"]
        assert isinstance(status, dict)
        return status

    def finish(self) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=60)
        return self.process.returncode, output


def wait_for(condition: Callable[[], Any], what: str, timeout: float = 60) -> Any:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.1)
    pytest.fail(f"waited {timeout:.0f} s for {what}")


@pytest.fixture
def start(stage: Path) -> Iterator[Callable[..., Started]]:
    """Starts `train.py` for the test to disturb; whatever still runs afterwards is killed."""
    runs: list[Started] = []

    def begin(*overrides: str) -> Started:
        runs.append(Started(stage, *overrides))
        return runs[-1]

    yield begin
    for run in runs:
        for pid in [run.process.pid, *run.rank_pids()]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        run.process.wait()


def processes_of(run_dir: Path) -> list[int]:
    """Living processes with the run folder on their command line."""
    pids = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it may end meanwhile; a zombie has no arguments
            if os.fsencode(run_dir) in (entry / "cmdline").read_bytes().split(b"\0"):
                pids.append(int(entry.name))
    return sorted(pids)
