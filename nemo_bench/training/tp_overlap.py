"""Tensor-parallel communication under the matrix products: NeMo's callback and its tables of user buffers."""

from __future__ import annotations

from typing import Any

import torch
from nemo.collections.llm.recipes.tp_overlap_configs import userbuffers
from nemo.lightning.pytorch.callbacks.megatron_comm_overlap import MegatronCommOverlapCallback

from nemo_bench.config import TrainConfig
from nemo_bench.errors import BenchError
from nemo_bench.training.settings import gradient_communication, pipeline_communication

# NVIDIA's tables name the GPU they were made for; others of its architecture use the same.
_TABLES_OF_CAPABILITY = {9: "h100", 10: "b200"}


def build_tp_comm_overlap(cfg: TrainConfig) -> MegatronCommOverlapCallback:
    """Return NeMo's callback, which alone allocates the user buffers.

    It derives all other overlaps from the parallel sizes, unless it is given them: so it is, as `cfg` says.
    """
    table = user_buffers(cfg, userbuffers)
    overlaps = pipeline_communication(cfg) | gradient_communication(cfg)
    return MegatronCommOverlapCallback(
        tp_comm_overlap=True,
        tp_comm_overlap_cfg=table,
        tp_comm_bootstrap_backend="nccl",  # NVIDIA's; groups of gloo are slow to set up on thousands of ranks
        overlap_param_gather_with_optimizer_step=cfg.gathers_with_optimizer_step,
        **overlaps,
    )


def user_buffers(cfg: TrainConfig, tables: Any) -> Any:
    """Return what `model.tp_comm_overlap_cfg` names in the module `tables`; None: Transformer Engine's own choice."""
    m, name = cfg.model, cfg.model.tp_comm_overlap_cfg
    names = [name for name in dir(tables) if name.startswith("userbuffers_")]
    if name == "auto":
        gpu = _TABLES_OF_CAPABILITY.get(torch.cuda.get_device_capability()[0])
        number_format = "fp8" if cfg.precision.fp8 else "bf16"
        start = f"userbuffers_{number_format}_{gpu}_h{m.hidden_size}_tp{m.tensor_model_parallel_size}"
        end = f"_mbs{m.micro_batch_size}_seqlen{m.seq_length}"
        fitting = (f"{start}_cp{m.context_parallel_size}{end}", f"{start}{end}")
        name = next((fit for fit in fitting if fit in names), None)
    elif name is not None and name not in names:
        raise BenchError(f"model.tp_comm_overlap_cfg={name}: NVIDIA has no such table\nvalid: auto, {', '.join(names)}")
    return None if name is None else getattr(tables, name)
