"""SwiGLU's gradient by Transformer Engine's kernel.

Megatron has torch.compile write that kernel, and it reaches less of the memory's speed: 0.87 ms against 0.55 ms for the
70B's 8192 x 57344 on an H200, by themselves (benchmarks/results/gpu_speed/variants.json), once a layer and micro-batch.
Forward they agree.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def install() -> None:
    """Has Megatron's fused SwiGLU, without a bias, take its gradient from Transformer Engine."""
    import transformer_engine_torch
    from megatron.core.fusions import fused_bias_swiglu

    def swiglu_back(grad_output: torch.Tensor, both_halves: torch.Tensor) -> torch.Tensor:
        """The gradient by silu(x1) * x2's input (tokens, 2 f), which holds x1 beside x2; grad_output is (tokens, f)."""
        gradient: torch.Tensor = transformer_engine_torch.dswiglu(grad_output.contiguous(), both_halves, None)
        return gradient

    fused_bias_swiglu.swiglu_back = swiglu_back
