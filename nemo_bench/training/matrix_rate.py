"""The matrix rate of a device: TFLOP/s of a short, timed matrix product."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class MatrixRate:
    """The fastest of several timed products on ONE rank's share of the CPU, and what was timed."""

    tflops: float
    dtype: str
    size: int  # of the square matrices
    repeats: int
    threads: int


def cpu_matrix_rate(precision: str, *, size: int = 1536, seconds: float = 1.0) -> MatrixRate:
    """Multiply two random square matrices for about `seconds`.

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
    return MatrixRate(
        tflops=2 * size**3 / best / 1e12,
        dtype=str(dtype).removeprefix("torch."),
        size=size,
        repeats=repeats,
        threads=torch.get_num_threads(),
    )


def gpu_matrix_rate(device: int, *, size: int = 8192, seconds: float = 0.3, warmup_seconds: float = 0.1) -> float:
    """Return the median TFLOP/s of bf16 matrix products on CUDA device number `device`, and free all they used.

    Ranks that train together wait for each other, and their step times do not show which of them is slow. This does.
    """
    with torch.cuda.device(device):
        a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        result = torch.empty_like(a)
        moments = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        times_s: list[float] = []
        torch.mm(a, b, out=result)  # the first makes cuBLAS ready
        torch.cuda.synchronize()
        began = time.perf_counter()
        while (spent := time.perf_counter() - began) < warmup_seconds + seconds:
            moments[0].record()
            for _ in range(4):
                torch.mm(a, b, out=result)
            moments[1].record()
            moments[1].synchronize()
            if spent >= warmup_seconds:  # clocks have come up
                times_s.append(moments[0].elapsed_time(moments[1]) / 1000 / 4)
        del a, b, result
        torch.cuda.empty_cache()
    return 2 * size**3 / statistics.median(times_s) / 1e12
