"""What a trace of a layer holds, for operators.py: its products in order, attention, and the other kernels by kind."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_bench.estimate.rates import LayerShape
from nemo_bench.report.kernel_classes import ATTENTION, GEMM, kernel_class

PRODUCTS = {
    "forward": ("qkv", "proj", "fc1", "fc2"),
    "backward": tuple(f"{name} {kind}" for name in ("fc2", "fc1", "proj", "qkv") for kind in ("dgrad", "wgrad")),
}
# The rest, by what its traffic is: see LayerShape.traffic_bytes.
_KERNELS = {
    "norm": ("rmsnorm",),
    "residual": ("fused_add_0", "CUDAFunctor_add"),
    "activation": ("silu", "gated_act"),
    "cast_transpose": ("cast_transpose",),
    "transpose": ("transpose_optimized",),
}


@dataclass(frozen=True)
class Case(LayerShape):
    """A layer as one rank holds it, of one sequence."""

    layers: int = 4  # recorded at once

    @property
    def vocabulary(self) -> int:
        """This rank's rows of Llama 3.1's padded vocabulary."""
        return -(-128256 // (128 * self.tensor_parallel)) * 128

    def entry(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("layers", "sequences")}


def traced(activities: Sequence[Any], run: Callable[[], object]) -> dict[str, Any]:
    """Return torch's trace of a function, as its JSON reads."""
    import torch
    from torch.profiler import profile

    with profile(activities=activities) as profiler:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        content = json.loads(path.read_text())
    assert isinstance(content, dict)
    return content


def kernels_of(trace: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the kernels and copies of a trace in the order in which they began."""
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    return sorted((event for event in trace["traceEvents"] if event.get("cat") in kinds), key=lambda e: e["ts"])


def layer_entry(case: Case, trace: dict[str, Any], times_ms: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Return what a table of layers holds of a case, from a trace of replays and their times in a sustained state.

    Raises:
        ValueError: the trace does not hold the products of a layer.
    """
    launches = sorted(
        (event for event in trace["traceEvents"] if "GraphLaunch" in event.get("name", "")), key=lambda e: e["ts"]
    )
    direction_of = {
        event["args"]["correlation"]: ("forward", "backward")[number % 2] for number, event in enumerate(launches)
    }
    counted = {event["args"]["correlation"] for event in launches[-8:]}
    entry = case.entry()
    for column, direction in enumerate(PRODUCTS):
        products: dict[str, list[float]] = {}
        sums = {"attention": 0.0, **dict.fromkeys([*_KERNELS, "other"], 0.0)}
        place = 0
        for event in kernels_of(trace):
            launch = event["args"].get("correlation")
            if launch not in counted or direction_of[launch] != direction:
                continue
            ms, kind = event["dur"] / 1e3, kernel_class(event["name"])
            if kind == GEMM:
                names = PRODUCTS[direction]
                products.setdefault(names[place % len(names)], []).append(ms)
                place += 1
            else:
                sums["attention" if kind == ATTENTION else _kernel_kind(event["name"])] += ms
        replays = sum(direction_of[launch] == direction for launch in counted)
        if place != replays * case.layers * len(PRODUCTS[direction]):
            raise ValueError(f"{place} products in {replays} replays of {case.layers} layers, {direction}")
        passes = replays * case.layers
        sums = {name: total / passes for name, total in sums.items()}
        means = {name: statistics.fmean(times) for name, times in products.items()}
        # The model's final norm is recorded with its layers, half of what a layer has.
        final_norm = sums["norm"] * 0.5 / (case.layers + 0.5)
        sums["norm"] -= final_norm
        whole = statistics.median(row[column] for row in times_ms)
        scale = whole / (sum(means.values()) + sum(sums.values()) + final_norm)
        entry[direction] = {
            "products_ms": {name: round(ms * scale, 4) for name, ms in means.items()},
            "attention_ms": round(sums.pop("attention") * scale, 4),
            "kernels_ms": {name: round(ms * scale, 4) for name, ms in sums.items() if ms},
        }
    return entry


def _kernel_kind(name: str) -> str:
    if "finalize" in name:
        return "other"
    return next((kind for kind, parts in _KERNELS.items() if any(part in name for part in parts)), "other")
