"""Tensor-parallel communication under the matrix products: NeMo's callback and its tables of user buffers."""

from __future__ import annotations

from typing import Any

import torch
from nemo.collections.llm.recipes.tp_overlap_configs import userbuffers
from nemo.lightning.pytorch.callbacks.megatron_comm_overlap import MegatronCommOverlapCallback

from nemo_bench.config import TrainConfig
from nemo_bench.errors import BenchError
from nemo_bench.training.model import pipeline_communication
from nemo_bench.training.trainer import gradient_communication

# NeMo's tables name the GPU they were made for; others of its architecture use the same.
_TABLES_OF_CAPABILITY = {9: "h100", 10: "b200"}


def build_tp_comm_overlap(cfg: TrainConfig) -> MegatronCommOverlapCallback:
    """Return NeMo's callback, which alone allocates the user buffers.

    It derives all other overlaps from the parallel sizes, unless it is given them: it is, so that they are what the
    configuration says.
    """
    return MegatronCommOverlapCallback(
        tp_comm_overlap=True,
        tp_comm_overlap_cfg=_table(cfg),
        **pipeline_communication(cfg),
        **gradient_communication(cfg),
    )


def _table(cfg: TrainConfig) -> Any:
    """Return the table that `model.tp_comm_overlap_cfg` names; None: Transformer Engine's own choice."""
    tables = [name for name in dir(userbuffers) if name.startswith("userbuffers_")]
    name = cfg.model.tp_comm_overlap_cfg
    if name == "auto":
        m = cfg.model
        gpu = _TABLES_OF_CAPABILITY.get(torch.cuda.get_device_capability()[0])
        start = f"userbuffers_{cfg.precision.name}_{gpu}_h{m.hidden_size}_tp{m.tensor_model_parallel_size}"
        end = f"_mbs{m.micro_batch_size}_seqlen{m.seq_length}"
        fitting = [f"{start}_cp{m.context_parallel_size}{end}", f"{start}{end}"]
        name = next((fit for fit in fitting if fit in tables), None)
    elif name is not None and name not in tables:
        raise BenchError(f"model.tp_comm_overlap_cfg={name}: NeMo has no such table\nvalid: auto, {', '.join(tables)}")
    return None if name is None else getattr(userbuffers, name)
