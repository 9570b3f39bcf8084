"""Fill the stage folder with container image, tokenizer and code; check, pack and install it (`--help`)."""

import nemo_bench.startup  # noqa: F401  # isort: skip  (first)
import hydra
from omegaconf import DictConfig

from nemo_bench import cli
from nemo_bench.stage.config import StageConfig

app = cli.Application(StageConfig)


@hydra.main(version_base="1.3", config_path="conf", config_name="setup_stage")
def main(cfg: DictConfig) -> None:
    app.guard("nemo_bench.stage.command", "run_stage", cfg)


if __name__ == "__main__":
    cli.verbs("fill", "check", "pack", "install")
    app.run(main)
