"""The schema of `report.py`'s configuration (conf/report.yaml), and plain paths on its command line."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

import nemo_bench.config  # noqa: F401  registers the resolvers that conf/ uses
from nemo_bench.cli import quoted_path
from nemo_bench.fields import number


@dataclass
class ReportConfig:
    """What is reported, and against what."""

    runs: Any = MISSING  # a path, or a list of them
    baseline: Any = None  # the same
    output: str | None = "auto"
    archive: str | None = None
    reference: Any = None  # a table's name or file, or a list of them
    tolerance: float = number(0.05, least=0, below=1)  # of a verdict, as a fraction
    total_tokens: float = number(1e12, above=0)  # the budget behind "days to train"
    stage_path: str = MISSING
    # of bare logs; the first three are groups
    model: Any = None
    precision: Any = None
    gpu: Any = None
    gpus: int | None = number(None, least=1)
    global_batch_size: int | None = number(None, least=1)
    seq_length: int | None = number(None, least=1)
    max_steps: int | None = number(None, least=1)


ConfigStore.instance().store(name="report_schema", node=ReportConfig)

_PATHS = ("runs", "baseline", "output", "archive", "reference")


def quoted(arguments: list[str]) -> list[str]:
    """Return the command line with its paths in Hydra's quotes; a plain path, `job.out`, means `runs=job.out`."""
    plain, others = [], []
    for before, argument in zip(["", *arguments], arguments):
        key, equals, value = argument.partition("=")
        exists = os.path.exists(argument)
        if argument.startswith(("-", "+", "~")) or (before.startswith("-") and not exists):
            others.append(argument)  # an option of Hydra's, or the word that follows one
        elif key in _PATHS and not re.match(r"$|[\[\"'$]|[\w./-]+$", value, re.ASCII):
            # A list without brackets is Hydra's to refuse.
            others.append(argument if "," in value and not os.path.exists(value) else f"{key}={quoted_path(value)}")
        elif equals and re.fullmatch(r"[\w.@/]+", key) and not exists:
            others.append(argument)
        else:
            plain.append(quoted_path(argument))
    return [*others, *([f"runs=[{','.join(plain)}]"] if plain else [])]
