"""Measures the machine before a benchmark, and names what is slow, silent or broken (`--help`)."""

import nemo_bench.startup  # noqa: F401  # isort: skip  (first)
import hydra
from omegaconf import DictConfig

from nemo_bench import cli
from nemo_bench.config import TrainConfig

app = cli.Application(TrainConfig)


@hydra.main(version_base="1.3", config_path="conf", config_name="check_machine")
def main(cfg: DictConfig) -> None:
    app.guard("nemo_bench.machine.command", "run_check", cfg)


if __name__ == "__main__":
    app.run(main)
