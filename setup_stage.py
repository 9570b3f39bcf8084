"""Fills the stage folder with container image, tokenizer and code; checks it, packs it, installs it (`--help`)."""

import hydra
from omegaconf import DictConfig

from nemo_bench import cli
from nemo_bench.stage.config import StageConfig


@hydra.main(version_base="1.3", config_path="conf", config_name="setup_stage")
def main(cfg: DictConfig) -> None:
    # Imported here: composing and printing a configuration needs none of it.
    from nemo_bench.stage.run import run_stage

    cli.guard(run_stage, cfg)


if __name__ == "__main__":
    cli.verbs("fill", "check", "pack", "install")
    cli.run(main, StageConfig)
