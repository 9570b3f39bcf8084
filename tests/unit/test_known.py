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


def layers() -> None: ...


@pytest.fixture(autouse=True)
def nothing_left_out() -> Iterator[None]:
    left_out.clear()
    yield
    left_out.clear()


def test_what_a_version_knows_is_given_also_by_its_older_name_and_through_base_classes() -> None:
    assert known(OldPrecision, fp8="hybrid", fp8_param_gather=True) == OldPrecision("hybrid", fp8_params=True)
    assert known(Strategy, size=2, backend="nccl").backend == "nccl" and left_out == set()


@pytest.mark.parametrize(
    ("target", "name", "value", "refused"),
    [
        (OldPrecision, "first_last_layers_bf16", False, None),  # off: the version does without it
        (OldPrecision, "cuda_graph_impl", "none", None),
        (OldPrecision, "fp8_recipe", "delayed", None),  # what the version does
        (layers, "vp_stage", 1, None),  # of no step's time
        # another model, or another kernel
        (OldPrecision, "rope_scaling", True, "use rope_scaling=false"),
        (OldPrecision, "cross_entropy_fusion_impl", "te", "use cross_entropy_fusion_impl=native"),
        (OldPrecision, "attention_backend", "fused", "use attention_backend=null"),
        (Strategy, "some_new_setting", 3, "some_new_setting=3 would be without effect: Strategy of the installed"),
    ],
)
def test_a_setting_that_a_version_lacks(target: Callable[..., Any], name: str, value: Any, refused: str | None) -> None:
    if refused is None:
        known(target, **{name: value})
        assert left_out == {name}
        return
    with pytest.raises(BenchError, match=refused):
        known(target, **{name: value})
    assert left_out == set()
