"""The one place where a point's problems are put together."""

from __future__ import annotations

import math

from nemo_bench.checks.configuration import configuration_problems
from nemo_bench.checks.machine import machine_problems
from nemo_bench.checks.smaller import smaller_configurations
from nemo_bench.config import TrainConfig
from nemo_bench.entrypoints import entrypoint_of
from nemo_bench.errors import Problem
from nemo_bench.memory import GIB, estimate_memory

# Against the peaks of measured runs (tests/unit/test_memory.py).
MEMORY_ERROR = 0.05


def problems(cfg: TrainConfig) -> list[Problem]:
    """Return all that is wrong with a point, and what is missing (`Problem.missing`) where it is to be run."""
    entrypoint = entrypoint_of(cfg)
    everywhere = configuration_problems(cfg) + entrypoint.problems(cfg) or _memory_problems(cfg)
    here = entrypoint.machine_problems(cfg) if cfg.cluster.scheduler == "none" else []
    return everywhere + machine_problems(cfg) + here


def _memory_problems(cfg: TrainConfig) -> list[Problem]:
    gpu_gib = math.inf if cfg.gpu.memory_gib is None or cfg.gpu.device == "cpu" else cfg.gpu.memory_gib
    needed_gib = estimate_memory(cfg).total_bytes / GIB
    estimated = cfg.check_memory and entrypoint_of(cfg).memory_is_estimated
    if not estimated or needed_gib <= gpu_gib * (1 + MEMORY_ERROR):
        return []
    rule = f"is not enough: the point needs about {needed_gib:.0f} GiB a GPU, estimated to {MEMORY_ERROR:.0%}"
    fix = f"what fits: {smaller_configurations(cfg, gpu_gib)}; check_memory=false runs it all the same"
    return [Problem("gpu.memory_gib", f"{gpu_gib:g}", rule, fix)]
