"""Matrix products beside what holds some of the GPU's SMs, and kernels that only move memory, for operators.py."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

# Holds its SMs for so many nanoseconds, as kernels of NCCL and of user buffers do while they transfer.
_HOLD = r"""
extern "C" __global__ void hold_sms(unsigned long long ns, int *sink) {
  extern __shared__ char all_of_it[];
  unsigned long long begin, now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(begin));
  do { __nanosleep(300); asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)); } while (now - begin < ns);
  if (ns == 1) sink[0] = all_of_it[0];
}"""
_SHARED_BYTES = 180 * 1024  # no second block fits on the SM
_PARTS = 4


class Holder:
    """Occupies SMs on a stream of its own."""

    def __init__(self) -> None:
        import cupy
        import torch

        self.kernel = cupy.RawModule(code=_HOLD).get_function("hold_sms")
        self.kernel.max_dynamic_shared_size_bytes = _SHARED_BYTES
        self.sink = cupy.zeros(4, dtype=cupy.int32)
        self.stream = torch.cuda.Stream(priority=-1)
        self.external = cupy.cuda.ExternalStream(self.stream.cuda_stream)

    def __call__(self, sms: int, time_ms: float) -> None:
        arguments = (int(time_ms * 1e6), self.sink)
        self.kernel((sms,), (256,), arguments, shared_mem=_SHARED_BYTES, stream=self.external)


class Product:
    """y = x w^T of random numbers, in bf16 or fp8."""

    def __init__(self, rows: int, inner: int, columns: int, precision: str, parts: int = 1) -> None:
        import torch

        self.one = torch.ones((), device="cuda")
        self.x = torch.randn(rows, inner, device="cuda").bfloat16()
        w = (torch.randn(columns, inner, device="cuda") * 0.02).bfloat16()
        if precision == "fp8":
            self.x, w = self.x.to(torch.float8_e4m3fn), (w * 50).to(torch.float8_e4m3fn)
        self.w, self.parts, self.precision = w, w.chunk(parts), precision
        self.y = torch.empty(rows, columns, device="cuda", dtype=torch.bfloat16)
        self.outs = [torch.empty(rows, columns // parts, device="cuda", dtype=torch.bfloat16) for _ in range(parts)]

    def _multiply(self, w: Any, out: Any) -> None:
        import torch

        if self.precision == "bf16":
            torch.mm(self.x, w.t(), out=out)
        else:
            scales = (self.one, self.one, None, None)
            torch.ops.aten._scaled_mm.out(self.x, w.t(), *scales, torch.bfloat16, True, out=out)

    def whole(self) -> None:
        self._multiply(self.w, self.y)

    def part(self, number: int) -> None:
        self._multiply(self.parts[number], self.outs[number])


def matrix_tflops(warm_s: float, counted_s: float, size: int = 8192) -> float:
    """Return the bf16 matrix rate of the last seconds of many, with the queue never empty."""
    import torch

    product, chunk = Product(size, size, size, "bf16"), 30
    product.whole()
    torch.cuda.synchronize()
    events, start = [], time.perf_counter()
    while time.perf_counter() - start < warm_s + counted_s:
        for _ in range(chunk):
            product.whole()
        events.append(torch.cuda.Event(enable_timing=True))
        events[-1].record()
        if len(events) > 2:
            events[-3].synchronize()
    torch.cuda.synchronize()
    ends_ms = [events[0].elapsed_time(event) for event in events]
    first = next(number for number, end in enumerate(ends_ms) if end > ends_ms[-1] - counted_s * 1e3)
    products = chunk * (len(ends_ms) - 1 - first)
    return float(2 * size**3 * products / (ends_ms[-1] - ends_ms[first]) / 1e9)


def timed_ms(
    runs: Mapping[Any, Callable[[], None]], busy: Callable[[], None], busy_ms: float, seconds: float, repeats: int = 4
) -> dict[Any, float]:
    """Return the median time of each run, in turn, each behind some ms of products that keep the GPU busy."""
    import torch

    between, times = max(2, int(12 / busy_ms)), {name: list[float]() for name in runs}
    pending: list[tuple[Any, Any, Any]] = []
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or pending:
        over = time.perf_counter() - start >= seconds
        for name, run in [] if over else runs.items():
            for _ in range(between):
                busy()
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            for _ in range(repeats):
                run()
            events[1].record()
            pending.append((name, *events))
        while len(pending) > (0 if over else 3):
            name, begin, end = pending.pop(0)
            end.synchronize()
            times[name].append(begin.elapsed_time(end) / repeats)
    return {name: statistics.median(values[len(values) // 4 :]) for name, values in times.items()}


def pipelined(
    rows: int, inner: int, columns: int, precision: str, sms: int, holder: Holder, held_ms: tuple[float, ...]
) -> list[float]:
    """Return how much longer a product with a pipelined reduce-scatter takes than the product alone, by held time.

    As Transformer Engine orders it: four parts of the output features on three streams, with SMs left free, and behind
    each a kernel that holds those SMs while it transfers. CUDA_DEVICE_MAX_CONNECTIONS=1 puts all into one queue.
    """
    import torch

    product, main = Product(rows, inner, columns, precision, _PARTS), torch.cuda.current_stream()
    streams = [torch.cuda.Stream() for _ in range(3)]

    def run(hold_ms: float) -> None:
        for stream in (*streams, holder.stream):
            stream.wait_stream(main)
        for number in range(_PARTS):
            stream = streams[number % 3]
            torch._C._set_sm_carveout_experimental(sms)
            with torch.cuda.stream(stream):
                product.part(number)
            torch._C._set_sm_carveout_experimental(None)
            holder.stream.wait_stream(stream)
            holder(32 if number == _PARTS - 1 else sms, hold_ms)
        for stream in (*streams, holder.stream):
            main.wait_stream(stream)

    runs: dict[Any, Callable[[], None]] = {ms: functools.partial(run, ms) for ms in held_ms}
    alone_ms = 2 * rows * inner * columns / (660e9 if precision == "bf16" else 1280e9)
    times = timed_ms({"whole": product.whole, **runs}, product.whole, alone_ms, 0.7)
    return [round(times[ms] / times["whole"], 4) for ms in held_ms]


def beside_held_sms(
    rows: int, inner: int, columns: int, precision: str, holder: Holder, sms: tuple[int, ...]
) -> list[float]:
    """Return how much slower a product is while a kernel holds so many SMs."""
    import torch

    product = Product(rows, inner, columns, precision)
    alone_ms = 2 * rows * inner * columns / (660e9 if precision == "bf16" else 1280e9)

    def held(number: int) -> Callable[[], None]:
        def run() -> None:
            main = torch.cuda.current_stream()
            holder.stream.wait_stream(main)
            if number:
                holder(number, alone_ms * 4)
            product.whole()
            product.whole()

        return run

    runs = {number: held(number) for number in (0, *sms)}
    times = timed_ms(runs, product.whole, alone_ms, 0.7, repeats=1)
    return [0.0, *(round(times[number] / times[0] - 1, 3) for number in sms)]


def memory_gb_s() -> dict[str, float]:
    """Return the rates of large kernels that only move memory, and of Adam with fp32 moments (28 bytes a parameter)."""
    import torch
    from transformer_engine.pytorch.optimizers import FusedAdam

    number = 2**30
    x = torch.empty(number, device="cuda", dtype=torch.bfloat16).normal_()
    y = torch.empty_like(x)

    def rate(run: Callable[[], object], moved_bytes: int) -> float:
        for _ in range(3):
            run()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        for _ in range(12):
            run()
        events[1].record()
        events[1].synchronize()
        return float(round(moved_bytes * 12 / events[0].elapsed_time(events[1]) / 1e6, 1))

    weight = torch.nn.Parameter(torch.randn(2**29, device="cuda"))
    weight.grad = torch.randn_like(weight)
    adam = FusedAdam([weight], lr=1e-4)
    return {
        "copy": rate(lambda: y.copy_(x), 4 * number),
        "fill": rate(lambda: y.zero_(), 2 * number),
        "add": rate(lambda: torch.add(x, y, out=y), 6 * number),
        "read": rate(lambda: x.view(-1, 1024).sum(), 2 * number),
        "adam": rate(adam.step, 28 * weight.numel()),
    }


def norm_ms(rows: int, hidden_size: int) -> float:
    """Return forward and backward time of an RMSNorm of bf16 rows, from a graph of several."""
    import torch
    import transformer_engine_torch as tex

    bf16, number = tex.DType.kBFloat16, 8
    inputs, gradients = (
        [torch.randn(rows, hidden_size, device="cuda").bfloat16() for _ in range(number)] for _ in range(2)
    )
    weight = torch.ones(hidden_size, device="cuda", dtype=torch.bfloat16)

    def forward(x: Any) -> Any:
        return tex.rmsnorm_fwd(x, weight, 1e-5, None, None, bf16, 0, False)

    deviations = [forward(x)[2] for x in inputs]

    def run() -> None:
        for x, gradient, deviation in zip(inputs, gradients, deviations):
            forward(x)
            tex.rmsnorm_bwd(gradient, x, deviation, weight, 0, False)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    for _ in range(3):
        graph.replay()
    events[0].record()
    for _ in range(20):
        graph.replay()
    events[1].record()
    events[1].synchronize()
    return float(events[0].elapsed_time(events[1]) / 20 / number)
