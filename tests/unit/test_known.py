"""Settings that an installed version lacks: left out where they change nothing, else an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from nemo_bench.errors import BenchError
from nemo_bench.training.known import known, left_out


@dataclass
class OldPrecision:
    """A version with an older name, and without Transformer Engine's cross entropy."""

    fp8: str | None = None
    fp8_params: bool = False


class Base:
    def __init__(self, backend: str = "gloo", **others: Any) -> None:
        self.backend = backend


class Strategy(Base):
    def __init__(self, size: int = 1, **others: Any) -> None:
        super().__init__(**others)
        self.size = size


def layers(config: str) -> str:
    return config


@pytest.fixture(autouse=True)
def nothing_left_out() -> Iterator[None]:
    left_out.clear()
    yield
    left_out.clear()


def test_what_a_version_knows_is_given_also_by_its_older_name_and_through_base_classes() -> None:
    assert known(OldPrecision, fp8="hybrid", fp8_param_gather=True) == OldPrecision("hybrid", fp8_params=True)
    strategy = known(Strategy, size=2, backend="nccl")
    assert (strategy.size, strategy.backend) == (2, "nccl")
    assert left_out == set()


@pytest.mark.parametrize(
    ("target", "name", "value", "refused"),
    [
        # off: the version does without it
        (OldPrecision, "first_last_layers_bf16", False, None),
        (OldPrecision, "cuda_graph_impl", "none", None),
        # what the version does
        (OldPrecision, "cross_entropy_fusion_impl", "native", None),
        (OldPrecision, "fp8_recipe", "delayed", None),
        # of no step's time
        (Strategy, "ckpt_optim_fully_reshardable", True, None),
        (layers, "vp_stage", 1, None),
        # another model, or another kernel
        (OldPrecision, "rope_scaling", True, "use rope_scaling=false"),
        (OldPrecision, "cross_entropy_fusion_impl", "te", "use cross_entropy_fusion_impl=native"),
        (OldPrecision, "fp8_recipe", "tensorwise", "use fp8_recipe=delayed"),
        (OldPrecision, "attention_backend", "fused", "use attention_backend=null"),
        (OldPrecision, "first_last_layers_bf16", True, "use first_last_layers_bf16=false"),
        (Strategy, "some_new_setting", 3, "some_new_setting=3 would be without effect: Strategy of the installed"),
    ],
)
def test_a_setting_that_a_version_lacks(target: Callable[..., Any], name: str, value: Any, refused: str | None) -> None:
    arguments = ("a",) if target is layers else ()
    if refused is None:
        known(target, *arguments, **{name: value})
        assert left_out == {name}
        return
    with pytest.raises(BenchError) as error:
        known(target, *arguments, **{name: value})
    assert refused in str(error.value) and left_out == set()
