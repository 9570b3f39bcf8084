"""What a benchmark point should take, from measured rates, and which layout would be faster (`--help`)."""

import nemo_bench.startup  # noqa: F401  # isort: skip  (first)
import hydra
from omegaconf import DictConfig

from nemo_bench import cli
from nemo_bench.planning.config import EstimateConfig

app = cli.Application(EstimateConfig)


@hydra.main(version_base="1.3", config_path="conf", config_name="estimate")
def main(cfg: DictConfig) -> None:
    app.guard("nemo_bench.planning.command", "run_estimate", cfg)


if __name__ == "__main__":
    cli.verbs("search")
    app.run(main)
