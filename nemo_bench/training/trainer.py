"""NeMo's Trainer with MegatronStrategy: parallel layout, precision, gradient reduction, optimizer, callbacks."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.lightning.pytorch.optim import CosineAnnealingScheduler

from nemo_bench.config import TrainConfig

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class _Strategy(nl.MegatronStrategy):
    """End without Lightning's last act, which copies weights and optimizer state to the host's memory.

    That took 36 s for four layers of the 70B on one GPU, the message of a rank that had failed waited for it, and eight
    ranks of a node may not fit. The process ends next.
    """

    def teardown(self) -> None:
        self.checkpoint_io.teardown()


def build_strategy(cfg: TrainConfig) -> nl.MegatronStrategy:
    """Return the parallel layout of `cfg` and Megatron's data-parallel wrapper."""
    m, o = cfg.model, cfg.model.optim
    on_gpu = cfg.gpu.device == "cuda"
    return _Strategy(
        tensor_model_parallel_size=m.tensor_model_parallel_size,
        pipeline_model_parallel_size=m.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=m.virtual_pipeline_model_parallel_size,
        context_parallel_size=m.context_parallel_size,
        sequence_parallel=m.sequence_parallel and m.tensor_model_parallel_size > 1,
        ddp=DistributedDataParallelConfig(
            use_distributed_optimizer=o.use_distributed_optimizer,
            grad_reduce_in_fp32=o.grad_reduce_in_fp32,
            average_in_collective=on_gpu,  # gloo has no averaging reduction
            check_for_nan_in_grad=False,  # it would synchronise the device at every step
            **gradient_communication(cfg),
        ),
        gradient_as_bucket_view=True,
        use_te_rng_tracker=m.cuda_graph_impl != "none",
        ckpt_async_save=False,
        # A checkpoint that another layout can continue. With Megatron's other format its own loading of the
        # precision-aware optimizer fails ('bool' object has no attribute 'dtype', megatron-core 0.15.3).
        ckpt_optim_fully_reshardable=True,
        process_group_backend="nccl" if on_gpu else "gloo",
    )


def gradient_communication(cfg: TrainConfig) -> dict[str, Any]:
    """Return how data-parallel ranks reduce gradients and gather parameters, by Megatron's names."""
    o = cfg.model.optim
    interleaved = (cfg.model.virtual_pipeline_model_parallel_size or 1) > 1
    return {
        "overlap_grad_reduce": o.overlap_grad_reduce,
        "overlap_param_gather": o.overlap_param_gather,
        # With interleaved stages all stages gather at the same time, as NeMo's comm overlap callback has it.
        "align_param_gather": o.overlap_param_gather and interleaved,
        "bucket_size": o.bucket_size,
    }


def build_precision(cfg: TrainConfig) -> nl.MegatronMixedPrecision:
    """Return the number formats of parameters, activations, gradients and fp8 matrix products."""
    p = cfg.precision
    half = p.trainer_precision == "bf16-mixed"
    fp8: dict[str, Any] = {}
    if p.fp8:
        fp8 = {
            "fp8": p.fp8,
            "fp8_recipe": p.fp8_recipe,
            "fp8_margin": p.fp8_margin,
            "fp8_amax_history_len": p.fp8_amax_history_len,
            "fp8_amax_compute_algo": p.fp8_amax_compute_algo,
            "fp8_param_gather": p.fp8_param_gather,
            "fp8_dot_product_attention": p.fp8_dot_product_attention,
            "first_last_layers_bf16": p.first_last_layers_bf16,
            "num_layers_at_start_in_bf16": p.num_layers_at_start_in_bf16,
            "num_layers_at_end_in_bf16": p.num_layers_at_end_in_bf16,
        }
    return nl.MegatronMixedPrecision(
        precision=p.trainer_precision,  # type: ignore[arg-type]  # a Literal in NeMo
        params_dtype=torch.bfloat16 if half else torch.float32,
        pipeline_dtype=torch.bfloat16 if half else torch.float32,
        autocast_enabled=False,
        grad_reduce_in_fp32=cfg.model.optim.grad_reduce_in_fp32,
        **fp8,
    )


def build_optimizer(cfg: TrainConfig) -> nl.MegatronOptimizerModule:
    """Return Adam over fp32 main weights; NeMo copies the number formats from the precision plugin."""
    o = cfg.model.optim
    formats: dict[str, Any] = {}
    if cfg.precision_aware_optimizer:
        reduced_in_bf16 = cfg.precision.trainer_precision == "bf16-mixed" and not o.grad_reduce_in_fp32
        formats = {
            "main_grads_dtype": torch.bfloat16 if reduced_in_bf16 else torch.float32,
            "exp_avg_dtype": _DTYPES[o.exp_avg_dtype],
            "exp_avg_sq_dtype": _DTYPES[o.exp_avg_sq_dtype],
            "store_param_remainders": o.store_param_remainders,
        }
    return nl.MegatronOptimizerModule(
        config=OptimizerConfig(
            optimizer="adam",
            lr=o.lr,
            min_lr=o.min_lr,
            weight_decay=o.weight_decay,
            adam_beta1=o.adam_beta1,
            adam_beta2=o.adam_beta2,
            adam_eps=o.adam_eps,
            clip_grad=o.clip_grad,
            bf16=cfg.precision.trainer_precision == "bf16-mixed",
            fp8_recipe=cfg.precision.fp8_recipe if cfg.precision.fp8 else None,
            use_distributed_optimizer=o.use_distributed_optimizer,
            use_precision_aware_optimizer=cfg.precision_aware_optimizer,
            **formats,
            overlap_param_gather=o.overlap_param_gather,  # must agree with the data-parallel wrapper's
        ),
        lr_scheduler=CosineAnnealingScheduler(
            max_steps=cfg.trainer.max_steps,
            warmup_steps=o.warmup_steps,
            constant_steps=0,
            min_lr=o.min_lr,
        ),
    )


def build_trainer(cfg: TrainConfig, callbacks: list[Any], strategy: nl.MegatronStrategy) -> nl.Trainer:
    """Return the trainer: `max_steps` steps, one validation after the last, no logger but the run record."""
    t = cfg.trainer
    return nl.Trainer(
        accelerator="gpu" if cfg.gpu.device == "cuda" else "cpu",
        devices=t.devices,
        num_nodes=t.num_nodes,
        max_steps=t.max_steps,
        max_epochs=1,
        val_check_interval=t.max_steps,
        limit_val_batches=t.limit_val_batches,
        limit_test_batches=0,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=cfg.checkpoint.every_n_steps is not None,
        accumulate_grad_batches=1,
        use_distributed_sampler=False,
        # Named outright: the ranks are started by nemo_bench, whatever else the environment looks like. Lightning's
        # own requeue would call scontrol, which a container does not have.
        plugins=[
            build_precision(cfg),
            SLURMEnvironment(auto_requeue=False) if cfg.cluster.scheduler == "slurm" else LightningEnvironment(),
        ],
        strategy=strategy,
        callbacks=callbacks,
    )
