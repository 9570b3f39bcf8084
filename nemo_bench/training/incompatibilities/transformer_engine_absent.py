"""Megatron-Bridge imports Transformer Engine (and triton) for LoRA whether it is there or not: on a CPU it is not.

https://github.com/NVIDIA-NeMo/Megatron-Bridge/issues/3295
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import Any

import torch


def needed() -> bool:
    return importlib.util.find_spec("transformer_engine") is None


def install() -> None:
    """Import Bridge with stand-ins, and take them away again: whoever asks from then on (torch, modelopt) hears: no."""
    # Ahead of them: modelopt is left half imported where a package that it tries answers wrongly, and Megatron's own
    # layers ask whether Transformer Engine is there.
    import megatron.core.models.gpt.gpt_layer_specs
    import megatron.core.models.gpt.gpt_model
    import megatron.core.optimizer
    import modelopt.torch.distill  # noqa: F401

    packages = ("triton", "megatron.energon", "transformer_engine")
    stand_ins = _StandIns(tuple(name for name in packages if importlib.util.find_spec(name) is None))
    sys.meta_path.append(stand_ins)
    import megatron.bridge.training.pretrain  # noqa: F401

    sys.meta_path.remove(stand_ins)
    for name in filter(stand_ins.is_ours, list(sys.modules)):
        del sys.modules[name]


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stand in for every module of the packages that are not installed."""

    def __init__(self, packages: tuple[str, ...]) -> None:
        self.packages = packages

    def is_ours(self, name: str) -> bool:
        return any(f"{name}.".startswith(f"{package}.") for package in self.packages)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if self.is_ours(name) else None

    def create_module(self, spec: Any) -> ModuleType:
        return ModuleType(spec.name)

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
