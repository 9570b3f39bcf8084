"""The containers that a user can choose (conf/entrypoint): each a file, and what it sets otherwise."""

from __future__ import annotations

import pytest

from nemo_bench.checks.configuration import configuration_problems
from nemo_bench.entrypoints import entrypoint_of

from ..composing import PROJECT, composed


@pytest.mark.parametrize("name", [path.stem for path in (PROJECT / "conf" / "entrypoint").glob("*.yaml")])
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_container_composes_and_passes_the_checks(name: str, precision: str) -> None:
    cfg = composed(f"entrypoint={name}", "scale=64gpu", f"precision={precision}")
    assert cfg.entrypoint.container.startswith("nvcr.io/nvidia/nemo:")
    tag = cfg.entrypoint.container.rpartition(":")[2]
    assert cfg.entrypoint.image == f"nvidia+nemo+{tag}.sqsh" and cfg.entrypoint.name == name
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
