"""Errors that a user is meant to read: one message that names the fix, no traceback."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


class BenchError(Exception):
    """Something the user can mend. `str(error)` is the whole message; `exit_code` ends the process."""

    exit_code = 2


class RunFailed(BenchError):
    """A run that was started and did not complete; the run folder holds the evidence."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Problem:
    """One rule that a configuration breaks."""

    key: str
    value: object
    rule: str
    fix: str

    def __str__(self) -> str:
        return f"{self.key}={self.value}\n    {self.rule}\n    {self.fix}"


class ConfigurationRefused(BenchError):
    """All problems of one configuration."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = list(problems)
        count = len(self.problems)
        head = "1 problem" if count == 1 else f"{count} problems"
        super().__init__(f"{head} in this configuration:\n\n" + "\n\n".join(f"  {p}" for p in self.problems))
