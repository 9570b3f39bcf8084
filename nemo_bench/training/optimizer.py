"""Megatron's Adam, distributed or not, with the recipe's cosine schedule."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.lightning.pytorch.optim import CosineAnnealingScheduler

from nemo_bench.config import TrainConfig

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


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
