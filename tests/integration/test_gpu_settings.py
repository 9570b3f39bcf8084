"""What GPU points hand to NeMo and Megatron, as far as it can be built without a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from nemo_bench.project import PROJECT

pytestmark = pytest.mark.train

POINTS = {
    "70b": "scale=64gpu",
    "70b as the recipe": "scale=64gpu model.defer_embedding_wgrad_compute=true",
    "70b fp8": "scale=64gpu precision=fp8",
    "405b": "scale=576gpu model=405b",
    "8b": "scale=8gpu model=8b",
    "slice PP2 VP2": "scale=2gpu model=70b_slice model.pipeline_model_parallel_size=2 "
    "model.virtual_pipeline_model_parallel_size=2",
    "405b of 25.04": "experiment=dgxc_25_04/llama31_405b_bf16_512gpu",
    "70b fp8 of 26.06": "experiment=dgxc_26_06/llama31_70b_fp8_h100",
    "405b mxfp8": "experiment=dgxc_26_06/llama31_405b_mxfp8_gb300",
    "405b nvfp4": "experiment=dgxc_26_06/llama31_405b_nvfp4_gb200",
    "70b Megatron-FSDP": "experiment=dgxc_26_06/llama31_70b_fp8_b200",
    "8b in one graph": "experiment=dgxc_26_06/llama31_8b_bf16_b200",
}
# NeMo fills the number formats in after the model's configuration was made, and Megatron checks all of it again.
PROGRAM = """
import json, sys
import hydra
from nemo_bench.config import typed
from nemo_bench.training.nemo2 import build_model, build_precision, build_strategy
from nemo_bench.training.settings import optimizer_settings
from nemo.lightning import _strategy_lib, io
from nemo.lightning.pytorch.plugins.mixed_precision import update_config_with_dtype_overrides

settings = {}
for name, overrides in json.loads(sys.argv[1]).items():
    with hydra.initialize_config_dir(sys.argv[2], version_base="1.3"):
        # This one kernel is asked for at once, of Transformer Engine.
        cfg = typed(hydra.compose("train", [*overrides.split(), "model.apply_rope_fusion=false"]))
    model, strategy, precision = build_model(cfg, None), build_strategy(cfg), build_precision(cfg)
    strategy._precision_plugin = precision  # Lightning's trainer connects the two
    _strategy_lib.set_model_parallel_attributes(model, strategy.parallelism)
    config = update_config_with_dtype_overrides(precision.dtype_config, model.config)
    config.__post_init__()
    keys = ("defer_embedding_wgrad_compute", "wgrad_deferral_limit", "overlap_p2p_comm", "batch_p2p_comm", "fp8",
            "fp8_param", "gradient_accumulation_fusion", "cross_entropy_fusion_impl", "recompute_granularity",
            "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split", "fp8_recipe", "fp4",
            "cuda_graph_impl", "use_te_rng_tracker", "cpu_offloading_num_layers")
    # What NeMo builds the second interleaved stage of a rank from.
    again = io.reinit(model).config
    assert all(getattr(again, key) == getattr(config, key) for key in keys), name
    settings[name] = {key: getattr(config, key) for key in keys} | {"bucket_size": strategy.ddp_config.bucket_size}
    layout = config.pipeline_model_parallel_layout
    settings[name]["chunks"] = len(layout.layout) * len(layout.layout[0]) if layout else None
    ddp = strategy.ddp_config
    settings[name]["sharded"] = ddp.data_parallel_sharding_strategy if ddp.use_megatron_fsdp else None
    settings[name]["gathers_early"] = optimizer_settings(cfg)["overlap_param_gather_with_optimizer_step"]
print(json.dumps(settings))
"""


def test_megatron_takes_the_settings_of_every_size(python: Callable[..., str]) -> None:
    settings = json.loads(python(PROGRAM, json.dumps(POINTS), str(PROJECT / "conf")).splitlines()[-1])
    # The 70B and the 405B reduce gradients over several ranks meanwhile, which would lose what was deferred.
    deferring = {name for name, chosen in settings.items() if chosen["defer_embedding_wgrad_compute"]}
    assert deferring == {"70b as the recipe", "slice PP2 VP2", "405b of 25.04"}
    in_fp8 = {"70b fp8": "delayed", "70b fp8 of 26.06": "tensorwise", "405b mxfp8": "mxfp8"}
    in_fp8["70b Megatron-FSDP"] = "tensorwise"
    assert {name: chosen["fp8_recipe"] for name, chosen in settings.items() if chosen["fp8_param"]} == in_fp8
    assert {name for name, chosen in settings.items() if chosen["fp4"]} == {"405b nvfp4"}
    assert settings["70b fp8 of 26.06"]["chunks"] == 40
    accounted = {name for name, chosen in settings.items() if chosen["account_for_loss_in_pipeline_split"]}
    assert accounted == {"405b of 25.04", "405b mxfp8", "405b nvfp4"}
    without_chunks = {"8b", "slice PP2 VP2", "70b Megatron-FSDP", "8b in one graph"}
    assert {name for name, chosen in settings.items() if not chosen["gathers_early"]} == without_chunks
    sharded = settings.pop("70b Megatron-FSDP")
    assert (sharded["sharded"], sharded["cpu_offloading_num_layers"]) == ("optim_grads_params", 5)
    # Its layers are not recorded one by one.
    one_graph = settings["8b in one graph"]
    assert (one_graph["cuda_graph_impl"], one_graph["use_te_rng_tracker"]) == ("none", True)
    native = {name for name, chosen in settings.items() if chosen["cross_entropy_fusion_impl"] == "native"}
    assert native == {"405b of 25.04"}
    for chosen in settings.values():
        assert chosen["gradient_accumulation_fusion"] is True and chosen["recompute_granularity"] is None
        assert chosen["bucket_size"] == 128 << 20
        assert not (chosen["overlap_p2p_comm"] and chosen["batch_p2p_comm"])
