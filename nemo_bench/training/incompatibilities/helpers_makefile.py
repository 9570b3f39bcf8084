"""Megatron-Bridge runs `make` in megatron-core's datasets, and ends where that fails.

The containers have the source tree; pip's wheel has the helpers built, and no Makefile.
https://github.com/NVIDIA-NeMo/Megatron-Bridge/issues/3295
"""

from pathlib import Path

from megatron.core import datasets


def needed() -> bool:
    return not (Path(datasets.__path__[0]) / "Makefile").exists()


def install() -> None:
    from megatron.bridge.training import initialize

    initialize.compile_helpers = lambda: None
