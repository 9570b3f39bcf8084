"""Megatron-Bridge imports Transformer Engine (and triton) for LoRA whether it is there or not: on a CPU it is not.

https://github.com/NVIDIA-NeMo/Megatron-Bridge/issues/3295
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from contextlib import ExitStack
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

    with ExitStack() as stand_ins:
        for package in ("triton", "megatron.energon", "transformer_engine"):
            if importlib.util.find_spec(package) is None:
                stand_ins.enter_context(_StandIns(package))
        import megatron.bridge.training.pretrain  # noqa: F401


class _Answers(type):
    def __getattr__(cls, name: str) -> Any:
        return _stand_in(name)


def _stand_in(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    return _Answers(name, (_StandIn,), {})


class _StandIn(torch.nn.Module, metaclass=_Answers):
    """Be whatever was asked of a module that is not here: a base class, a decorator, a constant."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self


class _Module(types.ModuleType):
    __version__ = "0.0"

    def __getattr__(self, name: str) -> Any:
        return _stand_in(name)


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stand in for every module of a package that is not installed, while entered."""

    def __init__(self, package: str) -> None:
        self.package = package

    def _is_ours(self, name: str) -> bool:
        return name == self.package or name.startswith(f"{self.package}.")

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if self._is_ours(name) else None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None: ...

    def __enter__(self) -> None:
        sys.meta_path.append(self)

    def __exit__(self, *_: object) -> None:
        sys.meta_path.remove(self)
        for name in [name for name in sys.modules if self._is_ours(name)]:
            del sys.modules[name]
