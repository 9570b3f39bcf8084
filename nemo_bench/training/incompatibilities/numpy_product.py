"""megatron-core up to 0.15 reads checkpoints with `numpy.product`, which numpy 2 does not have.

https://github.com/NVIDIA/Megatron-LM/issues/1563
"""

import numpy


def needed() -> bool:
    return not hasattr(numpy, "product")


def install() -> None:
    numpy.product = numpy.prod  # type: ignore[attr-defined]
