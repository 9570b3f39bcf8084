"""Traces as PyTorch's profiler writes them, of events at times that a test knows."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Event = dict[str, Any]

GEMM = "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT"
ALL_GATHER = "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
COPY = "Memcpy DtoD (Device -> Device)"
ADD = "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>(int, at::native::X)"
ADAM = "void multi_tensor_apply_kernel<transformer_engine::multi_tensor_adam::AdamFunctorMaster<float>>(long)"


def kernel(name: str, begin: float, end: float, *, stream: int = 7, device: int = 0, launch: int = 0) -> Event:
    """A kernel, or a copy, on a GPU; times in microseconds. `launch` links it to a `launched` event."""
    category = "gpu_memcpy" if name.startswith("Memcpy") else "kernel"
    about = {"External id": 1, "device": device, "context": 1, "stream": stream, "correlation": launch}
    return {**_timed(category, name, begin, end), "pid": device, "tid": stream, "args": about}


def launched(link: int, moment: float) -> Event:
    """The CPU's call that launches the kernel of that link."""
    return {**_timed("cuda_runtime", "cudaLaunchKernel", moment, moment + 1), "args": {"correlation": link}}


def mark(name: str, begin: float, end: float) -> Event:
    """A range that the program named, on the CPU."""
    return _timed("user_annotation", name, begin, end)


def _timed(category: str, name: str, begin: float, end: float) -> Event:
    times = {"ts": begin, "dur": end - begin}
    return {"ph": "X", "cat": category, "name": name, "pid": 100, "tid": 1, **times, "args": {}}


def text(events: Sequence[Event]) -> str:
    """The file as the profiler lays it out: some lines an event."""
    head = {"deviceProperties": [{"id": 0, "name": "NVIDIA H200"}], "distributedInfo": {"backend": "nccl", "rank": 0}}
    parts = []
    for event in events:
        fields = {key: json.dumps(value) for key, value in event.items()}
        about = fields.pop("args").replace("{", "{\n      ").replace("}", "\n    }")
        timed = ", ".join(f'"{key}": {fields.pop(key)}' for key in ("ts", "dur"))
        rest = ", ".join(f'"{key}": {value}' for key, value in fields.items())
        parts.append(f'  {{\n    {rest},\n    {timed},\n    "args": {about}\n  }}')
    body = ",\n".join(parts)
    about = json.dumps(head)[1:-1]
    return f'{{\n  "schemaVersion": 1,\n  {about},\n  "traceEvents": [\n{body}\n  ],\n  "traceName": "t"\n}}'


def write(path: Path, events: Sequence[Event]) -> Path:
    """Writes a trace, gzipped where the name ends in .gz."""
    content = text(events).encode()
    path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)
    return path
