"""Adam's step with moments in bf16, one parameter at a time.

Transformer Engine's FusedAdam computes in fp32. It widens the bf16 moments of a whole group of parameters before its
kernels and narrows them behind, and so takes more memory than the narrow moments save: 8 bytes a parameter, 60 GiB for
the 8B, which then did not fit one H200. Parameter by parameter it is what the largest one needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def install() -> None:
    """Has every FusedAdam that is made from now on step so."""
    from transformer_engine.pytorch.optimizers import FusedAdam

    FusedAdam.step = one_parameter_at_a_time(FusedAdam.step)


def one_parameter_at_a_time(step: Callable[..., None]) -> Callable[..., Any]:
    """FusedAdam's `step`, called with a group of its own for each parameter."""

    def stepped(self: Any, closure: Callable[[], Any] | None = None, grad_scaler: Any = None) -> Any:
        loss = None if closure is None else closure()
        groups = self.param_groups
        try:
            for group in groups:
                if not group["params"]:
                    continue
                done = group.get("step", 0)  # of the group, counted by each call
                for param in group["params"]:
                    self.param_groups = [{**group, "params": [param], "step": done}]
                    step(self, grad_scaler=grad_scaler)
                group["step"] = done + 1
        finally:
            self.param_groups = groups
        return loss

    return stepped
