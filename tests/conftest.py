"""Shared by all tests: the project's own scripts, run as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def project() -> Path:
    return PROJECT


@pytest.fixture
def train_cli(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`train.py` with these arguments, in a stage folder of the test's own; its exit status is not checked."""

    def run(*args: str, timeout: float = 60, **environment: str) -> subprocess.CompletedProcess[str]:
        env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "HYDRA_"))}
        return subprocess.run(
            [sys.executable, str(PROJECT / "train.py"), *args],
            cwd=tmp_path,
            env={**env, "STAGE_PATH": str(tmp_path / "stage"), **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of Llama 3's construction, with 1,000 tokens."""
    from nemo_bench.data import corpus, tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    trained = tokenizer.train((file.text for file in corpus.collect(300_000)), vocab_size=1000)
    for name, text in tokenizer.render(trained).items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder
