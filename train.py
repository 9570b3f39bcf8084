"""Composes, checks and runs one point of the Llama 3.1 pre-training performance benchmark (`--help`)."""

import nemo_bench.startup  # noqa: F401  # isort: skip  (first)
import os
import sys

import hydra
from omegaconf import DictConfig

from nemo_bench import cli, recipe_variables
from nemo_bench.config import TrainConfig

app = cli.Application(TrainConfig)


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> None:
    app.guard("nemo_bench.launch.submission", "start_point", cfg)


def start() -> None:
    sys.argv += recipe_variables.overrides(sys.argv[1:], os.environ)
    main()


if __name__ == "__main__":
    app.run(start)
