"""NeMo 2.7 gives `get_megatron_optimizer` three arguments that megatron-core 0.16 dropped.

https://github.com/NVIDIA-NeMo/Megatron-Bridge/issues/1572
"""

from __future__ import annotations

import inspect
from typing import Any


def needed() -> bool:
    from megatron.core import optimizer

    return "no_weight_decay_cond" not in inspect.signature(optimizer.get_megatron_optimizer).parameters


def install() -> None:
    from megatron.core import optimizer

    build = optimizer.get_megatron_optimizer

    def get_megatron_optimizer(
        config: Any,
        model_chunks: Any,
        no_weight_decay_cond: Any = None,
        scale_lr_cond: Any = None,
        lr_mult: float = 1.0,
        **others: Any,
    ) -> Any:
        assert no_weight_decay_cond is None and scale_lr_cond is None and lr_mult == 1.0  # nothing is lost
        return build(config, model_chunks, **others)

    optimizer.get_megatron_optimizer = get_megatron_optimizer
