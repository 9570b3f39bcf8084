"""The rate at which one GPU multiplies matrices for seconds on end, at the clock that its power limit leaves.

    python benchmarks/peers/matrix_rate.py --output matrix-rate.json [--precision bf16 fp8]

8192 x 8192 x 8192 on random data: torch.mm in bf16, torch._scaled_mm in fp8 (e4m3, one scale a tensor, fast
accumulation, bf16 out). A GPU's first second runs at a clock that it cannot hold, so the rate counted is that of the
last seconds of many: floating-point operations over the time between two events on the device. The queue never runs
empty meanwhile. Power, clock and temperature are read beside it through NVML, where nvidia-ml-py is installed. After
that, copies of 2 GiB within the memory, bytes read and written.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peer_common as common

E4M3_MAX = 448.0
CHUNK_S = 0.05  # about this much work between two events
SAMPLE_INTERVAL_S = 0.1


@dataclass(frozen=True)
class Sample:
    """One reading of the GPU; the time is the host's, in seconds on time.perf_counter."""

    at_s: float
    power_w: float
    sm_clock_mhz: int
    temperature_c: int


class Sampler(threading.Thread):
    """Reads the GPU's power, clock and temperature until told to stop."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.samples: list[Sample] = []
        self.problem: str | None = None
        self.stopped = threading.Event()

    def run(self) -> None:
        import torch

        try:
            while not self.stopped.wait(SAMPLE_INTERVAL_S):
                power_w = torch.cuda.power_draw() / 1000
                sample = Sample(time.perf_counter(), power_w, torch.cuda.clock_rate(), torch.cuda.temperature())
                self.samples.append(sample)
        except Exception as error:  # whatever NVML refuses, the rate still stands
            self.problem = f"{type(error).__name__}: {error}"

    def summary(self, since_s: float) -> dict[str, Any]:
        """Means from `since_s` on, on time.perf_counter; why there are none, otherwise."""
        samples = [sample for sample in self.samples if sample.at_s >= since_s]
        if not samples:
            return {"samples": 0, "problem": self.problem}
        return {
            "samples": len(samples),
            "power_w": statistics.fmean(sample.power_w for sample in samples),
            "sm_clock_mhz": statistics.fmean(sample.sm_clock_mhz for sample in samples),
            "temperature_c": statistics.fmean(sample.temperature_c for sample in samples),
        }


def multiplication(precision: str, size: int) -> Callable[[], Any]:
    """What multiplies two random matrices of `size` x `size` once."""
    import torch

    generator = torch.Generator("cuda").manual_seed(1234)
    left, right = (torch.randn(size, size, device="cuda", generator=generator).bfloat16() for _ in range(2))
    if precision == "bf16":
        out = torch.empty(size, size, device="cuda", dtype=torch.bfloat16)
        return lambda: torch.mm(left, right, out=out)

    def quantised(matrix: Any) -> tuple[Any, Any]:
        scale = E4M3_MAX / matrix.abs().max().float()
        return (matrix.float() * scale).to(torch.float8_e4m3fn), scale.reciprocal()

    (left8, left_scale), (right8, right_scale) = quantised(left), quantised(right)
    # The hardware multiplies rows by columns: the right matrix lies column by column.
    columns = right8.t().contiguous().t()
    return lambda: torch._scaled_mm(
        left8, columns, left_scale, right_scale, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def sustained(precision: str, size: int, warmup_s: float, run_s: float, counted_s: float) -> dict[str, Any]:
    """The rate over the last `counted_s` of `run_s` seconds, which follow `warmup_s` seconds of the same."""
    import torch

    multiply = multiplication(precision, size)
    for _ in range(3):
        multiply()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        multiply()
    torch.cuda.synchronize()
    per_chunk = max(1, round(CHUNK_S / ((time.perf_counter() - start) / 10)))

    sampler = Sampler()
    sampler.start()
    events = [torch.cuda.Event(enable_timing=True)]
    events[0].record()
    start = time.perf_counter()
    while time.perf_counter() - start < warmup_s + run_s:
        for _ in range(per_chunk):
            multiply()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        events.append(event)
        if len(events) > 2:
            events[-3].synchronize()  # two chunks stay queued
    torch.cuda.synchronize()
    end = time.perf_counter()
    sampler.stopped.set()
    sampler.join()

    at_s = [events[0].elapsed_time(event) / 1000 for event in events]
    first = next(index for index, at in enumerate(at_s) if at >= at_s[-1] - counted_s)
    chunk_flop = 2 * size**3 * per_chunk
    time_s = at_s[-1] - at_s[first]
    chunk_rates = [chunk_flop / (after - before) / 1e12 for before, after in itertools.pairwise(at_s)]
    return {
        "precision": precision,
        "sustained_tflops": chunk_flop * (len(at_s) - 1 - first) / time_s / 1e12,
        "time_s": time_s,
        "products": per_chunk * (len(at_s) - 1 - first),
        "fastest_chunk_tflops": max(chunk_rates),
        "chunk_end_s": at_s[1:],
        "products_per_chunk": per_chunk,
        "gpu_readings": sampler.summary(end - counted_s),
    }


def copied_gb_s(run_s: float) -> float:
    """The rate at which a copy within the GPU's memory reads and writes, over `run_s` seconds."""
    import torch

    source, target = (torch.empty(2**31, dtype=torch.uint8, device="cuda") for _ in range(2))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    copies = max(10, round(run_s * 4e12 / (2 * source.numel())))
    target.copy_(source)
    events[0].record()
    for _ in range(copies):
        target.copy_(source)
    events[1].record()
    events[1].synchronize()
    return float(2 * source.numel() * copies / events[0].elapsed_time(events[1]) / 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", choices=("bf16", "fp8"), default=["bf16", "fp8"])
    parser.add_argument("--size", type=int, default=8192)
    parser.add_argument("--warmup-s", type=float, default=3.0)
    parser.add_argument("--run-s", type=float, default=8.0)
    parser.add_argument("--counted-s", type=float, default=5.0, help="the last seconds of the run, that count")
    parser.add_argument("--output", type=Path, required=True, help="the result, JSON")
    arguments = parser.parse_args()
    if arguments.size < 16 or arguments.size % 16:
        parser.error(f"--size must be a multiple of 16, not {arguments.size}")
    if not (arguments.warmup_s >= 0 and 0 < arguments.counted_s <= arguments.run_s):
        parser.error("--warmup-s must not be negative, and --counted-s be above 0 and at most --run-s")
    common.check_device("cuda")

    rates = []
    for precision in arguments.precision:
        times = (arguments.warmup_s, arguments.run_s, arguments.counted_s)
        rate = sustained(precision, arguments.size, *times)
        readings = rate["gpu_readings"]
        beside = f" at {readings['power_w']:.0f} W, {readings['sm_clock_mhz']:.0f} MHz" if readings["samples"] else ""
        print(f"{precision}: {rate['sustained_tflops']:.1f} TFLOP/s over {rate['time_s']:.1f} s{beside}", flush=True)
        rates.append(rate)
    settings = {"size": arguments.size, "warmup_s": arguments.warmup_s, "run_s": arguments.run_s}
    result = {"benchmark": "matrix_rate", "settings": settings, **common.environment(("triton",)), "rates": rates}
    result["memory_gb_s"] = copied_gb_s(0.5)
    print(f"copies within the memory: {result['memory_gb_s']:.0f} GB/s", flush=True)
    common.write_result(arguments.output, result)


if __name__ == "__main__":
    main()
