"""Known incompatibilities of versions: each function probes what is installed, and repairs it where that needs it."""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


def install(stack: str) -> None:
    """Repair what a stack's installed versions need, before what trains is imported."""
    nemo2 = (numpy_product, optimizer_arguments, ddp_stream)
    bridge = (resiliency_version, transformer_engine_absent, helpers_makefile, bridge_on_cpu, ddp_stream)
    for repair in bridge if stack == "megatron_bridge" else nemo2:
        repair()


def numpy_product() -> None:
    """megatron-core up to 0.15 reads checkpoints with `numpy.product`, which numpy 2 does not have.

    https://github.com/NVIDIA/Megatron-LM/issues/1563
    """
    import numpy

    if not hasattr(numpy, "product"):
        numpy.product = numpy.prod  # type: ignore[attr-defined]


def optimizer_arguments() -> None:
    """NeMo 2.7 gives `get_megatron_optimizer` three arguments that megatron-core 0.16 dropped.

    https://github.com/NVIDIA-NeMo/Megatron-Bridge/issues/1572
    """
    from megatron.core import optimizer

    build = optimizer.get_megatron_optimizer
    if "no_weight_decay_cond" in inspect.signature(build).parameters:
        return

    def without(*arguments: Any, no_weight_decay_cond: Any, scale_lr_cond: Any, lr_mult: float, **others: Any) -> Any:
        assert no_weight_decay_cond is None and scale_lr_cond is None and lr_mult == 1.0  # nothing is lost
        return build(*arguments, **others)

    optimizer.get_megatron_optimizer = without


def ddp_stream() -> None:
    """NeMo 2.7 and older Bridge copy the weights into Megatron's buffers on another stream, and wait for nothing.

    The first step may then read weights that are not there yet: on an H200 the loss was NaN in two of six starts, and
    off by 0.0006 in three, wherever CUDA_DEVICE_MAX_CONNECTIONS=1 did not put the streams in order.
    https://github.com/NVIDIA-NeMo/Megatron-Bridge/pull/1706
    """
    if not torch.cuda.is_available():
        return
    from megatron.core.distributed import DistributedDataParallel

    construct = DistributedDataParallel.__init__

    def construct_in_order(self: Any, *arguments: Any, **options: Any) -> None:
        """Wait for the weights before they are copied, and for the copy before they are used."""
        own, default = torch.cuda.current_stream(), torch.cuda.default_stream()
        own.wait_stream(default)
        construct(self, *arguments, **options)
        default.wait_stream(own)

    DistributedDataParallel.__init__ = construct_in_order


def bridge_on_cpu() -> None:
    """Megatron-Bridge prepares CUDA in three places without asking whether it is there.

    https://github.com/NVIDIA-NeMo/Megatron-Bridge/issues/3295
    """
    if torch.cuda.is_available():
        return
    from megatron.bridge.training import initialize, setup

    # setup() does not pass allow_no_cuda on.
    setup.initialize_megatron = functools.partial(initialize.initialize_megatron, allow_no_cuda=True)
    # Compiles fused functions ahead of time, for the current CUDA device.
    setup.set_jit_fusion_options = lambda *_: None
    # Its own start of the process group ends in barrier(device_ids=...), which gloo refuses.
    torch.distributed.init_process_group("gloo")


def helpers_makefile() -> None:
    """Megatron-Bridge runs `make` in megatron-core's datasets, and ends where that fails.

    The containers have the source tree; pip's wheel has the helpers built, and no Makefile.
    https://github.com/NVIDIA-NeMo/Megatron-Bridge/issues/3295
    """
    from megatron.core import datasets

    if not (Path(datasets.__path__[0]) / "Makefile").exists():
        from megatron.bridge.training import initialize

        initialize.compile_helpers = lambda: None


def resiliency_version() -> None:
    """megatron-core from 0.17 on asks nvidia-resiliency-ext for its version, which 0.4 does not tell.

    https://github.com/NVIDIA/Megatron-LM/issues/5605
    """
    import nvidia_resiliency_ext

    if not hasattr(nvidia_resiliency_ext, "__version__"):
        nvidia_resiliency_ext.__version__ = "0.6.0"  # what it is asked for; nothing of it is used here


def transformer_engine_absent() -> None:
    """Megatron-Bridge imports Transformer Engine (and triton) for LoRA whether it is there or not: on a CPU it is not.

    It is imported with stand-ins, which are taken away again: whoever asks from then on (torch, modelopt) hears: no.
    https://github.com/NVIDIA-NeMo/Megatron-Bridge/issues/3295
    """
    if importlib.util.find_spec("transformer_engine"):
        return
    # Ahead of them: modelopt is left half imported where a package that it tries answers wrongly, and Megatron's own
    # layers ask whether Transformer Engine is there.
    import megatron.core.models.gpt.gpt_layer_specs
    import megatron.core.models.gpt.gpt_model
    import megatron.core.optimizer
    import modelopt.torch.distill  # noqa: F401

    packages = ("triton", "megatron.energon", "transformer_engine")
    stand_ins = StandIns(tuple(name for name in packages if importlib.util.find_spec(name) is None))
    sys.meta_path.append(stand_ins)
    import megatron.bridge.training.pretrain  # noqa: F401

    sys.meta_path.remove(stand_ins)
    for name in filter(stand_ins.is_ours, list(sys.modules)):
        del sys.modules[name]


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stand in for every module of the packages that are not installed."""

    def __init__(self, packages: tuple[str, ...]) -> None:
        self.packages = packages

    def is_ours(self, name: str) -> bool:
        return any(f"{name}.".startswith(f"{package}.") for package in self.packages)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if self.is_ours(name) else None

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__.update(__version__="0.0", __getattr__=_stand_in)


def _stand_in(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    return _Answers(name, (_StandIn,), {})


class _Answers(type):
    def __getattr__(cls, name: str) -> Any:
        return _stand_in(name)


class _StandIn(torch.nn.Module, metaclass=_Answers):
    """Be whatever was asked of a module that is not here: a base class, a decorator, a constant."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self
