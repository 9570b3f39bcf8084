"""Configurations as train.py composes them."""

from __future__ import annotations

from pathlib import Path

from hydra import compose, initialize_config_dir

from nemo_bench.config import TrainConfig, typed

PROJECT = Path(__file__).resolve().parents[1]


def composed(*overrides: str) -> TrainConfig:
    """Return the configuration of `train.py` with these overrides."""
    with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
        return typed(compose("train", list(overrides)))
