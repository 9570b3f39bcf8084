"""The process around each rank of a program that is not ours: record, exit status, signals, and its launcher's end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_bench.cluster import lifeline
from nemo_bench.record import folder as record

WRAPPER = Path(record.__file__).parents[1] / "launch" / "program_rank.py"


def wrapped(run_dir: Path, script: str, rank: str = "0") -> subprocess.Popen[bytes]:
    # -S: no installed packages, as in a container that has none of ours.
    return subprocess.Popen(
        [sys.executable, "-S", str(WRAPPER), str(run_dir), "/bin/sh", "-c", script],
        env={"PATH": os.environ["PATH"], "SLURM_PROCID": rank},
    )


def test_rank_0_alone_records_its_machine_and_the_programs_phases(tmp_path: Path) -> None:
    assert wrapped(tmp_path, "exit 0", rank="3").wait(60) == 0
    assert list(tmp_path.iterdir()) == []
    assert wrapped(tmp_path, "exit 0").wait(60) == 0
    assert json.loads((tmp_path / "node.json").read_text())["python"].startswith("3.")
    events, _ = record.read_lines(tmp_path / record.EVENTS)
    assert [event["event"] for event in events] == ["importing", "done"]


@pytest.mark.parametrize(
    ("log", "message"),
    [
        ("starting\nValueError: bad table\nRuntimeError: closed\n", "ValueError: bad table\nRuntimeError: closed"),
        ("", "exit status 7"),
    ],
)
def test_the_exit_status_and_the_first_error_of_the_log_are_kept(log: str, message: str, tmp_path: Path) -> None:
    run = record.RunFolder(tmp_path)
    run.log(2).write_text(log)
    assert wrapped(tmp_path, "exit 7", rank="2").wait(60) == 7
    (error,) = run.rank_errors()
    assert (error["rank"], error["type"], error["message"]) == (2, "ProgramError", message)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_it_ends_by_the_signal_that_ended_the_program(number: signal.Signals, tmp_path: Path) -> None:
    assert wrapped(tmp_path, f"kill -{number.value} $$", rank="1").wait(60) == -number


def test_program_and_wrapper_end_with_the_launching_process(tmp_path: Path) -> None:
    record.RunFolder(tmp_path).create(config_yaml="{}\n", command=["train.py"], overrides=[], ranks=1)
    read_fd, write_fd = os.pipe()
    started = subprocess.Popen(
        [sys.executable, str(WRAPPER), str(tmp_path), "/bin/sh", "-c", "echo up; sleep 600"],
        env={**os.environ, "RANK": "0", lifeline.VARIABLE: str(read_fd)},
        stdout=subprocess.PIPE,
        pass_fds=[read_fd],
        start_new_session=True,
    )
    assert started.stdout is not None and started.stdout.readline() == b"up\n"
    os.close(read_fd)
    os.close(write_fd)
    assert started.wait(60) == -signal.SIGKILL
    assert started.stdout.read() == b""  # its end: the program, which held the other side, is gone too
    assert record.RunFolder(tmp_path).status().state == "killed"


def test_a_profiler_stands_in_front_of_the_program_on_its_ranks_alone(tmp_path: Path) -> None:
    profiler = ["--on-ranks", "0,8", "/bin/sh", "-c", 'echo "rank {rank}"; exec "$@"', "sh", "--"]
    for rank, printed in ((8, b"rank 8\nprogram\n"), (1, b"program\n")):
        done = subprocess.run(
            [sys.executable, "-S", str(WRAPPER), str(tmp_path), *profiler, "/bin/echo", "program"],
            env={"PATH": os.environ["PATH"], "SLURM_PROCID": str(rank)},
            capture_output=True,
            check=True,
        )
        assert done.stdout == printed
    assert (tmp_path / record.PROFILE).is_dir()


def test_the_program_runs_in_its_folder_and_its_log_has_the_recipes_name(tmp_path: Path) -> None:
    run_dir, home = tmp_path / "24.11/fp8/70b/128/run", tmp_path / "NeMo"
    for folder in (run_dir, home):
        folder.mkdir(parents=True)
    environment = {"PATH": os.environ["PATH"], "SLURM_PROCID": "0", "SLURM_JOB_ID": "12", "PYTHONPATH": "/image"}
    with record.RunFolder(run_dir).log(0).open("w") as log:
        command = [sys.executable, "-S", str(WRAPPER), str(run_dir), f"--in={home}", "/bin/sh", "-c", "pwd; env"]
        subprocess.run(command, env=environment, stdout=log, check=True)
    printed = (run_dir.parent / "log-nemo_llama3.1_70b_128_12.out").read_text().splitlines()
    assert printed[0] == str(home) and f"PYTHONPATH={home}:/image" in printed


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-S", str(WRAPPER), str(tmp_path), "/no/such/program"],
        env={"PATH": os.environ["PATH"], "SLURM_PROCID": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1 and "Traceback" not in process.stderr
    (error,) = record.RunFolder(tmp_path).rank_errors()
    assert "/no/such/program" in error["message"]
