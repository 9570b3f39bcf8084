"""The matrix rate of a device that has no published peak: a short, timed matrix product."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True)
class MeasuredPeak:
    """Fastest of several timed products, in TFLOP/s for ONE rank, and what was timed."""

    tflops: float
    dtype: str
    size: int  # of the square matrices
    repeats: int
    threads: int

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def measure_peak(precision: str, *, size: int = 1536, seconds: float = 1.0) -> MeasuredPeak:
    """Multiplies two random square matrices for about `seconds` and takes the fastest product.

    All ranks of a run call this at the same time, so that they share the machine as they do when training.
    """
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    best, repeats = float("inf"), 0
    deadline = time.perf_counter() + seconds
    while repeats < 3 or time.perf_counter() < deadline:
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
        repeats += 1
    return MeasuredPeak(
        tflops=2 * size**3 / best / 1e12,
        dtype=str(dtype).removeprefix("torch."),
        size=size,
        repeats=repeats,
        threads=torch.get_num_threads(),
    )
