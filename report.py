"""Finished runs, or anybody's logs, to tables, verdicts and one page (`--help`)."""

import nemo_bench.startup  # noqa: F401  # isort: skip  (first)
import sys

import hydra
from omegaconf import DictConfig

from nemo_bench import cli
from nemo_bench.report.config import ReportConfig, quoted

app = cli.Application(ReportConfig)


@hydra.main(version_base="1.3", config_path="conf", config_name="report")
def main(cfg: DictConfig) -> None:
    app.guard("nemo_bench.report.command", "run_report", cfg)


if __name__ == "__main__":
    sys.argv[1:] = quoted(sys.argv[1:])
    app.run(main)
