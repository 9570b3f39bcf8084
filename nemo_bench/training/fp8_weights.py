"""Casting fp32 main weights to fp8 parameters, in the layout they have.

After the optimizer's step Megatron has Transformer Engine cast each parameter's shard, seen as a matrix of one row. Its
quantizer is set up to give the transposed copy too, which a product on Hopper needs of the whole parameter. Of the one
row nobody reads it, and a transposing kernel is slow at it: with four layers of the 70B a step took 1.41 s with it and
1.18 s without, each on one GPU of another H200 machine (benchmarks/results/gpu_speed/variants.json). Whole parameters
get their transposed copies in the next forward pass, as before.
"""

from __future__ import annotations

from typing import Any

from megatron.core.optimizer import distrib_optimizer


def install() -> None:
    """Has Megatron's distributed optimizer cast without transposing."""
    distrib_optimizer.quantize_param_shard = _quantize_param_shard


_original = distrib_optimizer.quantize_param_shard


def _quantize_param_shard(model_params: list[Any], *arguments: Any, **options: Any) -> None:
    quantizers = [param._get_quantizer() for param in model_params]
    before = [quantizer.columnwise_usage for quantizer in quantizers]
    # Blockwise scaling has factors of its own for the transposed copy.
    casts_by_rows = [quantizer for quantizer in quantizers if type(quantizer).__name__ != "Float8BlockQuantizer"]
    for quantizer in casts_by_rows:
        quantizer.set_usage(columnwise=False)
    try:
        _original(model_params, *arguments, **options)
    finally:
        for quantizer, columnwise in zip(quantizers, before):
            quantizer.set_usage(columnwise=columnwise)
