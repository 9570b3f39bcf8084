"""megatron-core from 0.17 on asks nvidia-resiliency-ext for its version, which 0.4 does not tell.

https://github.com/NVIDIA/Megatron-LM/issues/5605
"""

from __future__ import annotations

import importlib.util


def needed() -> bool:
    if importlib.util.find_spec("nvidia_resiliency_ext") is None:
        return False
    import nvidia_resiliency_ext

    return not hasattr(nvidia_resiliency_ext, "__version__")


def install() -> None:
    import nvidia_resiliency_ext

    nvidia_resiliency_ext.__version__ = "0.6.0"  # what it is asked for; nothing of it is used here
