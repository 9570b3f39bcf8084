"""The process around each rank of a program that is not ours: record, exit status, signals, and its launcher's end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_bench.cluster.processes import LIFELINE
from nemo_bench.record import folder as record

WRAPPER = Path(record.__file__).parents[1] / "launch" / "program_rank.py"


def wrapped(run_dir: Path, *command: str, rank: int = 0) -> subprocess.CompletedProcess[str]:
    # -S: no installed packages, as in a container that has none of ours.
    return subprocess.run(
        [sys.executable, "-S", str(WRAPPER), str(run_dir), *command],
        env={"PATH": os.environ["PATH"], "SLURM_PROCID": str(rank)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_rank_0_alone_records_its_machine_and_the_programs_phases(tmp_path: Path) -> None:
    assert wrapped(tmp_path, "true", rank=3).returncode == 0
    assert list(tmp_path.iterdir()) == []
    assert wrapped(tmp_path, "true").returncode == 0
    assert json.loads((tmp_path / "node.json").read_text())["python"].startswith("3.")
    events, _ = record.read_lines(tmp_path / record.EVENTS)
    assert [event["event"] for event in events] == ["importing", "done"]


@pytest.mark.parametrize(
    ("log", "script", "status", "message"),
    [
        ("starting\nValueError: bad\nRuntimeError: closed\n", "exit 7", 7, "ValueError: bad\nRuntimeError: closed"),
        ("", "exit 7", 7, "exit status 7"),
        ("", "kill -KILL $$", -signal.SIGKILL, None),
        ("", "kill -SEGV $$", -signal.SIGSEGV, None),
    ],
)
def test_it_ends_as_the_program_did_and_keeps_the_first_error_of_its_log(
    log: str, script: str, status: int, message: str | None, tmp_path: Path
) -> None:
    run = record.RunFolder(tmp_path)
    run.log(2).write_text(log)
    assert wrapped(tmp_path, "sh", "-c", script, rank=2).returncode == status
    errors = [(error["rank"], error["type"], error["message"]) for error in run.rank_errors()]
    assert errors == ([(2, "ProgramError", message)] if message else [])


def test_program_and_wrapper_end_with_the_launching_process(tmp_path: Path) -> None:
    read_fd, write_fd = os.pipe()
    started = subprocess.Popen(
        [sys.executable, str(WRAPPER), str(tmp_path), "/bin/sh", "-c", "echo up; sleep 600"],
        env={**os.environ, "RANK": "0", LIFELINE: str(read_fd)},
        stdout=subprocess.PIPE,
        pass_fds=[read_fd],
        start_new_session=True,
    )
    assert started.stdout is not None and started.stdout.readline() == b"up\n"
    os.close(read_fd)
    os.close(write_fd)
    assert started.wait(60) == -signal.SIGKILL
    assert started.stdout.read() == b""  # its end: the program, which held the other side, is gone too


def test_a_profiler_stands_in_front_of_the_program_on_its_ranks_alone(tmp_path: Path) -> None:
    profiler = ["--on-ranks", "0,8", "/bin/sh", "-c", 'echo "rank {rank}"; exec "$@"', "sh", "--"]
    for rank, printed in ((8, "rank 8\nprogram\n"), (1, "program\n")):
        assert wrapped(tmp_path, *profiler, "/bin/echo", "program", rank=rank).stdout == printed
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
    done = wrapped(tmp_path, "/no/such/program", rank=1)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (error,) = record.RunFolder(tmp_path).rank_errors()
    assert "/no/such/program" in error["message"]
