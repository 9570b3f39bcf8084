"""The table of known causes of failed runs, `causes.yaml`, and the user's own in the stage folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template

import yaml

from nemo_bench.errors import BenchError

CAUSES = Path(__file__).with_name("causes.yaml")


@dataclass(frozen=True)
class Cause:
    """An entry of `causes.yaml`, whose head describes the fields."""

    pattern: str
    meaning: str
    remedy: str = ""
    source: str = ""


def read_causes(path: Path) -> list[Cause]:
    """Return the entries of a table of causes; raise BenchError if it is not one."""
    try:
        causes = [Cause(**entry) for entry in yaml.safe_load(path.read_text()) or []]
        for cause in causes:
            re.compile(cause.pattern)
    except (yaml.YAMLError, TypeError, re.error) as error:
        raise BenchError(f"{path} is not a table of causes: {error}\n{CAUSES} describes its form") from None
    return causes


def known_cause(text: str, stage: Path, values: Mapping[str, object]) -> list[str] | None:
    """Return the meaning and the remedy of the first entry that matches; None if there is none.

    Args:
        text: the exception's message, or a log from the first error on.
        stage: the stage folder; the entries of its own `causes.yaml` come first.
        values: what `$name` in an entry can mean besides the named groups of its pattern.
    """
    causes, problem = read_causes(CAUSES), []
    if (own := stage / CAUSES.name).exists():
        try:
            causes = read_causes(own) + causes
        except BenchError as error:  # must not hide why the run failed
            problem = str(error).splitlines()
    for cause in causes:
        if match := re.search(cause.pattern, text, re.MULTILINE):
            values = {**values, **{name: group or "" for name, group in match.groupdict().items()}}
            lines = [Template(line).safe_substitute(values) for line in (cause.meaning, cause.remedy) if line]
            return [*(line.strip().removesuffix(":") for line in lines), *problem]
    return None
