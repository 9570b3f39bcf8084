"""`entrypoint=nemo2`: this project's own program on the NeMo 2 API, nemo_bench/training."""

from __future__ import annotations

from pathlib import Path

from nemo_bench.config import TrainConfig
from nemo_bench.entrypoints import Entrypoint


class Nemo2(Entrypoint):
    """`python -m nemo_bench.training.rank RUN_FOLDER`."""

    def rank_command(self, cfg: TrainConfig, run_dir: Path, python: str) -> list[str]:
        return [python, "-u", "-m", "nemo_bench.training.rank", str(run_dir)]


ENTRYPOINT = Nemo2()
