"""The matrix rate of a device: TFLOP/s of short, timed matrix products."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch


def cpu_matrix_rate(precision: str, *, size: int = 1536, seconds: float = 1.0) -> dict[str, Any]:
    """Return the TFLOP/s of the fastest product of two random square matrices, and what was timed.

    All ranks of a run call this at the same time, so that they share the machine as they do when training.
    """
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    times_s: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(times_s) < 3 or time.perf_counter() < deadline:
        start = time.perf_counter()
        torch.mm(a, b)
        times_s.append(time.perf_counter() - start)
    timed = {"dtype": str(dtype).removeprefix("torch."), "size": size, "repeats": len(times_s)}
    return {"tflops": 2 * size**3 / min(times_s) / 1e12, **timed, "threads": torch.get_num_threads()}


def gpu_matrix_rate(device: int, *, size: int = 8192) -> float:
    """Return the median TFLOP/s of bf16 matrix products on CUDA device number `device`, and free all they used.

    Ranks that train together wait for each other, and their step times do not show which of them is slow. This does.
    """
    with torch.cuda.device(device):
        a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        result = torch.mm(a, b)  # the first makes cuBLAS ready
        torch.cuda.synchronize()
        times_s: list[float] = []
        began = time.perf_counter()
        while (start := time.perf_counter()) < began + 0.4:
            for _ in range(4):
                torch.mm(a, b, out=result)
            torch.cuda.synchronize()
            if start >= began + 0.1:  # clocks have come up
                times_s.append((time.perf_counter() - start) / 4)
        del a, b, result
        torch.cuda.empty_cache()
    return 2 * size**3 / statistics.median(times_s) / 1e12
