"""The schema of `estimate.py`'s configuration (conf/estimate.yaml): a benchmark point, and what is asked about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore

from nemo_bench.config import TrainConfig
from nemo_bench.fields import PATH, choice


@dataclass
class EstimateConfig(TrainConfig):
    """A benchmark point and what is asked about it."""

    action: str = choice("point", "search")
    calibrate: Any = None  # a run folder, or the seconds that the first point of the command took
    machine_check: bool = True  # take the rates of this cluster's last check_machine.py, where no key names others
    output: str | None = field(default=None, metadata=PATH)  # folder for estimate.json and schedule.html


ConfigStore.instance().store(name="estimate_schema", node=EstimateConfig)
