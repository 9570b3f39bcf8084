"""What a configuration's fields may hold, declared with the field: a number's range, a word's choices, a path."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Iterator
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from nemo_bench.errors import ConfigurationRefused, Problem, text_of

_LIMITS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "least": (operator.ge, "at least"),
    "above": (operator.gt, "more than"),
    "most": (operator.le, "at most"),
    "below": (operator.lt, "less than"),
}
PATH = {"path": True}  # becomes absolute: ranks, and readers of the record, have other working folders


def number(default: Any = MISSING, **limits: float) -> Any:
    """Declare a number and its range: `least`, `above`, `most`, `below`. Every number must be finite."""
    return field(default=default, metadata=limits)


def choice(default: Any, *others: str | None) -> Any:
    """Declare a word and all that it may be."""
    return field(default=default, metadata={"valid": [word for word in (default, *others) if word is not MISSING]})


def kernel(default: bool | None) -> Any:
    """Declare the switch of a kernel, which needs a GPU."""
    return field(default=default, metadata={"gpu_only": True})


def settings(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Field[Any]]]:
    """Give every field of a configuration, sections before what they hold: its key, its owner, the field."""
    for setting in fields(config):
        value = getattr(config, setting.name)
        yield prefix + setting.name, config, setting
        if is_dataclass(value):
            yield from settings(value, f"{prefix}{setting.name}.")


def field_problems(config: Any) -> list[Problem]:
    """Return a problem for every number out of its range, every word that is no choice, and every empty path."""
    problems = []
    for key, value, setting in _values(config):
        valid = setting.metadata.get("valid")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            problems += _number_problems(key, value, setting)
        elif valid is not None and value not in valid:
            name = setting.name if "_" in setting.name else key  # "attention backend", "data kind"
            rule = f"unknown {name.replace('_', ' ').replace('.', ' ')}"
            problems.append(Problem(key, value, rule, f"valid: {', '.join(map(text_of, valid))}"))
        elif setting.metadata.get("path") and value == "":  # else ${stage_path}/data is a folder of the root
            problems.append(Problem(key, value, "is empty", "name a file or a folder; for stage_path also STAGE_PATH"))
    return problems


def _values(config: Any) -> Iterator[tuple[str, Any, Field[Any]]]:
    """Give every value of a configuration, those in lists and dictionaries one by one."""
    for key, owner, setting in settings(config):
        value = getattr(owner, setting.name)
        if isinstance(value, dict):
            yield from ((f"{key}.{name}", item, setting) for name, item in value.items())
        else:
            yield from ((key, item, setting) for item in (value if isinstance(value, list) else [value]))


def _number_problems(key: str, value: float, setting: Field[Any]) -> list[Problem]:
    limits = {name: limit for name, limit in setting.metadata.items() if name in _LIMITS}
    exceeded = [name for name, limit in limits.items() if not _LIMITS[name][0](value, limit)]
    if math.isfinite(value) and not exceeded:
        return []
    rule = " and ".join(f"{_LIMITS[name][1]} {limit}" for name, limit in limits.items())
    fix = f"the default: {text_of(setting.default) if setting.default not in (NO_DEFAULT, MISSING) else 'leave it out'}"
    if math.isfinite(value) and exceeded[0] in ("least", "most"):
        fix = f"nearest that works: {limits[exceeded[0]]}"
    return [Problem(key, value, f"must be {rule}", fix)]


def absolute(path: str) -> str:
    """Return the path as any working folder reads it, with `~` expanded; an empty one stays empty."""
    return path and str(Path(os.path.expanduser(path)).absolute())


def normalise(config: Any) -> None:
    """Make every path absolute; raise ConfigurationRefused for a section, list or dictionary that is none."""
    problems = []
    for key, owner, setting in settings(config):
        value, kind = getattr(owner, setting.name), str(setting.type).partition("[")[0]
        # OmegaConf lets `${...}` and [[1]] through.
        fits = kind not in ("list", "dict") or type(value).__name__ == kind
        if "Config" in kind:
            kind, fits = "section", value is None or is_dataclass(value)
        if not fits or (kind == "list" and any(isinstance(item, (list, dict)) for item in value)):
            problems.append(Problem(key, value, f"is not a {kind} of plain values", "write them out"))
        elif setting.metadata.get("path") and value:
            setattr(owner, setting.name, absolute(value) if isinstance(value, str) else [*map(absolute, value)])
    if problems:
        raise ConfigurationRefused(problems)
