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
    """Return overrides that save at least a twentieth each and need less than `than_gib`, with the need of each."""
    most_gib = min(than_gib, 0.95 * estimate_memory(cfg).total_bytes / GIB)
    smaller = []
    for alternatives in _changes(cfg):
        for change in alternatives:
            changed = copy.deepcopy(cfg)
            for key, value in change.items():
                section, _, name = key.rpartition(".")
                setattr(value_of(changed, section), name, value)
            if not configuration_problems(changed) and (gib := estimate_memory(changed).total_bytes / GIB) < most_gib:
                overrides = [f"{key}={text_of(value)}" for key, value in change.items() if value_of(cfg, key) != value]
                smaller.append(f"{' '.join(overrides)} ({gib:.0f} GiB)")
                break
    return "; ".join(smaller) or "no single change"


def _changes(cfg: TrainConfig) -> Iterator[tuple[dict[str, Any], ...]]:
    """Give the changes to try, each as alternatives: a parallel size on the same GPUs, else on twice as many."""
    m, t = cfg.model, cfg.trainer
    one_node = t.num_nodes == 1 and t.devices < 8
    more = {"trainer.devices": t.devices * 2} if one_node else {"trainer.num_nodes": t.num_nodes * 2}
    tensor = {"model.tensor_model_parallel_size": m.tensor_model_parallel_size * 2, "model.sequence_parallel": True}
    pipeline = {"model.pipeline_model_parallel_size": m.pipeline_model_parallel_size * 2}
    context = {"model.context_parallel_size": m.context_parallel_size * 2}
    yield from ((change, {**more, **change}) for change in (tensor, pipeline, context))
    recompute = "model.recompute_{}".format
    yield ({recompute("granularity"): "full", recompute("method"): "uniform", recompute("num_layers"): 1},)
    narrow = {"model.optim.exp_avg_dtype": "bf16", "model.optim.exp_avg_sq_dtype": "bf16"}
    yield (narrow,)
    yield ({**narrow, "model.optim.store_param_remainders": True},)
    yield ({"model.micro_batch_size": m.micro_batch_size // 2},)
    yield ({"model.num_layers": m.num_layers // 2},)
