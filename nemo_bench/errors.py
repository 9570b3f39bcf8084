"""Errors that a user is meant to read: one message that names the fix, no traceback."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


class BenchError(Exception):
    """Something the user can fix. `str(error)` is the whole message; `exit_code` ends the process."""

    exit_code = 2


class RunFailed(BenchError):
    """Something that was started and did not complete."""

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
    # What this machine lacks (a file, GPUs, a program), as opposed to a configuration that is wrong everywhere.
    missing: bool = False

    def __str__(self) -> str:
        return f"{self.key}={text_of(self.value)}\n    {self.rule}\n    {self.fix}"


class Need:
    """Collects the rules that a configuration breaks. It looks up the value of a key, which is thus named once."""

    def __init__(self, cfg: object, *, missing: bool = False) -> None:
        self.cfg, self.missing = cfg, missing
        self.problems: list[Problem] = []

    def __call__(self, holds: object, key: str, rule: str, fix: str, *, value: object = ...) -> None:
        """Add a problem unless `holds`; `value` stands for keys that are not settings."""
        if not holds:
            value = value_of(self.cfg, key) if value is ... else value
            self.problems.append(Problem(key, value, rule, fix, self.missing))


class ConfigurationRefused(BenchError):
    """All problems of one configuration."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = list(problems)
        head = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__(f"{head} in this configuration:\n\n" + "\n\n".join(f"  {p}" for p in self.problems))


def text_of(value: object) -> str:
    """Return a value as it is typed on a Hydra command line."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def value_of(config: Any, key: str) -> Any:
    """Return the value of a dotted key."""
    for name in key.split("."):
        config = config[name] if isinstance(config, dict) else getattr(config, name)
    return config
