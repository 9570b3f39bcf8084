"""Ranks forked from a process that has imported NeMo: the imports take 20 to 40 s, a fork a tenth of a second.

`RankServer.popen` stands in for `subprocess.Popen` in `cluster.processes.started`; all else, `training/rank.py`
included, is what train.py runs. The server reads a rank's environment, log and run folder from its standard input and
answers with process numbers and exit statuses. Ranks and server end with the process that started the server.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any
from unittest import mock

from nemo_bench.cluster import lifeline
from nemo_bench.project import PROJECT

POLL_S = 0.02


class ForkedRank:
    """A rank that the server forked, with the part of `subprocess.Popen` that a process group uses."""

    def __init__(self, server: RankServer, pid: int) -> None:
        self.server, self.pid = server, pid

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal; None while the rank runs."""
        return self.server.exit_status(self.pid, wait=False)

    def wait(self) -> int:
        """Return the exit status once the rank has ended."""
        status = self.server.exit_status(self.pid, wait=True)
        assert status is not None
        return status


class RankServer:
    """The client's end of the server; made once NeMo is imported.

    Args:
        device: what the ranks train on, "cpu" or "cuda": it decides what is done ahead of the imports.
        environment: the whole environment of the imports.
    """

    def __init__(self, device: str, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.rank_server", device],
            cwd=PROJECT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # an answer that has come is in no buffer, where select would not see it
            start_new_session=True,
        )
        self._exit_statuses: dict[int, int] = {}
        self._answer()

    def __enter__(self) -> RankServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.communicate()

    def popen(self, command: list[str], *, env: dict[str, str], stdout: Any, **_: Any) -> ForkedRank:
        """Fork a rank; `command` is that of a rank of NeMo 2, whose last word is the run folder."""
        assert self._process.stdin is not None
        request = {"run_dir": command[-1], "environment": env, "log": str(stdout.name)}
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        while "started" not in (answer := self._answer()):
            self._note(answer)
        return ForkedRank(self, answer["started"])

    def exit_status(self, pid: int, *, wait: bool) -> int | None:
        """Return a rank's exit status; None while it runs and is not waited for."""
        assert self._process.stdout is not None
        answers = self._process.stdout.fileno()
        while pid not in self._exit_statuses and (wait or select.select([answers], [], [], 0)[0]):
            self._note(self._answer())
        return self._exit_statuses.get(pid)

    def _note(self, answer: dict[str, int]) -> None:
        self._exit_statuses[answer["ended"]] = answer["status"]

    def _answer(self) -> dict[str, int]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the rank server has ended with exit status {self._process.wait()}")
        answer: dict[str, int] = json.loads(line)
        return answer


def import_stack(device: str) -> None:
    """Import what a rank imports, without a first call to CUDA: the driver does not survive a fork."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    import torch

    from nemo_bench.training import cpu_device, weight_gradient

    if device == "cpu":
        cpu_device.install()
    else:
        weight_gradient.install()
        with contextlib.suppress(ImportError), mock.patch("torch.cuda.is_available", return_value=False):
            import modelopt.torch.quantization  # noqa: F401  asks the GPU what it is; nothing here uses it
    import nemo_bench.training.pretrain  # noqa: F401

    if device == "cuda" and torch.cuda.is_initialized():
        raise SystemExit("an import has initialised CUDA: ranks cannot be forked from here")


def serve(device: str) -> None:
    """Fork a rank for each line of standard input, until that ends."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what the imports print is no answer
    import_stack(device)
    answers.write(b"{}\n")
    read_fd, write_fd = os.pipe()  # the ranks' lifeline: the server alone holds the writing end
    ranks: set[int] = set()
    while True:
        if select.select([requests], [], [], POLL_S if ranks else None)[0]:
            line = requests.readline()
            if not line:
                break
            pid = os.fork()
            if pid == 0:
                os.close(write_fd)
                answers.close()
                request = json.loads(line)
                request["environment"][lifeline.VARIABLE] = str(read_fd)
                _run_rank(**request)
            ranks.add(pid)
            answers.write(json.dumps({"started": pid}).encode() + b"\n")
        while ranks and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            ranks.discard(ended[0])
            status = os.waitstatus_to_exitcode(ended[1])
            answers.write(json.dumps({"ended": ended[0], "status": status}).encode() + b"\n")
    for pid in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    os._exit(0)  # taking all that was imported down in order takes seconds


def _run_rank(run_dir: str, environment: dict[str, str], log: str) -> None:
    os.setsid()
    with open(log, "wb", buffering=0) as file, open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1) for fd in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["rank", run_dir]
    from nemo_bench.training import rank

    status = 1
    with contextlib.suppress(SystemExit):
        rank.main(Path(run_dir))
        status = 0
    sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    serve(sys.argv[1])
