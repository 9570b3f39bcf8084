"""The one place where a point's problems are put together."""

from __future__ import annotations

from nemo_bench.checks.configuration import configuration_problems
from nemo_bench.checks.machine import machine_problems, stage_problems
from nemo_bench.config import TrainConfig
from nemo_bench.entrypoints import entrypoint_of
from nemo_bench.errors import Problem


def problems(cfg: TrainConfig) -> list[Problem]:
    """Return all that is wrong with a point, and what is missing (`Problem.missing`) where it is to be run.

    That is the stage folder for a job of a scheduler, else this machine.
    """
    entrypoint = entrypoint_of(cfg)
    everywhere = configuration_problems(cfg) + entrypoint.problems(cfg)
    if cfg.cluster.scheduler == "slurm":
        return everywhere + stage_problems(cfg)
    return everywhere + machine_problems(cfg) + entrypoint.machine_problems(cfg)
