"""Errors that a user is meant to read: one message that names the fix, no traceback."""

from __future__ import annotations


class BenchError(Exception):
    """Something the user can mend. `str(error)` is the whole message; `exit_code` ends the process."""

    exit_code = 2


class RunFailed(BenchError):
    """A run that was started and did not complete; the run folder holds the evidence."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code
