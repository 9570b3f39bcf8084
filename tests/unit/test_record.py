"""The run folder: whole at every moment, without secrets."""

from __future__ import annotations

import json
import math
import os
import socket
from pathlib import Path

import pytest

from nemo_bench.files import write_json, write_text
from nemo_bench.record import folder as record
from nemo_bench.record.folder import Status
from nemo_bench.record.node import NODE, kept_environment, write_node


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    path = record.RunFolder.new(tmp_path / "results").path
    record.RunFolder(path).create(
        config_yaml="model: {}\n", command=["python", "train.py", "a b"], overrides=["x=1"], ranks=2
    )
    return path


def test_a_new_run_says_who_runs_it_and_that_it_runs(run_dir: Path) -> None:
    content = record.RunFolder(run_dir).read()
    assert content["command"] == "python train.py 'a b'"
    assert content["overrides"] == ["x=1"]
    assert content["launcher"]["host"] == socket.gethostname()
    assert record.RunFolder(run_dir).status() == Status("running")


def test_run_folders_of_the_same_second_differ(tmp_path: Path) -> None:
    assert len({record.RunFolder.new(tmp_path).path for _ in range(20)}) == 20


def test_the_end_is_recorded(run_dir: Path) -> None:
    record.RunFolder(run_dir).set_status(Status("failed", exit_code=1, reason="because", rank=1))
    status = record.RunFolder(run_dir).status()
    assert (status.state, status.reason, status.rank) == ("failed", "because", 1)
    assert status.ended_at is not None and not status.finished


def test_running_without_its_launcher_is_killed(run_dir: Path) -> None:
    content = record.RunFolder(run_dir).read()
    content["launcher"]["started"] = "1"  # another process has that number now
    write_json(run_dir / record.RUN, content)
    assert record.RunFolder(run_dir).status().state == "killed"


def test_a_run_of_another_host_is_left_as_recorded(run_dir: Path) -> None:
    content = record.RunFolder(run_dir).read()
    content["launcher"] = {"host": "elsewhere", "pid": 1, "started": "1"}
    write_json(run_dir / record.RUN, content)
    assert record.RunFolder(run_dir).status().state == "running"


def test_steps_are_readable_while_they_are_written(run_dir: Path) -> None:
    steps = record.StepLog(record.RunFolder(run_dir))
    steps.write({"step": 0, "loss": 2.5})
    rows, offset = record.read_lines(run_dir / record.STEPS)
    assert rows[0]["step"] == 0 and rows[0]["time"] > 0
    with open(run_dir / record.STEPS, "a") as file:
        file.write('{"step": 1, "lo')  # a writer in the middle of its line, or killed over it
    assert record.read_lines(run_dir / record.STEPS, offset) == ([], offset)
    with open(run_dir / record.STEPS, "a") as file:
        file.write('ss": 2.4}\n')
    assert record.read_lines(run_dir / record.STEPS, offset)[0] == [{"step": 1, "loss": 2.4}]


def test_no_steps_yet(run_dir: Path) -> None:
    assert record.read_lines(run_dir / record.STEPS) == ([], 0)


def test_a_loss_that_is_no_number_stays_valid_json(run_dir: Path) -> None:
    record.StepLog(record.RunFolder(run_dir)).write({"step": 0, "loss": math.nan, "grad_norm": math.inf})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    row = json.loads((run_dir / record.STEPS).read_text(), parse_constant=refuse)
    assert math.isnan(float(row["loss"])) and float(row["grad_norm"]) == math.inf


def test_events_are_written_by_one_rank_only(run_dir: Path) -> None:
    record.EventLog(record.RunFolder(run_dir), enabled=False).write("importing")
    assert not (run_dir / record.EVENTS).exists()
    record.EventLog(record.RunFolder(run_dir)).write("training", first_step=3)
    assert record.read_lines(run_dir / record.EVENTS)[0][0]["first_step"] == 3


def test_the_first_error_comes_first(run_dir: Path) -> None:
    for rank, when in ((0, 20.0), (1, 10.0)):
        record.RunFolder(run_dir).write_rank_error(rank, ValueError(f"of rank {rank}"))
        path = run_dir / f"rank{rank}.error.json"
        write_json(path, {**json.loads(path.read_text()), "time": when})
    assert [error["rank"] for error in record.RunFolder(run_dir).rank_errors()] == [1, 0]


def test_the_environment_is_kept_without_secrets() -> None:
    kept = kept_environment(
        {
            "NCCL_DEBUG": "INFO",
            "SLURM_JOB_ID": "7",
            "TOKENIZERS_PARALLELISM": "False",
            "HF_TOKEN": "hf_abc",
            "NEMO_API_KEY": "abc",
            "SLURM_JWT_TOKEN": "abc",
            "AWS_SECRET_ACCESS_KEY": "abc",
            "NVIDIA_PASSWORD": "abc",
            "UCX_ACCESSKEY": "abc",
            "SLURM_PRIVATE": "abc",
            "SLURM_AUTH": "abc",
            "HOME": "/root",
        }
    )
    assert kept == {"NCCL_DEBUG": "INFO", "SLURM_JOB_ID": "7", "TOKENIZERS_PARALLELISM": "False"}


def test_the_node_record_names_versions_and_machine(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_a_secret")
    write_node(run_dir)
    text = (run_dir / NODE).read_text()
    assert "hf_a_secret" not in text
    node = json.loads(text)
    assert node["packages"]["nemo_toolkit"] == "2.7.3"
    assert node["cpu_cores"] == os.cpu_count()


def test_the_last_finished_checkpoint(tmp_path: Path) -> None:
    assert record.RunFolder(tmp_path).last_checkpoint() is None
    for step in (5, 10, 100):
        (tmp_path / "checkpoints" / f"step={step}" / "weights").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step=100-unfinished").touch()
    ten = tmp_path / "checkpoints" / "step=10"
    assert record.RunFolder(tmp_path).last_checkpoint() == ten
    assert record.RunFolder(ten).last_checkpoint() == ten


def test_replacing_a_file_leaves_no_other(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    write_text(tmp_path / "a", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "new")]
