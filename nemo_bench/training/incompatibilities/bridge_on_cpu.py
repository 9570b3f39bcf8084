"""Megatron-Bridge prepares CUDA in three places without asking whether it is there.

https://github.com/NVIDIA-NeMo/Megatron-Bridge/issues/3295
"""

import functools

import torch


def needed() -> bool:
    return not torch.cuda.is_available()


def install() -> None:
    from megatron.bridge.training import initialize, setup

    # setup() does not pass allow_no_cuda on.
    setup.initialize_megatron = functools.partial(initialize.initialize_megatron, allow_no_cuda=True)
    # Compiles fused functions ahead of time, for the current CUDA device.
    setup.set_jit_fusion_options = lambda *_: None
    # Its own start of the process group ends in barrier(device_ids=...), which gloo refuses.
    torch.distributed.init_process_group("gloo")
