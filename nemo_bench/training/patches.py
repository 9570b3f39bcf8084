"""Changes to libraries that a configuration needs: each to what one function of Megatron or Transformer Engine does."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from nemo_bench.config import TrainConfig
from nemo_bench.training import cpu_device

APEX_MODULE = "fused_weight_gradient_mlp_cuda"


def install(cfg: TrainConfig) -> None:
    """Install what `cfg` needs, before the program that trains is imported."""
    o = cfg.model.optim
    if cfg.gpu.device == "cpu":
        cpu_device.install()
    else:
        from nemo_bench.training import gpu_kernels

        if cfg.model.gradient_accumulation_fusion:
            te_weight_gradient_accumulation()
            gpu_kernels.embedding_gradient_in_place()
        if cfg.model.bias_activation_fusion:
            te_swiglu_backward()
        gpu_kernels.adam_with_clipping()
    if cfg.precision.fp8_param_gather and cfg.precision.fp8_recipe != "mxfp8":
        fp8_cast_without_transpose()
    if cfg.precision_aware_optimizer and {o.exp_avg_dtype, o.exp_avg_sq_dtype} != {"fp32"}:
        adam_one_parameter_at_a_time()


def te_weight_gradient_accumulation() -> None:
    """Have Transformer Engine add the output layer's weight gradient to the step's, where Apex is not installed.

    Megatron calls two functions of Apex for it; without them NeMo leaves gradient accumulation fusion off in silence.
    """
    if importlib.util.find_spec(APEX_MODULE) or not importlib.util.find_spec("transformer_engine"):
        return
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    workspace: dict[str, Any] = {}
    if "workspace" in inspect.signature(general_gemm).parameters:  # Transformer Engine 2.2 to 2.9
        from transformer_engine.pytorch.module.base import get_workspace

        workspace = {"workspace": get_workspace()}

    def accumulate(total_input: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
        """main_grad += grad_output^T @ total_input; shapes (out, in), (tokens, out), (tokens, in)."""
        how = {"layout": "NT", "grad": True, "accumulate": True, "use_split_accumulator": False, **workspace}
        general_gemm(total_input, grad_output, out=main_grad, out_dtype=main_grad.dtype, **how)

    module = ModuleType(APEX_MODULE)
    module.wgrad_gemm_accum_fp32 = module.wgrad_gemm_accum_fp16 = accumulate  # type: ignore[attr-defined]
    # find_spec, by which others look for it, wants one.
    module.__spec__ = importlib.util.spec_from_loader(APEX_MODULE, loader=None)
    sys.modules[APEX_MODULE] = module


def te_swiglu_backward() -> None:
    """Have Megatron's fused SwiGLU, without a bias, take its gradient from Transformer Engine.

    Megatron's takes 0.87 ms against 0.55 ms for the 70B's 8192 x 57344 on an H200, once a layer and micro-batch
    (benchmarks/results/gpu_speed/variants.json).
    """
    import transformer_engine_torch
    from megatron.core.fusions import fused_bias_swiglu

    def swiglu_back(grad_output: torch.Tensor, both_halves: torch.Tensor) -> Any:
        """Return the gradient of silu(x1) * x2 by its input (tokens, 2 f), x1 then x2; grad_output is (tokens, f)."""
        return transformer_engine_torch.dswiglu(grad_output.contiguous(), both_halves, None)

    fused_bias_swiglu.swiglu_back = swiglu_back


def fp8_cast_without_transpose() -> None:
    """Have Megatron's distributed optimizer cast fp32 main weights to fp8 parameters only in the layout they have.

    Not with a transposed copy that nobody reads: four layers of the 70B took 1.41 s a step with it and 1.18 s without,
    on one H200 each (benchmarks/results/gpu_speed/variants.json). The next forward pass copies whole parameters.
    """
    from megatron.core.optimizer import distrib_optimizer

    cast = distrib_optimizer.quantize_param_shard

    def cast_rows(model_params: list[Any], *arguments: Any, **options: Any) -> None:
        quantizers = [param._get_quantizer() for param in model_params]
        before = [quantizer.columnwise_usage for quantizer in quantizers]
        for quantizer in quantizers:
            # Blockwise scaling has factors of its own for the transposed copy.
            if type(quantizer).__name__ != "Float8BlockQuantizer":
                quantizer.set_usage(columnwise=False)
        try:
            cast(model_params, *arguments, **options)
        finally:
            for quantizer, columnwise in zip(quantizers, before):
                quantizer.set_usage(columnwise=columnwise)

    distrib_optimizer.quantize_param_shard = cast_rows


def adam_one_parameter_at_a_time() -> None:
    """Have every FusedAdam step parameter by parameter.

    Transformer Engine's widens the bf16 moments of a whole group of parameters to fp32, and so takes more memory than
    they save (8 bytes a parameter: the 8B did not fit one H200).
    """
    from transformer_engine.pytorch.optimizers import FusedAdam

    step = FusedAdam.step

    def step_each(self: Any, closure: Callable[[], Any] | None = None, grad_scaler: Any = None) -> Any:
        loss = None if closure is None else closure()
        groups = self.param_groups
        try:
            for group in groups:
                if not group["params"]:
                    continue
                steps = group.get("step", 0)  # of the group, counted by each call
                for param in group["params"]:
                    self.param_groups = [{**group, "params": [param], "step": steps}]
                    step(self, grad_scaler=grad_scaler)
                group["step"] = steps + 1
        finally:
            self.param_groups = groups
        return loss

    FusedAdam.step = step_each
