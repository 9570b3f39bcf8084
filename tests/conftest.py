"""Shared by all tests: the project's own scripts, run as a user runs them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.fork_server import ForkServer

PROJECT = Path(__file__).resolve().parents[1]


def started(command: list[str], folder: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    """Start a command in a folder, to be watched or killed."""
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test suite run in the background of a shell ignores Ctrl-C, and would pass that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.fixture(scope="session")
def project() -> Path:
    return PROJECT


@pytest.fixture(scope="session")
def scripts() -> Iterator[ForkServer]:
    """A process that has imported what the scripts of this project import, to fork them from."""
    with ForkServer("scripts", dict(os.environ)) as server:
        yield server


@pytest.fixture
def train_cli(tmp_path: Path, scripts: ForkServer) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`train.py` with these arguments, in a stage folder of the test's own; its exit status is not checked."""

    def run(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
        env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "HYDRA_"))}
        env |= {"STAGE_PATH": str(tmp_path / "stage"), **environment}
        command = [sys.executable, str(PROJECT / "train.py"), *args]
        if "PYTHONPATH" in environment:  # read when an interpreter starts
            return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
        return scripts.run(command, cwd=tmp_path, env=env)

    return run


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of Llama 3's construction, with 1,000 tokens."""
    from nemo_bench.data import corpus, tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.write(folder, corpus.collect(300_000).values(), vocab_size=1000)
    return folder
