"""The settings of a configuration by Megatron's names: what every stack builds its objects from."""

from __future__ import annotations

import hashlib
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.enums import AttnBackend

from nemo_bench.config import TrainConfig
from nemo_bench.errors import BenchError

# Fields of our `model` that Megatron's model does not have; it has all others, by the same names.
_NOT_OF_THE_MODEL = (
    *("name", "optim", "micro_batch_size", "global_batch_size", "tp_comm_overlap", "tp_comm_overlap_cfg"),
    "cuda_graph_scope",
)
_FSDP = (
    *("use_megatron_fsdp", "data_parallel_sharding_strategy", "fsdp_double_buffer"),
    "suggested_communication_unit_size",
)
# NVIDIA's tables of user buffers name the GPU they were made for; others of its architecture use the same.
_TABLES_OF_CAPABILITY = {9: "h100", 10: "b200"}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def model_settings(cfg: TrainConfig) -> dict[str, Any]:
    """Return the architecture, layout, fusions and pipeline communication, for a `TransformerConfig`."""
    m = cfg.model
    settings = {field.name: getattr(m, field.name) for field in fields(m) if field.name not in _NOT_OF_THE_MODEL}
    settings |= {
        # Fixed, so that the weights do not depend on which tokenizer happens to be loaded.
        "vocab_size": cfg.padded_vocab_size,
        "sequence_parallel": m.sequence_parallel and m.tensor_model_parallel_size > 1,
        "pipeline_dtype": working_dtype(cfg),
        "attention_backend": AttnBackend[m.attention_backend],
        "recompute_modules": list(m.recompute_modules) if m.recompute_granularity == "selective" else None,
        "use_te_rng_tracker": m.cuda_graph_impl != "none",  # a graph cannot record the other one's CPU side
        **pipeline_communication(cfg),
    }
    if m.cuda_graph_scope != "full":
        settings["cuda_graph_scope"] = m.cuda_graph_scope
    if m.cpu_offloading_num_layers:
        settings |= {"cpu_offloading": True, "cpu_offloading_weights": False}
    if cfg.gpu.device == "cpu":
        from nemo_bench.training.layers import local_block_spec

        settings |= {
            "transformer_layer_spec": local_block_spec,
            "use_cpu_initialization": True,
            # gloo reads what it sends at some later moment: interleaved stages would train on what then lies there.
            "deallocate_pipeline_outputs": False,
        }
    return settings


def working_dtype(cfg: TrainConfig) -> torch.dtype:
    """Return the number format of parameters and activations, fp8 matrix products aside."""
    return torch.bfloat16 if cfg.precision.trainer_precision == "bf16-mixed" else torch.float32


def pipeline_communication(cfg: TrainConfig) -> dict[str, Any]:
    """Return how pipeline stages pass activations on, and what they do in the bubble."""
    m = cfg.model
    interleaved = (m.virtual_pipeline_model_parallel_size or 1) > 1
    return {
        # As NeMo's MegatronCommOverlapCallback has it. With the other pair, interleaved stages give wrong losses in
        # silence on CPU (gloo); so they are no settings of ours.
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": m.pipeline_model_parallel_size > 1 and not interleaved,
        "defer_embedding_wgrad_compute": cfg.defers_embedding_wgrad,
        "wgrad_deferral_limit": m.wgrad_deferral_limit,
    }


def gradient_communication(cfg: TrainConfig) -> dict[str, Any]:
    """Return how data-parallel ranks reduce gradients and gather parameters."""
    o = cfg.model.optim
    interleaved = (cfg.model.virtual_pipeline_model_parallel_size or 1) > 1
    return {
        "overlap_grad_reduce": o.overlap_grad_reduce,
        "overlap_param_gather": o.overlap_param_gather,
        # With interleaved stages all stages gather at the same time, as NeMo's comm overlap callback has it.
        "align_param_gather": o.overlap_param_gather and interleaved,
        "bucket_size": o.bucket_size,
    }


def ddp_settings(cfg: TrainConfig) -> dict[str, Any]:
    """Return the settings of a `DistributedDataParallelConfig`."""
    o = cfg.model.optim
    return {
        "use_distributed_optimizer": o.use_distributed_optimizer,
        "grad_reduce_in_fp32": o.grad_reduce_in_fp32,
        # Neither gloo nor Megatron-FSDP as NVIDIA runs it averages in the reduction.
        "average_in_collective": cfg.gpu.device == "cuda" and not o.use_megatron_fsdp,
        "check_for_nan_in_grad": False,  # it would synchronise the device at every step
        **gradient_communication(cfg),
        **({name: getattr(o, name) for name in _FSDP} if o.use_megatron_fsdp else {}),
    }


def precision_settings(cfg: TrainConfig) -> dict[str, Any]:
    """Return the number formats of parameters, activations, gradients, and fp8 and NVFP4 matrix products."""
    p, dtype = cfg.precision, working_dtype(cfg)
    formats: dict[str, Any] = {"params_dtype": dtype, "pipeline_dtype": dtype, "autocast_enabled": False}
    formats["grad_reduce_in_fp32"] = cfg.model.optim.grad_reduce_in_fp32
    if p.fp8 or p.fp4:
        others: tuple[str, ...] = ("name", "trainer_precision")
        if not p.first_last_layers_bf16:
            others += ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")
        formats |= {name: value for name, value in vars(p).items() if name not in others}
        # MXFP8 parameters are gathered in bf16 and cast: the gradients' memory serves for it.
        formats["reuse_grad_buf_for_mxfp8_param_ag"] = p.fp8_recipe == "mxfp8" and p.fp8_param_gather
    return formats


def optimizer_settings(cfg: TrainConfig) -> dict[str, Any]:
    """Return the settings of an `OptimizerConfig`: Adam over fp32 main weights."""
    o = cfg.model.optim
    names = ("lr", "min_lr", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "clip_grad")
    settings: dict[str, Any] = {
        **{name: getattr(o, name) for name in names},
        "optimizer": "adam",
        "bf16": working_dtype(cfg) is torch.bfloat16,
        "fp8_recipe": cfg.precision.fp8_recipe if cfg.precision.fp8 else None,
        "use_distributed_optimizer": o.use_distributed_optimizer,
        "use_precision_aware_optimizer": cfg.precision_aware_optimizer,
        "overlap_param_gather": o.overlap_param_gather,  # must agree with the data-parallel wrapper's
        "overlap_param_gather_with_optimizer_step": cfg.gathers_with_optimizer_step,
    }
    if cfg.precision_aware_optimizer:
        settings |= {
            "main_grads_dtype": torch.float32 if o.grad_reduce_in_fp32 else working_dtype(cfg),
            "exp_avg_dtype": _DTYPES[o.exp_avg_dtype],
            "exp_avg_sq_dtype": _DTYPES[o.exp_avg_sq_dtype],
            "store_param_remainders": o.store_param_remainders,
        }
    return settings


def tp_overlap_settings(cfg: TrainConfig, tables: Any) -> dict[str, Any]:
    """Return how communication is hidden, tensor-parallel ranks' included, with NVIDIA's tables of user buffers."""
    return {
        "tp_comm_overlap": True,
        "tp_comm_overlap_cfg": _user_buffers(cfg, tables),
        "tp_comm_bootstrap_backend": "nccl",  # NVIDIA's; groups of gloo are slow to set up on thousands of ranks
        "overlap_param_gather_with_optimizer_step": cfg.gathers_with_optimizer_step,
        **pipeline_communication(cfg),
        **gradient_communication(cfg),
    }


def _user_buffers(cfg: TrainConfig, tables: Any) -> Any:
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


def sample_order_folder(cfg: TrainConfig) -> str:
    """Return the folder of Megatron's sample order, named after the files that it is made for.

    Megatron finds a saved order by path, seed and length alone: that of a dataset since prepared anew, too.
    """
    data = cfg.data
    assert data.folder is not None
    stats = [Path(f"{prefix}{suffix}").stat() for prefix in data.paths for suffix in (".bin", ".idx")]
    content = [(stat.st_size, stat.st_mtime_ns) for stat in stats]
    key = hashlib.sha256(repr((data.paths, content)).encode()).hexdigest()[:16]
    return str(Path(data.folder) / "index_mapping" / key)
