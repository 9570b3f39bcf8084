"""Changes of a configuration that need less GPU memory, for the messages that say a point does not fit."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

from nemo_bench.checks.configuration import configuration_problems
from nemo_bench.config import TrainConfig
from nemo_bench.errors import text_of, value_of
from nemo_bench.memory import GIB, estimate_memory


def smaller_configurations(cfg: TrainConfig, than_gib: float = math.inf) -> str:
    """Return single changes of `cfg` that need less than `than_gib`, as overrides, with the estimate of each."""
    now = estimate_memory(cfg).total_bytes
    sizes = [(overrides, total / GIB) for overrides, total in _smaller(cfg, now)]
    return "; ".join(f"{overrides} ({gib:.0f} GiB)" for overrides, gib in sizes if gib < than_gib) or "no single change"


def _smaller(cfg: TrainConfig, now: float) -> Iterator[tuple[str, float]]:
    """Give overrides that break no rule and save at least a twentieth of `now`, with the bytes that are then needed.

    Where a parallel size asks for more GPUs than there are, it comes with twice as many.
    """
    for alternatives in _changes(cfg):
        for change in alternatives:
            changed = copy.deepcopy(cfg)
            for key, value in change.items():
                section, _, name = key.rpartition(".")
                setattr(value_of(changed, section), name, value)
            if not configuration_problems(changed) and (total := estimate_memory(changed).total_bytes) < 0.95 * now:
                differing = {key: value for key, value in change.items() if value_of(cfg, key) != value}
                yield " ".join(f"{key}={text_of(value)}" for key, value in differing.items()), total
                break


def _changes(cfg: TrainConfig) -> Iterator[tuple[dict[str, Any], ...]]:
    """Give the changes to try; of several alternatives the first that works is meant."""
    m, t = cfg.model, cfg.trainer
    one_node = t.num_nodes == 1 and t.devices < 8
    more = {"trainer.devices": t.devices * 2} if one_node else {"trainer.num_nodes": t.num_nodes * 2}
    for size in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"):
        change: dict[str, Any] = {f"model.{size}": getattr(m, size) * 2}
        if size.startswith("tensor"):
            change["model.sequence_parallel"] = True
        yield change, {**more, **change}
    recompute = {"granularity": "full", "method": "uniform", "num_layers": 1}
    yield ({f"model.recompute_{name}": value for name, value in recompute.items()},)
    narrow = {"model.optim.exp_avg_dtype": "bf16", "model.optim.exp_avg_sq_dtype": "bf16"}
    yield (narrow,)
    yield ({**narrow, "model.optim.store_param_remainders": True},)
    yield ({"model.micro_batch_size": m.micro_batch_size // 2},)
    yield ({"model.num_layers": m.num_layers // 2},)
