"""Composes, checks and runs one point of the Llama 3.1 pre-training performance benchmark (`--help`)."""

import hydra
from omegaconf import DictConfig

import nemo_bench.config  # noqa: F401  registers the schema that conf/train.yaml starts from
from nemo_bench import cli


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> None:
    # Imported here: composing and printing a configuration needs none of it.
    from nemo_bench.launch.point import run_point

    cli.guard(run_point, cfg)


if __name__ == "__main__":
    cli.run(main)
