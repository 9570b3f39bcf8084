"""`entrypoint=nemo2`: this project's own program on the NeMo 2 API, nemo_bench/training."""

from __future__ import annotations

from pathlib import Path

from nemo_bench.config import TrainConfig
from nemo_bench.entrypoints import Entrypoint
from nemo_bench.errors import Need, Problem


class Nemo2(Entrypoint):
    """`python -m nemo_bench.training.rank RUN_FOLDER`."""

    def problems(self, cfg: TrainConfig) -> list[Problem]:
        need = Need(cfg)
        rule = "are NeMo 1's (entrypoint=nemo2)"
        need(not cfg.entrypoint.settings, "entrypoint.settings", rule, "leave them out, or entrypoint=nemo_24_09")
        return need.problems

    def rank_command(self, cfg: TrainConfig, run_dir: Path, python: str) -> list[str]:
        return [python, "-u", "-m", "nemo_bench.training.rank", str(run_dir)]


ENTRYPOINT = Nemo2()
