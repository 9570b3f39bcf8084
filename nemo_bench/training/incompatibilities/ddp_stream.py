"""NeMo 2.7 and older Megatron-Bridge copy the weights into Megatron's buffers on another stream, and wait for nothing.

The first step may then read weights that are not there yet: on an H200 the loss was NaN in two of six starts, and off
by 0.0006 in three, wherever CUDA_DEVICE_MAX_CONNECTIONS=1 did not put the streams in order.
https://github.com/NVIDIA-NeMo/Megatron-Bridge/pull/1706
"""

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel


def needed() -> bool:
    return bool(torch.cuda.is_available())


def install() -> None:
    construct = DistributedDataParallel.__init__

    def construct_in_order(self: Any, *arguments: Any, **options: Any) -> None:
        """Wait for the weights before they are copied, and for the copy before they are used."""
        own, default = torch.cuda.current_stream(), torch.cuda.default_stream()
        own.wait_stream(default)
        construct(self, *arguments, **options)
        default.wait_stream(own)

    DistributedDataParallel.__init__ = construct_in_order
