"""Make Megatron datasets from documents: download, tokenise, verify (`--help`)."""

import nemo_bench.startup  # noqa: F401  # isort: skip  (first)
import hydra
from omegaconf import DictConfig

from nemo_bench import cli
from nemo_bench.data.config import PreparationConfig

app = cli.Application(PreparationConfig)


@hydra.main(version_base="1.3", config_path="conf", config_name="prepare_data")
def main(cfg: DictConfig) -> None:
    app.guard("nemo_bench.data.prepare", "run_preparation", cfg)


if __name__ == "__main__":
    cli.verbs("prepare", "check")
    app.run(main)
