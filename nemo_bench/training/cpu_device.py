"""Answers "which CUDA device?" with "the CPU", so that Megatron and NeMo run unchanged where there is no GPU.

A CPU has one device and one stream, and everything is finished when the call returns: that is all this module says.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class _Stream:
    """The one stream of a CPU and any event on it: finished whenever somebody looks."""

    device = CPU
    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...

    synchronize = wait_stream = wait_event = wait = record = __init__

    def record_event(self, event: _Stream | None = None) -> _Stream:
        return event or self

    def query(self) -> bool:
        return True


_STREAM = _Stream()


def _is_cuda(device: object) -> bool:
    return isinstance(device, (str, torch.device)) and str(device).startswith("cuda")


class _CudaMeansCpu(TorchFunctionMode):
    """Read `cuda` as `cpu` in the arguments of torch functions."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        if func is torch.Tensor.to:
            args = tuple(CPU if _is_cuda(a) else a for a in args)
            kwargs.pop("non_blocking", None)  # speaks of a copy between devices
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron tells precisions apart by names such as 'torch.cuda.FloatTensor'.
            name = func(*args)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            return name.replace("torch.", "torch.cuda.", 1) if caller.startswith("megatron.") else name
        return func(*args, **kwargs)


def install() -> None:
    """Make this process see the CPU as its CUDA device, before megatron or nemo are imported.

    A second call, in a forked process, only shares out the cores.
    """
    if torch.cuda.is_available():
        return
    if "OMP_NUM_THREADS" not in os.environ:
        # Ranks of one node share its cores, unless Slurm has bound each to its own; more threads than cores take turns.
        cores = len(os.sched_getaffinity(0))
        bound = "SLURM_PROCID" in os.environ and cores < (os.cpu_count() or 1)
        torch.set_num_threads(cores if bound else max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    if torch.cuda.Stream is _Stream:
        return
    answers: dict[str, Any] = {
        "Stream": _Stream,
        "Event": _Stream,
        "stream": lambda stream: contextlib.nullcontext(stream),
        "current_stream": lambda device=None: _STREAM,
        "default_stream": lambda device=None: _STREAM,
        # Not a number: in a backward pass, where the function mode is not in force, torch would look for that GPU.
        "current_device": lambda: CPU,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "is_initialized": lambda: True,  # resuming asserts it, right after the process group has been set up
        "device_count": lambda: 1,  # NeMo seeds Megatron's random state trackers only where there is a device
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "manual_seed": torch.manual_seed,
        "default_generators": defaultdict(lambda: torch.default_generator),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    torch.cuda.random.get_rng_state = answers["get_rng_state"]
    _CudaMeansCpu().__enter__()
