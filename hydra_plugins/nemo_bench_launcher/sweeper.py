"""Hydra's own sweeper composes every point twice, to check it and to run it, and reads all files anew each time."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

from hydra._internal.config_repository import CachingConfigRepository, IConfigRepository
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from omegaconf import DictConfig


class Repository(CachingConfigRepository):
    """Reads each file once, and gives a copy: composing a point changes it. A pickle is the fastest copy."""

    def __init__(self, delegate: IConfigRepository) -> None:
        super().__init__(delegate)
        self.pickles: dict[str, bytes] = {}

    def load_config(self, config_path: str) -> Any:
        if config_path not in self.pickles:
            self.pickles[config_path] = pickle.dumps(self.delegate.load_config(config_path))
        return pickle.loads(self.pickles[config_path])

    def __deepcopy__(self, memo: object) -> Repository:
        """Hydra copies the repository for each point; what was read is to be kept."""
        return self


class Sweeper(BasicSweeper):
    """Composes each point once."""

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        loader = hydra_context.config_loader
        loader.repository = Repository(loader.repository)
        compose = loader.load_sweep_config
        checked: dict[tuple[str, ...], DictConfig] = {}

        def compose_once(master_config: DictConfig, sweep_overrides: Sequence[str]) -> DictConfig:
            key = tuple(sweep_overrides)
            if key in checked:
                return checked.pop(key)
            checked[key] = compose(master_config, list(sweep_overrides))
            return checked[key]

        loader.load_sweep_config = compose_once
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
