"""The schema of `report.py`'s configuration (conf/report.yaml), and plain paths on its command line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

import nemo_bench.config  # noqa: F401  registers the resolvers that conf/ uses


@dataclass
class ReportConfig:
    """What is reported, and against what."""

    runs: Any = MISSING  # a path, or a list of them
    baseline: Any = None  # the same
    output: str | None = "auto"
    archive: str | None = None
    reference: Any = None  # a table's name or file, or a list of them
    tolerance: float = 0.05
    total_tokens: float = 1e12  # the budget behind "days to train"
    stage_path: str = MISSING
    # of bare logs; the first three are groups
    model: Any = None
    precision: Any = None
    gpu: Any = None
    gpus: int | None = None
    global_batch_size: int | None = None
    seq_length: int | None = None
    max_steps: int | None = None


ConfigStore.instance().store(name="report_schema", node=ReportConfig)

# Hydra's options that a word follows
_TAKES_A_VALUE = (
    *("-c", "-p", "-cp", "-cn", "-cd"),
    *("--cfg", "--package", "--config-path", "--config-name", "--config-dir"),
)
_PATHS = ("runs", "baseline", "output", "archive", "reference")


def quoted(arguments: list[str]) -> list[str]:
    """Return the command line with its paths in Hydra's quotes; a plain path, `job.out`, means `runs=job.out`."""
    plain, options, others = [], [], []
    for i, argument in enumerate(arguments):
        key, equals, value = argument.partition("=")
        if argument.startswith("-") or (i and arguments[i - 1] in _TAKES_A_VALUE):
            options.append(argument)
        elif (
            equals
            and key in _PATHS
            and value
            and value[0] not in "[\"'$"
            and not re.fullmatch(r"[\w./-]+", value, re.ASCII)
        ):
            # A list without brackets is Hydra's to refuse.
            others.append(argument if "," in value and not Path(value).exists() else f"{key}={_quote(value)}")
        elif argument.startswith(("+", "~")) or (
            equals and re.fullmatch(r"[\w.@/]+", key) and not Path(argument).exists()
        ):
            others.append(argument)
        else:
            plain.append(argument)
    return [*options, *([f"runs=[{','.join(map(_quote, plain))}]"] if plain else []), *others]


def _quote(path: str) -> str:
    return "'" + re.sub(r"(\\*)'", r"\1\1\\'", re.sub(r"(\\+)$", r"\1\1", path)) + "'"
