"""The schema of `report.py`'s configuration (conf/report.yaml)."""

from __future__ import annotations

from dataclasses import dataclass
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
    reference: str | None = None
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


ConfigStore.instance().store(name="report_schema", node=ReportConfig)
