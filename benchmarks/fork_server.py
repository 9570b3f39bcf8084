"""Python programs forked from a process that has made their imports: NeMo's take 20 to 40 s, a fork a tenth of one.

`ForkServer.popen` stands in for `subprocess.Popen` where `cluster.processes.started` starts ranks; all else, the rank's
program included, is what train.py runs. The server reads commands from its standard input and answers with process
numbers and exit statuses. It and all that it forked end with the process that started it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from types import TracebackType
from typing import Any, NoReturn
from unittest import mock

from nemo_bench.cluster.processes import LIFELINE
from nemo_bench.project import PROJECT

POLL_S = 0.02


class ForkedProcess:
    """What the server forked, with the part of `subprocess.Popen` that a process group uses."""

    def __init__(self, server: ForkServer, pid: int) -> None:
        self.server, self.pid = server, pid

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal; None while the process runs."""
        return self.server.exit_status(self.pid, wait=False)

    def wait(self) -> int:
        """Return the exit status once the process has ended."""
        status = self.server.exit_status(self.pid, wait=True)
        assert status is not None
        return status


class ForkServer:
    """The client's end of the server; made once the imports are.

    Args:
        what: is imported: "cpu" or "cuda", NeMo for ranks on that device; "megatron_bridge", for ranks on GPUs;
            "torch"; "scripts", what a login node needs.
        environment: the whole environment of the imports.
        prefix: of the server's command, which starts it elsewhere.
    """

    def __init__(self, what: str, environment: dict[str, str], prefix: Sequence[str] = ()) -> None:
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "benchmarks.fork_server", what],
            cwd=PROJECT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # an answer that has come is in no buffer, where select would not see it
            start_new_session=True,
        )
        self._exit_statuses: dict[int, int] = {}
        self._answer()

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.communicate()

    def popen(
        self, command: list[str], *, env: dict[str, str], stdout: Any, stderr: Any = None, cwd: Any = None, **_: Any
    ) -> ForkedProcess:
        """Fork `python -m MODULE ...`, `python -c CODE ...` or `python SCRIPT ...`, in a session of its own."""
        assert self._process.stdin is not None
        files = [str(stdout.name), str(getattr(stderr, "name", stdout.name))]
        request = {"command": command[1:], "environment": env, "folder": str(cwd or os.getcwd()), "files": files}
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        while "started" not in (answer := self._answer()):
            self._note(answer)
        return ForkedProcess(self, answer["started"])

    def run(self, command: list[str], *, env: dict[str, str], cwd: Any = None) -> subprocess.CompletedProcess[str]:
        """Run a command as `popen` does, to its end."""
        with tempfile.NamedTemporaryFile("r") as stdout, tempfile.NamedTemporaryFile("r") as stderr:
            status = self.popen(command, env=env, stdout=stdout, stderr=stderr, cwd=cwd).wait()
            return subprocess.CompletedProcess(command, status, stdout.read(), stderr.read())

    def exit_status(self, pid: int, *, wait: bool) -> int | None:
        """Return the exit status of a process; None while it runs and is not waited for."""
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


def import_scripts() -> None:
    """Import what the scripts of this project import on a login node."""
    from hydra import compose, initialize_config_dir

    import nemo_bench.data.prepare
    import nemo_bench.launch.submission
    import nemo_bench.report.command
    import nemo_bench.stage.command  # noqa: F401

    with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
        compose("train")  # imports Hydra's plugins and grammar


def import_stack(stack: str, device: str) -> None:
    """Import what a rank imports, without a first call to CUDA: the driver does not survive a fork."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    import torch

    from nemo_bench.training import cpu_device, incompatibilities, patches

    if device == "cpu":
        cpu_device.install()
    else:
        patches.te_weight_gradient_accumulation()
        with contextlib.suppress(ImportError), mock.patch("torch.cuda.is_available", return_value=False):
            import modelopt.torch.quantization  # noqa: F401  asks the GPU what it is; nothing here uses it
    # Needed at the import itself; the rank makes the other repairs.
    incompatibilities.resiliency_version() if stack == "megatron_bridge" else incompatibilities.optimizer_arguments()
    importlib.import_module(f"nemo_bench.training.{stack}")
    if device == "cuda" and torch.cuda.is_initialized():
        raise SystemExit("an import has initialised CUDA: ranks cannot be forked from here")


def serve(what: str) -> None:
    """Fork a process for each line of standard input, until that ends."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what the imports print is no answer
    if what == "scripts":
        import_scripts()
    elif what == "torch":
        import nemo_bench.machine.measure
        import nemo_bench.machine.rank
        import nemo_bench.training.peers  # noqa: F401
    elif what == "megatron_bridge":
        import_stack(what, "cuda")
    else:
        import_stack("nemo2", what)
    answers.write(b"{}\n")
    read_fd, write_fd = os.pipe()  # the lifeline of the ranks: the server alone holds the writing end
    running: set[int] = set()
    while True:
        if select.select([requests], [], [], POLL_S if running else None)[0]:
            line = requests.readline()
            if not line:
                break
            pid = os.fork()
            if pid == 0:
                os.close(write_fd)
                answers.close()
                request = json.loads(line)
                request["environment"][LIFELINE] = str(read_fd)
                run(**request)
            running.add(pid)
            answers.write(json.dumps({"started": pid}).encode() + b"\n")
        while running and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            running.discard(ended[0])
            status = os.waitstatus_to_exitcode(ended[1])
            answers.write(json.dumps({"ended": ended[0], "status": status}).encode() + b"\n")
    for pid in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    os._exit(0)  # taking all that was imported down in order takes seconds


def run(command: list[str], environment: dict[str, str], folder: str, files: list[str]) -> NoReturn:
    """Run the program of a command line in this process, and end with its exit status."""
    os.setsid()
    os.chdir(folder)
    for descriptor, path, flags in zip((0, 1, 2), (os.devnull, *files), (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY)):
        os.dup2(os.open(path, flags | os.O_APPEND), descriptor)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1) for descriptor in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    program, *arguments = (word for word in command if word != "-u")
    status = 0
    try:
        if program == "-m":
            sys.argv = arguments
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        elif program == "-c":
            sys.argv = ["-c", *arguments[1:]]
            exec(arguments[0], {"__name__": "__main__"})
        else:
            sys.argv = [program, *arguments]
            runpy.run_path(program, run_name="__main__")
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    serve(sys.argv[1])
