"""The run folder: whole at every moment, without secrets."""

from __future__ import annotations

import json
import math
import os
import socket
from pathlib import Path

import pytest

from nemo_bench.files import write_json
from nemo_bench.record.folder import RUN, STEPS, RunFolder, read_lines
from nemo_bench.record.node import kept_environment


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "results" / "run")
    run.create(config_yaml="model: {}\n", command=["python", "train.py", "a b"], overrides=["x=1"])
    return run


@pytest.mark.parametrize(("host", "state"), [(socket.gethostname(), "killed"), ("elsewhere", "running")])
def test_a_run_without_its_launcher_was_killed_if_it_ran_here(run: RunFolder, host: str, state: str) -> None:
    launcher = {"host": host, "pid": os.getpid(), "started": "1"}  # another process has that number now
    write_json(run.path / RUN, {**run.read(), "launcher": launcher})
    assert run.status().state == state


def test_steps_are_readable_while_they_are_written(run: RunFolder) -> None:
    steps = run.path / STEPS
    assert read_lines(steps) == ([], 0)
    run.write_step({"step": 0, "loss": 2.5})
    rows, offset = read_lines(steps)
    assert rows[0]["step"] == 0 and rows[0]["time"] > 0
    with open(steps, "a") as file:
        file.write('{"step": 1, "lo')  # a writer in the middle of its line, or killed over it
    assert read_lines(steps, offset) == ([], offset)
    with open(steps, "a") as file:
        file.write('ss": 2.4}\n')
    assert read_lines(steps, offset)[0] == [{"step": 1, "loss": 2.4}]


def test_a_loss_that_is_no_number_stays_valid_json(run: RunFolder) -> None:
    run.write_step({"step": 0, "loss": math.nan, "grad_norm": math.inf})
    row = json.loads((run.path / STEPS).read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert math.isnan(float(row["loss"])) and float(row["grad_norm"]) == math.inf


@pytest.mark.parametrize(
    ("srun_says", "order"),
    [
        ("", [1, 0]),  # by the hosts' clocks
        ("srun: error: n1: task 0: Exited with exit code 1\nsrun: error: n2: task 1: Terminated\n", [0, 1]),
        ("srun: error: n1: tasks 0-1: Exited with exit code 1\n", [1, 0]),
    ],
)
def test_the_first_error_comes_first(run: RunFolder, srun_says: str, order: list[int]) -> None:
    for rank, when in ((0, 20.0), (1, 10.0)):
        run.write_rank_error(rank, ValueError(f"of rank {rank}"))
        path = run.path / f"rank{rank}.error.json"
        write_json(path, {**json.loads(path.read_text()), "time": when})
    (run.path / "slurm-12.out").write_text(srun_says)
    assert [error["rank"] for error in run.rank_errors()] == order


def test_the_environment_is_kept_without_secrets() -> None:
    kept = {"NCCL_DEBUG": "INFO", "SLURM_JOB_ID": "7", "TOKENIZERS_PARALLELISM": "False"}
    secrets = ("HF_TOKEN", "NEMO_API_KEY", "SLURM_JWT_TOKEN", "NVIDIA_PASSWORD", "UCX_ACCESSKEY", "SLURM_AUTH")
    assert kept_environment({**kept, **dict.fromkeys(secrets, "abc"), "HOME": "/root"}) == kept


def test_the_last_finished_checkpoint(tmp_path: Path) -> None:
    assert RunFolder(tmp_path).last_checkpoint() is None
    for step in (5, 10, 100):
        (tmp_path / "checkpoints" / f"step={step}" / "weights").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step=100-unfinished").touch()
    ten = tmp_path / "checkpoints" / "step=10"
    assert RunFolder(tmp_path).last_checkpoint() == ten
    assert RunFolder(ten).last_checkpoint() == ten
