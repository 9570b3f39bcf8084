"""The fastest layouts of a point: all that pass the checks and fit the memory, by their estimates."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from nemo_bench.checks.configuration import configuration_problems
from nemo_bench.checks.problems import MEMORY_ERROR
from nemo_bench.config import TrainConfig
from nemo_bench.errors import BenchError, text_of, value_of
from nemo_bench.estimate.step import bound_s, estimate_of
from nemo_bench.memory import GIB, estimate_memory
from nemo_bench.planning.answer import Answer, Calibration

_SIMULATED, _SHOWN = 120, 10  # of the fastest by a bound without a schedule, and of these
_POWERS = (1, 2, 4, 8, 16, 32, 64)
_RECOMPUTATION = ((None, None, None), ("selective", None, None), ("full", "uniform", 1))


def search(cfg: TrainConfig, calibration: Calibration | None = None) -> list[Answer]:
    """Return the fastest layouts of this model on these GPUs, fastest first; BenchError where none fits the memory."""
    most_gib = (cfg.gpu.memory_gib or math.inf) / (1 + MEMORY_ERROR)
    small = (layout for layout in _candidates(cfg) if estimate_memory(layout).total_bytes / GIB <= most_gib)
    fitting = sorted((layout for layout in small if not configuration_problems(layout)), key=bound_s)
    if not fitting:
        machine = f"{cfg.world_size} x {cfg.gpu.name}"
        raise BenchError(f"no layout of {cfg.model.name} works on {machine}: use another number")
    answers = [Answer(candidate, estimate_of(candidate), calibration) for candidate in fitting[:_SIMULATED]]
    fastest: dict[str, Answer] = {}  # of each layout
    for answer in sorted(answers, key=lambda answer: answer.step_time_s):
        fastest.setdefault(answer.layout, answer)
    return list(fastest.values())[:_SHOWN]


def _candidates(cfg: TrainConfig) -> Iterator[TrainConfig]:
    """Give every layout to try; many of them break a rule."""
    m, nvlink_gpus = cfg.model, cfg.cluster.nvlink_gpus or cfg.trainer.devices
    # `end`: embedding and loss count as layers
    for tp, cp, pp, end in itertools.product(_POWERS, _POWERS[:4], range(1, m.num_layers + 3), (False, True)):
        layers = m.num_layers + 2 * end
        if cfg.world_size % (tp * pp * cp) or layers % pp or (end and pp == 1) or tp > nvlink_gpus:
            continue
        chunks = [None, *(number for number in range(2, layers // pp + 1) if layers // pp % number == 0)]
        for vp, mbs, again in itertools.product(chunks if pp > 1 else [None], _POWERS[:3], _RECOMPUTATION):
            if m.global_batch_size % (cfg.world_size // (tp * pp * cp) * mbs):
                continue
            changes: dict[str, Any] = {
                "tensor_model_parallel_size": tp,
                "pipeline_model_parallel_size": pp,
                "virtual_pipeline_model_parallel_size": vp,
                "context_parallel_size": cp,
                "micro_batch_size": mbs,
                "sequence_parallel": tp > 1,
                "account_for_embedding_in_pipeline_split": end,
                "account_for_loss_in_pipeline_split": end,
                "pipeline_model_parallel_layout": None,
                "tp_comm_overlap": cfg.cluster.tp_comm_overlap and tp > 1,
                **dict(zip(("recompute_granularity", "recompute_method", "recompute_num_layers"), again)),
            }
            model = replace(m, **changes)
            for in_fp8 in (True, False) if cfg.precision.fp8 else (cfg.precision.fp8_param_gather,):
                yield replace(cfg, model=model, precision=replace(cfg.precision, fp8_param_gather=in_fp8))


def overrides(cfg: TrainConfig, chosen: TrainConfig) -> list[str]:
    """Return the overrides that lead from one configuration to another."""
    keys = [f"model.{name}" for name in vars(cfg.model) if name != "optim"] + ["precision.fp8_param_gather"]
    changed = [key for key in keys if value_of(cfg, key) != value_of(chosen, key)]
    return [f"{key}={text_of(value_of(chosen, key))}" for key in changed]
