"""Megatron's transformer layer without Transformer Engine: what a CPU can compute."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from nemo_bench.training.known import known


class RMSNorm(torch.nn.RMSNorm):
    """Take Megatron's constructor, and mark the weight: its gradients are added up over the tensor-parallel ranks."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def local_block_spec(config: Any, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Return the layers of one pipeline chunk (`vp_stage` of this rank), for `transformer_layer_spec`."""
    return block_of(get_gpt_layer_local_spec(), known(get_num_layers_to_build, config, vp_stage=vp_stage))


def block_of(layer: ModuleSpec, count: int) -> TransformerBlockSubmodules:
    """Return a block of `count` such layers with `RMSNorm` for all norms."""
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=RMSNorm)
