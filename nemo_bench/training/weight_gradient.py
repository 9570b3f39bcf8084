"""Gradient accumulation fusion without Apex.

Megatron's output layer adds its weight gradient to the gradient of the step so far inside the matrix product, by two
functions of a CUDA extension of Apex's, `fused_weight_gradient_mlp_cuda`. Where it is missing, NeMo leaves the fusion
off in silence. Transformer Engine's matrix product can do the same; all other layers call it for this already.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

APEX_MODULE = "fused_weight_gradient_mlp_cuda"


def install() -> str:
    """Makes the extension importable, before megatron-core and NeMo look for it; returns whose it is.

    Returns:
        "apex", "transformer_engine", or "none" where neither is installed.
    """
    if importlib.util.find_spec(APEX_MODULE) is not None:
        return "apex"
    if importlib.util.find_spec("transformer_engine") is None:
        return "none"
    import torch
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    def accumulate(total_input: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
        """main_grad += grad_output^T @ total_input; shapes (out, in), (tokens, out), (tokens, in)."""
        general_gemm(
            total_input,
            grad_output,
            layout="NT",
            grad=True,
            accumulate=True,
            out=main_grad,
            out_dtype=main_grad.dtype,
            # Of fp8 products alone; here both sides are bf16.
            use_split_accumulator=False,
        )

    module = ModuleType(APEX_MODULE, __doc__)
    module.wgrad_gemm_accum_fp32 = accumulate  # type: ignore[attr-defined]
    module.wgrad_gemm_accum_fp16 = accumulate  # type: ignore[attr-defined]
    # find_spec, which others use to look for it, wants one.
    module.__spec__ = importlib.util.spec_from_loader(APEX_MODULE, loader=None)
    sys.modules[APEX_MODULE] = module
    return "transformer_engine"
