"""NeMo 2.7 gives `get_megatron_optimizer` three arguments that megatron-core 0.16 dropped.

https://github.com/NVIDIA-NeMo/Megatron-Bridge/issues/1572
"""

import inspect
from typing import Any

from megatron.core import optimizer


def needed() -> bool:
    return "no_weight_decay_cond" not in inspect.signature(optimizer.get_megatron_optimizer).parameters


def install() -> None:
    build = optimizer.get_megatron_optimizer

    def without(*arguments: Any, no_weight_decay_cond: Any, scale_lr_cond: Any, lr_mult: float, **others: Any) -> Any:
        assert no_weight_decay_cond is None and scale_lr_cond is None and lr_mult == 1.0  # nothing is lost
        return build(*arguments, **others)

    optimizer.get_megatron_optimizer = without
