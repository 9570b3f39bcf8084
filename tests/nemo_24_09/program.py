"""What NeMo 1's `megatron_gpt_pretraining.py` does to train from the start; the package comes without its examples."""

from __future__ import annotations

from typing import Any

from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronTrainerBuilder
from nemo.core.config import hydra_runner
from nemo.utils.exp_manager import exp_manager


def main(cfg: Any) -> None:
    trainer = MegatronTrainerBuilder(cfg).create_trainer()
    exp_manager(trainer, cfg.exp_manager)
    trainer.fit(MegatronGPTModel(cfg.model, trainer))


if __name__ == "__main__":
    hydra_runner(config_path="conf", config_name="megatron_gpt_config")(main)()
