"""megatron-core from 0.17 on asks nvidia-resiliency-ext for its version, which 0.4 does not tell.

https://github.com/NVIDIA/Megatron-LM/issues/5605
"""

import nvidia_resiliency_ext


def needed() -> bool:
    return not hasattr(nvidia_resiliency_ext, "__version__")


def install() -> None:
    nvidia_resiliency_ext.__version__ = "0.6.0"  # what it is asked for; nothing of it is used here
