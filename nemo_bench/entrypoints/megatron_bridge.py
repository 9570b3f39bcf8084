"""`entrypoint=bridge_...`: this project's own program on Megatron-Bridge, nemo_bench/training/megatron_bridge.py."""

from __future__ import annotations

from nemo_bench.config import TrainConfig
from nemo_bench.entrypoints.nemo2 import Nemo2
from nemo_bench.errors import Need, Problem


class MegatronBridge(Nemo2):
    """The program of `Nemo2`, which imports Bridge in the place of NeMo 2."""

    def problems(self, cfg: TrainConfig) -> list[Problem]:
        need, rule = Need(cfg), f"entrypoint={cfg.entrypoint.name} writes and reads no checkpoints"
        for name, value in vars(cfg.checkpoint).items():
            need(value is None, f"checkpoint.{name}", rule, "use null, or entrypoint=nemo2")
        return super().problems(cfg) + need.problems


ENTRYPOINT = MegatronBridge()
