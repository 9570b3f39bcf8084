"""Runs that are killed, interrupted or starved: what the user sees, and what the record says."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nemo_bench.record.folder import RunFolder, read_lines

from .conftest import PROJECT, SMALL, Run, Started, environment, run_script, wait_for

pytestmark = pytest.mark.train


def test_a_killed_rank_ends_the_run_and_is_named(start: Callable[..., Started]) -> None:
    run = start("trainer.devices=2")
    run.wait_for_steps(3)
    # A rank leads its process group; its data loaders do not.
    ranks = [pid for pid in run.rank_pids() if os.getpgid(pid) == pid]
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    exit_code, output = run.finish()
    assert exit_code == 1 and "rank 1 of 2 failed: killed by SIGKILL" in output
    assert "Traceback" not in output.partition("failed:")[0]
    assert (run.status()["state"], run.status()["rank"]) == ("killed", 1)
    run.wait_until_ranks_are_gone()


def test_a_stopped_rank_is_named_while_the_other_waits(start: Callable[..., Started]) -> None:
    run = start("trainer.devices=2")
    run.wait_for_steps(6)
    ranks = [pid for pid in run.rank_pids() if os.getpgid(pid) == pid]
    os.kill(ranks[1], signal.SIGSTOP)
    events = run.run_dir / "events.jsonl"
    wait_for(lambda: '"stalled"' in events.read_text(), "the stall to be named")
    assert "left no stack" in (RunFolder(run.run_dir).status().reason or "")
    os.kill(ranks[1], signal.SIGCONT)
    wait_for(lambda: '"resumed"' in events.read_text(), "the next step")
    os.kill(run.process.pid, signal.SIGINT)
    _, output = run.finish()
    assert f"rank 1 (process 1 of {os.uname().nodename}) left no stack: stopped, or the node is gone" in output
    assert "waiting in " in output and "): rank 0 (process 0 of" in output and "steps go on" in output


def test_a_killed_launcher_takes_its_ranks_along_and_the_record_says_so(start: Callable[..., Started]) -> None:
    run = start("trainer.devices=2")
    run.wait_for_steps(3)
    run.process.kill()
    run.wait_until_ranks_are_gone()
    run.process.wait()
    status = RunFolder(run.run_dir).status()
    assert (status.state, status.reason) == ("killed", "the process that launched the run was killed")
    # Still readable: every line that was recorded is whole.
    steps, _ = read_lines(run.run_dir / "steps.jsonl")
    assert [row["step"] for row in steps] == list(range(len(steps)))


def test_a_whole_run_killed_at_once_reads_as_killed(start: Callable[..., Started]) -> None:
    run = start()
    wait_for(run.rank_pids, "the rank")
    for pid in [*run.rank_pids(), run.process.pid]:
        os.kill(pid, signal.SIGSTOP)  # so that none can write a last word
    for pid in [*run.rank_pids(), run.process.pid]:
        os.kill(pid, signal.SIGKILL)
    run.process.wait()
    run.wait_until_ranks_are_gone()
    assert run.status()["state"] == "running"
    assert RunFolder(run.run_dir).status().state == "killed"


def test_ctrl_c_ends_all_ranks(start: Callable[..., Started]) -> None:
    run = start("trainer.devices=2")
    run.wait_for_steps(2)
    os.kill(run.process.pid, signal.SIGINT)
    exit_code, output = run.finish()
    assert exit_code == 130 and "interrupted: all ranks were ended" in output and "Traceback" not in output
    assert run.status()["state"] == "interrupted"
    assert run.rank_pids() == []


def test_an_interrupted_machine_check_finds_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(PROJECT / "check_machine.py"), "trainer.devices=2"]
    with subprocess.Popen(
        command, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as check:
        wait_for(lambda: "measures" in "".join(log.read_text() for log in tmp_path.rglob("rank1.out")), "the ranks", 60)
        check.send_signal(signal.SIGINT)
        output = check.communicate(timeout=60)[0].decode()
    assert check.returncode == 130 and "interrupted" in output and "FINDING" not in output
    assert not list(tmp_path.rglob("check.json"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_named(small_disk: Path) -> None:
    # The dataset fits; the checkpoint does not.
    result = run_script(small_disk, "train.py", *SMALL, "model.hidden_size=512", "checkpoint.every_n_steps=1")
    assert result.returncode == 1, result.stdout + result.stderr
    assert "no space left on the disk of" in result.stderr.splitlines()[0]
    assert RunFolder(next(small_disk.glob("results/**/run.json")).parent).status().state == "failed"


def test_a_truncated_dataset_is_refused_before_anything_starts(
    forked: Callable[..., Run], stage: Path, tmp_path: Path
) -> None:
    forked("trainer.max_steps=1")
    copy = tmp_path / "data"
    shutil.copytree(next((stage / "data").glob("local-*")), copy)
    binary = copy / "my-llama_00_text_document.bin"
    os.truncate(binary, binary.stat().st_size // 2)
    paths = f"data.paths=[{copy}/my-llama_00_text_document]"
    dataset = ("data=pile", f"data.folder={copy}", "data.tokenizer=/nowhere", paths, "data.weights=[]")
    result = run_script(tmp_path, "train.py", *SMALL, *dataset)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    for words in ("2 problems", "my-llama_00_text_document.bin", "tokenizer.json"):
        assert words in result.stderr, words
    assert not list(tmp_path.glob("results"))
