"""Configurations as train.py composes them."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from nemo_bench.config import TrainConfig, typed

PROJECT = Path(__file__).resolve().parents[1]


def composed(*overrides: str) -> TrainConfig:
    """Return the configuration of `train.py` with these overrides.

    A choice of groups is composed once, which takes 0.1 s; values are then set by the function that Hydra sets them by.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    groups = [override for override in parsed if (PROJECT / "conf" / override.key_or_group).is_dir()]
    raw = copy.deepcopy(_choice(*(str(override.input_line) for override in groups)))
    ConfigLoaderImpl._apply_overrides_to_config([override for override in parsed if override not in groups], raw)
    return typed(raw)


@cache
def _choice(*groups: str) -> DictConfig:
    with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
        return compose("train", list(groups))
