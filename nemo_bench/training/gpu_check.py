"""What a rank can know about its GPU before the long imports: that it is there, and can compute what is asked for."""

from __future__ import annotations

import os
import re

import torch

from nemo_bench.config import TrainConfig
from nemo_bench.errors import BenchError

# Compute capability that each scaling needs, and the CUDA that blockwise needs besides: Transformer Engine's own checks
# (pytorch/quantization.py).
_FP8_CAPABILITY = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0)}
_BLOCKWISE_CUDA = (12, 9)


def check_gpu(cfg: TrainConfig, local_rank: int) -> None:
    """Refuses a GPU that cannot train as `cfg` says.

    Raises:
        BenchError: naming the GPU, what it lacks, and what works.
        RuntimeError: torch's, where CUDA itself does not start.
    """
    if torch.version.cuda is None:
        raise BenchError(
            f"torch {torch.__version__} is built without CUDA: install a CUDA build (pytorch.org), or choose gpu=cpu"
        )
    torch.cuda.init()
    count = torch.cuda.device_count()
    if local_rank >= count:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = f"CUDA_VISIBLE_DEVICES={visible}" if visible is not None else "all of this machine's"
        raise BenchError(
            f"this rank is number {local_rank} of its node, and sees {count} GPUs ({why}): each rank must see as many "
            f"as trainer.devices={cfg.trainer.devices}"
        )
    name, capability = torch.cuda.get_device_name(local_rank), torch.cuda.get_device_capability(local_rank)
    _check_kernels(name, capability)
    if cfg.precision.fp8:
        _check_fp8(cfg.precision.fp8_recipe, name, capability)


def _check_kernels(name: str, capability: tuple[int, int]) -> None:
    """torch only warns of a GPU that it holds no kernels for; the first kernel then fails."""
    built = torch.cuda.get_arch_list()
    for arch in built:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", arch)
        if match is None:
            continue
        kind, major, minor = match[1], int(match[2]), int(match[3])
        # Machine code runs on later GPUs of its generation, PTX on all later ones.
        if (kind == "sm" and major == capability[0] and minor <= capability[1]) or (
            kind == "compute" and (major, minor) <= capability
        ):
            return
    if built:
        raise BenchError(
            f"torch {torch.__version__} holds no kernels for {name} (sm_{capability[0]}{capability[1]}), only for "
            f"{', '.join(built)}: install a build of torch for this GPU (pytorch.org)"
        )


def _check_fp8(recipe: str, name: str, capability: tuple[int, int]) -> None:
    needed = _FP8_CAPABILITY.get(recipe, _FP8_CAPABILITY["delayed"])
    if capability < needed:
        works = [f"precision.fp8_recipe={each}" for each, least in _FP8_CAPABILITY.items() if capability >= least]
        raise BenchError(
            f"{name} (compute capability {capability[0]}.{capability[1]}) has no fp8 as precision.fp8_recipe={recipe} "
            f"needs it ({needed[0]}.{needed[1]} or later); what works here: {', '.join([*works, 'precision=bf16'])}"
        )
    if recipe == "blockwise" and tuple(int(part) for part in str(torch.version.cuda).split(".")[:2]) < _BLOCKWISE_CUDA:
        raise BenchError(
            f"precision.fp8_recipe=blockwise needs CUDA 12.9, and torch {torch.__version__} has {torch.version.cuda}: "
            "another build of torch, precision.fp8_recipe=delayed or precision=bf16"
        )
