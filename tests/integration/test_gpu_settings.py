"""What GPU points hand to NeMo and Megatron, as far as it can be built without a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_bench.project import PROJECT

POINTS = {
    "70b": "scale=64gpu",
    "70b as the recipe": "scale=64gpu model.defer_embedding_wgrad_compute=true",
    "70b fp8": "scale=64gpu precision=fp8",
    "405b": "scale=576gpu model=405b",
    "8b": "scale=8gpu model=8b",
    "slice": "scale=1gpu model=70b_slice",
    "slice PP2 VP2": "scale=2gpu model=70b_slice model.pipeline_model_parallel_size=2 "
    "model.virtual_pipeline_model_parallel_size=2",
}
# NeMo fills the sizes in after the model's configuration was made, and Megatron checks all of it again on the GPU.
PROGRAM = """
import json, sys
import hydra
from nemo_bench.config import typed
from nemo_bench.training.model import build_model
from nemo_bench.training.trainer import build_precision, build_strategy
from nemo.lightning import _strategy_lib, io
from nemo.lightning.pytorch.plugins.mixed_precision import update_config_with_dtype_overrides

settings = {}
for name, overrides in json.loads(sys.argv[1]).items():
    with hydra.initialize_config_dir(sys.argv[2], version_base="1.3"):
        # This one kernel is asked for at once, of Transformer Engine.
        cfg = typed(hydra.compose("train", [*overrides.split(), "model.apply_rope_fusion=false"]))
    model, strategy = build_model(cfg, None), build_strategy(cfg)
    precision = build_precision(cfg)
    strategy._precision_plugin = precision  # Lightning's trainer connects the two
    _strategy_lib.set_model_parallel_attributes(model, strategy.parallelism)
    config = update_config_with_dtype_overrides(precision.dtype_config, model.config)
    config.__post_init__()
    keys = ("defer_embedding_wgrad_compute", "wgrad_deferral_limit", "overlap_p2p_comm", "batch_p2p_comm", "fp8",
            "fp8_param", "gradient_accumulation_fusion", "cross_entropy_fusion_impl", "recompute_granularity")
    # What NeMo builds the second interleaved stage of a rank from.
    again = io.reinit(model).config
    assert all(getattr(again, key) == getattr(config, key) for key in keys), name
    settings[name] = {key: getattr(config, key) for key in keys} | {"bucket_size": strategy.ddp_config.bucket_size}
print(json.dumps(settings))
"""


@pytest.mark.train
def test_megatron_takes_the_settings_of_every_size(python: Callable[..., str]) -> None:
    settings = json.loads(python(PROGRAM, json.dumps(POINTS), str(PROJECT / "conf")).splitlines()[-1])
    # The 70B and the 405B reduce gradients over several ranks meanwhile, which would lose what was deferred.
    deferring = {name for name, chosen in settings.items() if chosen["defer_embedding_wgrad_compute"]}
    assert deferring == {"70b as the recipe", "slice PP2 VP2"}
    assert {name for name, chosen in settings.items() if chosen["fp8_param"]} == {"70b fp8"}
    for chosen in settings.values():
        assert chosen["gradient_accumulation_fusion"] is True
        assert chosen["cross_entropy_fusion_impl"] == "te"
        assert chosen["recompute_granularity"] is None
        assert chosen["bucket_size"] == 128 << 20
        assert not (chosen["overlap_p2p_comm"] and chosen["batch_p2p_comm"])


# Transformer Engine's product as its documentation has it, for what stands around it; the real one runs in tests/gpu.
GENERAL_GEMM = """
def general_gemm(A, B, *, layout, grad, accumulate, out, out_dtype, use_split_accumulator):
    assert layout == "NT" and grad and accumulate and out_dtype == out.dtype
    out += (B.float().T @ A.float()).to(out.dtype)
"""
FUSION = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from nemo_bench.training import patches
accumulation = patches.te_weight_gradient_accumulation()
if accumulation == "transformer_engine":
    import fused_weight_gradient_mlp_cuda as fused
    tokens, inputs, outputs = 6, 4, 3
    total_input, grad_output = torch.randn(tokens, inputs), torch.randn(tokens, outputs)
    for name in ("wgrad_gemm_accum_fp32", "wgrad_gemm_accum_fp16"):
        main_grad = torch.ones(outputs, inputs)
        getattr(fused, name)(total_input, grad_output, main_grad)
        assert torch.allclose(main_grad, 1 + grad_output.T @ total_input)
print(accumulation)
"""


@pytest.mark.train
def test_gradient_accumulation_fusion_is_apexs_or_transformer_engines_or_missing(
    python: Callable[..., str], tmp_path: Path
) -> None:
    assert python(FUSION, str(tmp_path)) == "none\n"
    engine = tmp_path / "transformer_engine" / "pytorch"
    engine.mkdir(parents=True)
    for package in (engine.parent, engine):
        (package / "__init__.py").touch()
    (engine / "cpp_extensions.py").write_text(GENERAL_GEMM)
    assert python(FUSION, str(tmp_path)) == "transformer_engine\n"
    (tmp_path / "fused_weight_gradient_mlp_cuda.py").touch()
    assert python(FUSION, str(tmp_path)) == "apex\n"


CAST = """
from megatron.core.optimizer import distrib_optimizer
from nemo_bench.training import patches

class Float8Quantizer:
    columnwise_usage = True
    def set_usage(self, *, columnwise):
        self.columnwise_usage = columnwise

class Float8BlockQuantizer(Float8Quantizer):
    pass

class Parameter:
    def __init__(self, quantizer):
        self.quantizer = quantizer
    def _get_quantizer(self):
        return self.quantizer

seen = []
def cast(model_params, main_params, start_offsets, group):
    seen.append([param.quantizer.columnwise_usage for param in model_params])
    if group == "broken":
        raise RuntimeError("broken")

distrib_optimizer.quantize_param_shard = cast
patches.fp8_cast_without_transpose()
params = [Parameter(Float8Quantizer()), Parameter(Float8BlockQuantizer())]
distrib_optimizer.quantize_param_shard(params, [], [], "group")
try:
    distrib_optimizer.quantize_param_shard(params, [], [], "broken")
except RuntimeError:
    pass
print(seen, [param.quantizer.columnwise_usage for param in params])
"""


@pytest.mark.train
def test_fp8_parameters_are_cast_without_a_transposed_copy_and_keep_their_use(python: Callable[..., str]) -> None:
    assert python(CAST).splitlines()[-1] == "[[False, True], [False, True]] [True, True]"


# A FusedAdam that widens bf16 moments as Transformer Engine's does; its kernel is tested on a GPU (tests/gpu).
NARROW_MOMENTS = """
import sys, types
import torch
from nemo_bench.training import patches

class FusedAdam(torch.optim.Optimizer):
    widest = 0
    def step(self, closure=None, grad_scaler=None):
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            narrow = {param: self.state[param].setdefault("moment", param.detach() * 0) for param in group["params"]}
            wide = {param: moment.float() for param, moment in narrow.items()}
            FusedAdam.widest = max(FusedAdam.widest, len(wide))
            for param, moment in wide.items():
                moment.mul_(0.9).add_(param.grad.float(), alpha=0.1)
                param.data -= (group["lr"] / (1 - 0.9 ** group["step"]) * moment).bfloat16()
                self.state[param]["moment"].copy_(moment)

def trained():
    torch.manual_seed(1)
    params = [torch.nn.Parameter(torch.randn(size, dtype=torch.bfloat16)) for size in (3, 50, 7)]
    given = [{"params": params[:2], "lr": 0.1}, {"params": [], "lr": 1.0}, {"params": params[2:], "lr": 0.2}]
    optimizer = FusedAdam(given, {})
    groups = optimizer.param_groups
    for step in range(3):
        for group in groups:
            group["lr"] *= 0.9  # as a schedule does
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
    assert optimizer.param_groups is groups
    return [*params, *(optimizer.state[param]["moment"] for param in params)], [group.get("step") for group in groups]

whole, widest = trained(), FusedAdam.widest
for name in ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.optimizers"):
    sys.modules[name] = types.ModuleType(name)
sys.modules[name].FusedAdam = FusedAdam
patches.adam_one_parameter_at_a_time()
FusedAdam.widest = 0
single = trained()
assert all(torch.equal(a, b) for a, b in zip(whole[0], single[0]))
print(widest, FusedAdam.widest, whole[1], single[1])
"""


@pytest.mark.train
def test_narrow_moments_are_widened_one_parameter_at_a_time(python: Callable[..., str]) -> None:
    assert python(NARROW_MOMENTS).splitlines()[-1] == "2 1 [3, None, 3] [3, None, 3]"
