"""The containers that a user can choose (conf/entrypoint): each a file, and what it sets otherwise."""

from __future__ import annotations

import pytest

from nemo_bench.checks.configuration import configuration_problems
from nemo_bench.entrypoints import entrypoint_of

from ..composing import composed


@pytest.mark.parametrize(
    ("name", "stack", "tag"),
    [
        ("nemo2", "nemo2", "25.11"),
        ("nemo2_25_02", "nemo2", "25.02.01"),
        ("nemo2_25_04", "nemo2", "25.04.01"),
        ("nemo2_25_07", "nemo2", "25.07.01"),
        ("nemo2_25_09", "nemo2", "25.09"),
        ("nemo2_26_02", "nemo2", "26.02"),
        ("bridge_26_04", "megatron_bridge", "26.04"),
        ("bridge_26_06", "megatron_bridge", "26.06"),
        ("nemo_24_12", "nemo_24_09", "24.12"),
    ],
)
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_container_composes_and_passes_the_checks(name: str, stack: str, tag: str, precision: str) -> None:
    cfg = composed(f"entrypoint={name}", "scale=64gpu", f"precision={precision}")
    assert (cfg.entrypoint.name, cfg.entrypoint.stack) == (name, stack)
    assert (cfg.entrypoint.container, cfg.entrypoint.image) == (f"nvcr.io/nvidia/nemo:{tag}", f"nvidia+nemo+{tag}.sqsh")
    assert cfg.results_version == tag[:5]
    assert configuration_problems(cfg) + entrypoint_of(cfg).problems(cfg) == []


def test_a_containers_settings_win_over_the_models_and_the_command_line_over_them() -> None:
    chosen = ["entrypoint=nemo2_25_02", "scale=64gpu"]
    assert composed(*chosen).model.cross_entropy_fusion_impl == "native"
    assert composed(*chosen, "model.cross_entropy_fusion_impl=te").model.cross_entropy_fusion_impl == "te"
    assert composed("entrypoint=bridge_26_04", "scale=64gpu").trainer.limit_val_batches == 0
    nemo_1 = composed("entrypoint=nemo_24_12", "scale=64gpu").model
    assert (nemo_1.rope_scaling, nemo_1.rotary_base, nemo_1.init_method_std) == (False, 10000, 0.008944)


def test_bridge_refuses_what_it_would_ignore() -> None:
    cfg = composed("entrypoint=bridge_26_06", "scale=64gpu", "checkpoint.every_n_steps=10")
    (problem,) = configuration_problems(cfg)
    assert problem.key == "checkpoint.every_n_steps" and "which writes and reads no checkpoints" in problem.rule
