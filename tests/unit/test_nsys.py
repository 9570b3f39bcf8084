"""A rank that replaces itself with `nsys profile <itself>`: its arguments, its process, its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_bench.cluster import nsys
from nemo_bench.config import ProfileConfig
from nemo_bench.errors import BenchError

from ..composing import PROJECT
from ..nsys import calls, install

# Does what a rank does first, then says who it is.
RANK = """
import json, os, signal, sys
from pathlib import Path
from nemo_bench.config import ProfileConfig
from nemo_bench.cluster import nsys
run_dir, rank, ending = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
nsys.wrap(ProfileConfig(kind="nsys", ranks=[1, 9], nsys_args=["--gpu-metrics-devices=all"]), run_dir, rank)
print(json.dumps({
    "arguments": sys.argv, "pid": os.getpid(), "parent": os.getppid(), "group": os.getpgrp(),
    "named": os.environ.get("NVTE_NVTX_ENABLED"), "mark": os.environ.get(nsys.VARIABLE),
    "inherited": os.read(int(sys.argv[4]), 5).decode(),
    "parents_signals": Path(f"/proc/{os.getppid()}/status").read_text(),
}), flush=True)
if ending == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(7 if ending == "failed" else 0)
"""


def run_rank(tmp_path: Path, rank: int, ending: str = "well") -> tuple[subprocess.Popen[bytes], dict[str, Any]]:
    install(tmp_path / "bin")
    (tmp_path / "run").mkdir()
    read_fd, write_fd = os.pipe()
    os.write(write_fd, b"alive")
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", RANK, str(tmp_path / "run"), str(rank), ending, str(read_fd)],
        env={**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "PYTHONPATH": str(PROJECT)},
        stdout=subprocess.PIPE,
        pass_fds=[read_fd],
        start_new_session=True,
    )
    output, _ = process.communicate(timeout=30)
    os.close(read_fd)
    os.close(write_fd)
    content: dict[str, Any] = json.loads(output)
    return process, content


@pytest.mark.parametrize(("ending", "status"), [("well", 0), ("failed", 7), ("killed", 128 + signal.SIGKILL)])
def test_a_chosen_rank_runs_under_nsys_and_keeps_its_place(tmp_path: Path, ending: str, status: int) -> None:
    process, rank = run_rank(tmp_path, 9, ending)
    assert process.returncode == status
    # The process that was started is nsys now, and leads the group that will be ended; the rank is its child.
    ((pid, arguments),) = calls(tmp_path / "bin").items()
    assert pid == process.pid == rank["parent"] == rank["group"]
    options, command = arguments[: arguments.index(sys.executable)], arguments[arguments.index(sys.executable) :]
    assert " ".join(options) == (
        f"profile --output={tmp_path}/run/profile/rank9 --force-overwrite=true --trace=cuda,nvtx --sample=none "
        "--cpuctxsw=none --capture-range=cudaProfilerApi --capture-range-end=stop --cuda-graph-trace=node "
        "--gpu-metrics-devices=all"
    )
    assert command[:3] == [sys.executable, "-u", "-c"]
    assert rank["arguments"][1:4] == [str(tmp_path / "run"), "9", ending]
    # What the launching process gave it is still open; what told it that it is wrapped is told no one else.
    assert (rank["inherited"], rank["named"], rank["mark"]) == ("alive", "1", None)
    # Slurm's warning ahead of the time limit goes to every process of the step: blocked by the rank, it ends no nsys.
    line = next(line for line in rank["parents_signals"].splitlines() if line.startswith("SigBlk:"))
    assert int(line.split()[1], 16) & 1 << (signal.SIGUSR1 - 1)


def test_other_ranks_go_on_as_they_are(tmp_path: Path) -> None:
    process, rank = run_rank(tmp_path, 0)
    assert rank["pid"] == process.pid and rank["named"] is None
    assert calls(tmp_path / "bin") == {} and not (tmp_path / "run/profile").exists()


def test_a_rank_without_nsys_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(nsys.VARIABLE, raising=False)
    with pytest.raises(BenchError, match="no `nsys` on PATH where the ranks run"):
        nsys.wrap(ProfileConfig(kind="nsys"), tmp_path, 0)
    nsys.wrap(ProfileConfig(kind="torch"), tmp_path, 0)
