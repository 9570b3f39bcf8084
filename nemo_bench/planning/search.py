"""The fastest layouts of a point: all that pass the checks and fit the memory, by their estimates."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from nemo_bench.checks.configuration import configuration_problems
from nemo_bench.checks.problems import MEMORY_ERROR
from nemo_bench.config import TrainConfig
from nemo_bench.errors import BenchError, text_of, value_of
from nemo_bench.estimate.step import bound_s
from nemo_bench.memory import GIB, estimate_memory
from nemo_bench.planning.answer import Answer, Calibration, answer_of

SHOWN = 10
# So many of the fastest by a bound without a schedule are simulated.
_SIMULATED = 120
_RECOMPUTATION: tuple[dict[str, Any], ...] = (
    {"recompute_granularity": None, "recompute_method": None, "recompute_num_layers": None},
    {"recompute_granularity": "selective", "recompute_method": None, "recompute_num_layers": None},
    {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
)


@dataclass(frozen=True)
class Found:
    """A layout, and the overrides that choose it."""

    answer: Answer
    overrides: list[str]


def search(cfg: TrainConfig, calibration: Calibration | None = None) -> list[Found]:
    """Return the fastest layouts of this point: same model, GPUs, batch and number format.

    Raises:
        BenchError: none fits the GPU's memory.
    """
    fitting = [candidate for candidate in candidates(cfg) if _works(candidate)]
    if not fitting:
        raise BenchError(f"no layout of {cfg.model.name} fits {cfg.world_size} x {cfg.gpu.name}: use more GPUs")
    fitting.sort(key=bound_s)
    answers = [(answer_of(candidate, calibration), candidate) for candidate in fitting[:_SIMULATED]]
    answers.sort(key=lambda pair: pair[0].step_time_s)
    fastest: dict[str, Found] = {}  # of each layout
    for answer, candidate in answers:
        fastest.setdefault(answer.layout, Found(answer, overrides(cfg, candidate)))
    return list(fastest.values())[:SHOWN]


def candidates(cfg: TrainConfig) -> Iterator[TrainConfig]:
    """Give every layout to try; most of them break a rule."""
    m, gpus = cfg.model, cfg.world_size
    joined = cfg.cluster.nvlink_gpus or cfg.trainer.devices
    heads = m.num_query_groups
    splits = (0, 2) if hasattr(m, "account_for_loss_in_pipeline_split") else (0,)
    for tp, pp, cp in itertools.product(_powers(min(joined, heads)), range(1, m.num_layers + 3), _powers(8)):
        if gpus % (tp * pp * cp):
            continue
        for extra, mbs in itertools.product(splits if pp > 1 else (0,), (1, 2, 4)):
            layers = m.num_layers + extra
            if layers % pp or m.global_batch_size % (gpus // (tp * pp * cp) * mbs):
                continue
            for vp in _virtual(layers // pp) if pp > 1 else (None,):
                for again, fp8_params in itertools.product(_RECOMPUTATION, _fp8_params(cfg)):
                    changes = {
                        "tensor_model_parallel_size": tp,
                        "pipeline_model_parallel_size": pp,
                        "virtual_pipeline_model_parallel_size": vp,
                        "context_parallel_size": cp,
                        "micro_batch_size": mbs,
                        "sequence_parallel": tp > 1,
                        "tp_comm_overlap": cfg.cluster.tp_comm_overlap and tp > 1,
                        **again,
                    }
                    if len(splits) > 1:
                        changes["account_for_embedding_in_pipeline_split"] = bool(extra)
                        changes["account_for_loss_in_pipeline_split"] = bool(extra)
                    precision = replace(cfg.precision, fp8_param_gather=fp8_params)
                    yield replace(cfg, model=replace(m, **changes), precision=precision)


def _powers(most: int) -> list[int]:
    return [2**power for power in range(most.bit_length()) if 2**power <= most]


def _virtual(layers: int) -> list[int | None]:
    return [None, *(chunks for chunks in range(2, layers + 1) if layers % chunks == 0)]


def _fp8_params(cfg: TrainConfig) -> tuple[bool, ...]:
    return (True, False) if cfg.precision.fp8 else (cfg.precision.fp8_param_gather,)


def _works(cfg: TrainConfig) -> bool:
    fits = estimate_memory(cfg).total_bytes / GIB * (1 + MEMORY_ERROR) <= (cfg.gpu.memory_gib or math.inf)
    return fits and not configuration_problems(cfg)


def overrides(cfg: TrainConfig, chosen: TrainConfig) -> list[str]:
    """Return the overrides that lead from one configuration to another."""
    keys = [f"model.{name}" for name in vars(cfg.model) if name != "optim"] + ["precision.fp8_param_gather"]
    changed = [key for key in keys if value_of(cfg, key) != value_of(chosen, key)]
    return [f"{key}={text_of(value_of(chosen, key))}" for key in changed]
