"""Processes killed at a chosen change on disk."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")


def killed(task: Callable[[], object], below: Path, at: int) -> bool:
    """Run `task` in a process that is killed at its `at`-th change below a folder; return whether it was."""
    pid = os.fork()
    if pid == 0:
        left = at

        def hook(event: str, args: tuple[object, ...]) -> None:
            nonlocal left
            changes = event in _CHANGES or (event == "open" and isinstance(args[2], int) and args[2] & 3)
            if changes and isinstance(args[0], (str, os.PathLike)) and str(args[0]).startswith(str(below)):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.addaudithook(hook)
            task()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL)
    return os.WIFSIGNALED(status)
