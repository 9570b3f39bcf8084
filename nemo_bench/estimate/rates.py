"""Rates of one GPU kind, measured by `benchmarks/operators.py`: what each part of a layer takes at a shard's shape."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from nemo_bench.config import TrainConfig
from nemo_bench.errors import BenchError

FOLDER = Path(__file__).parent / "rates"
_CONSTANTS: Any = OmegaConf.to_container(OmegaConf.load(Path(__file__).with_name("constants.yaml")))


def constant(name: str) -> Any:
    """Return a value of constants.yaml, which names each one's source."""
    return _CONSTANTS[name]["value"]


@dataclass(frozen=True)
class LayerShape:
    """A layer as one tensor- and context-parallel rank holds it."""

    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    tensor_parallel: int
    context_parallel: int
    tokens: int  # of a micro-batch, on this rank
    precision: str  # bf16, fp8 (delayed scaling), fp8_tensorwise (current scaling)
    sequences: int = 1  # of a micro-batch

    @property
    def number_format(self) -> str:
        """The key of tables that do not tell scalings apart."""
        return "bf16" if self.precision == "bf16" else "fp8"

    @property
    def qkv_width(self) -> float:
        """Columns of the shard's query, key and value projection."""
        head = self.hidden_size / self.num_attention_heads
        return (self.num_attention_heads + 2 * self.num_query_groups) * head / self.tensor_parallel

    @property
    def ffn_width(self) -> float:
        """Columns of the shard's MLP."""
        return self.ffn_hidden_size / self.tensor_parallel

    def product(self, name: str) -> tuple[float, float, float]:
        """Return rows, inner size and columns of a matrix product of the forward pass; its gradients permute them."""
        h = self.hidden_size
        inner, columns = {
            "qkv": (h, self.qkv_width),
            "proj": (h / self.tensor_parallel, h),
            "fc1": (h, 2 * self.ffn_width),
            "fc2": (self.ffn_width, h),
        }[name.split()[0]]
        return self.tokens, inner, columns

    @property
    def sizes(self) -> tuple[float, ...]:
        """What tells shapes apart where norms, activations and casts are concerned."""
        return self.hidden_size, self.ffn_width, self.tokens, 4**self.context_parallel

    @property
    def attention_work(self) -> float:
        """Query-key pairs of the shard's heads, up to a factor that all shapes share."""
        sequence = self.tokens * self.context_parallel / self.sequences
        return self.tokens * sequence * self.hidden_size / self.tensor_parallel

    def traffic_bytes(self, kernel: str, direction: str) -> float:
        """Return the bytes that a layer's kernels of this kind move; for `other`, what its time is scaled by."""
        s, h, f = self.tokens, self.hidden_size, self.ffn_width
        forward = direction == "forward"
        return {
            "norm": 2 * s * h * (4 if forward else 6),  # two norms
            "residual": 2 * s * h * 6,
            "activation": s * f * (6 if forward else 10),
            "cast_transpose": 4 * s * (h + f if forward else 2 * h + 2 * f + self.qkv_width),
            "transpose": 4 * s * h,
            "other": s * (h + self.qkv_width),
        }[kernel]


@dataclass(frozen=True)
class Pass:
    """Times of a layer's forward or backward pass (ms), at the matrix rate of an average GPU."""

    products_ms: dict[str, float]
    attention_ms: float
    kernels_ms: dict[str, float]


# A layer's passes by direction: forward, then backward.
Passes = dict[str, Pass]


@dataclass(frozen=True)
class Rates:
    """All tables of a GPU kind."""

    gpu: str
    layers: dict[LayerShape, Passes]
    tables: dict[str, Any]  # as in the file
    matrix_tflops: float  # sustained, bf16, of an average GPU
    # Of a GPU whose rates are another's but for the memory: what it streams, and how much slower it is at most.
    streaming_gb_s: float = math.inf
    most_slowdown: float = 1.0
    derived_from: str | None = None

    def layer(self, shape: LayerShape) -> Passes:
        """Return the times of a layer, measured or interpolated."""
        return self.layers.get(shape) or interpolated(self.layers, shape)

    def memory_slowdown(self, moved_bytes: float, time_ms: float) -> float:
        """Return how much slower a kernel is that moves so many bytes in so long on the GPU that was measured."""
        return min(self.most_slowdown, max(1.0, moved_bytes / time_ms / 1e6 / self.streaming_gb_s))

    def gb_s(self, name: str) -> float:
        """Return the rate of a large kernel that only moves memory: adam, fill, add, copy."""
        return float(self.tables["memory_gb_s"][name]) / self.most_slowdown


@functools.cache
def load_rates(gpu: str, matrix_tflops: float | None = None) -> Rates:
    """Return the rates of a GPU kind, at a matrix rate if it is given; BenchError where they were never measured."""
    path = FOLDER / f"{gpu}.json"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.json")))
        raise BenchError(
            f"gpu={gpu}: the rates of this GPU were never measured, so that its step time cannot be estimated\n"
            f"  valid: {known}\n"
            f"  to measure them, on one such GPU: python benchmarks/operators.py gpu={gpu}"
        )
    data = json.loads(path.read_text())
    if base := data.get("derived_from"):
        slowdown = data["measured_memory_gb_s"] / data["memory_gb_s"]
        memory = {"most_slowdown": slowdown, "streaming_gb_s": data["streaming_gb_s"]}
        return replace(load_rates(base, matrix_tflops), gpu=gpu, derived_from=base, **memory)
    fleet = matrix_tflops or constant("fleet_matrix_tflops").get(gpu) or data["layers"][0]["matrix_tflops"]
    return Rates(gpu, dict(_layer(entry, entry["matrix_tflops"] / fleet) for entry in data["layers"]), data, fleet)


def _layer(entry: Mapping[str, Any], to_fleet: float) -> tuple[LayerShape, Passes]:
    shape = LayerShape(**{name: entry[name] for name in LayerShape.__dataclass_fields__ if name != "sequences"})
    passes = {}
    for direction in ("forward", "backward"):
        times = entry[direction]
        products = {name: ms * to_fleet for name, ms in times["products_ms"].items()}
        passes[direction] = Pass(products, times["attention_ms"] * to_fleet, times["kernels_ms"])
    return shape, passes


def interpolated(layers: Mapping[LayerShape, Passes], shape: LayerShape) -> Passes:
    """Return the times of a shape that was not measured: products by their size, the rest scaled from the nearest."""
    same = {other: passes for other, passes in layers.items() if other.precision == shape.precision}
    near = min(same, key=lambda other: apart(other.sizes, shape.sizes))
    # Attention runs in bf16 in every precision here.
    attention = min(layers, key=lambda other: _attention_distance(other, shape))
    work, passes = shape.attention_work / attention.attention_work, {}
    for direction, nearest_pass in same[near].items():
        products = {name: _product_ms(same, shape, direction, name) for name in nearest_pass.products_ms}
        kernels = {
            kernel: ms * shape.traffic_bytes(kernel, direction) / near.traffic_bytes(kernel, direction)
            for kernel, ms in nearest_pass.kernels_ms.items()
        }
        passes[direction] = Pass(products, layers[attention][direction].attention_ms * work, kernels)
    return passes


def apart(sizes: Iterable[float], others: Iterable[float]) -> float:
    """Return how far sizes are from others, by their ratios."""
    return sum(abs(math.log(a / b)) for a, b in zip(sizes, others))


def _attention_distance(a: LayerShape, b: LayerShape) -> float:
    parts = 2 * abs(a.context_parallel - b.context_parallel)
    return apart([a.attention_work], [b.attention_work]) + parts + (a.precision != b.precision) * 0.1


def _product_ms(layers: Mapping[LayerShape, Passes], shape: LayerShape, direction: str, name: str) -> float:
    speeds: dict[float, list[float]] = {}
    for other, passes in layers.items():
        size = math.prod(other.product(name))
        speeds.setdefault(size, []).append(size / passes[direction].products_ms[name])
    points = [(math.log(size), sum(same) / len(same)) for size, same in sorted(speeds.items())]
    size = math.prod(shape.product(name))
    return size / piecewise(points, math.log(size))


def piecewise(points: Sequence[Sequence[float]], x: float) -> float:
    """Return the value at x of straight lines between points in the order of x; flat beyond the ends."""
    if x <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in pairwise(points):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return points[-1][1]


def nearest(entries: Iterable[Mapping[str, Any]], name: str, shape: LayerShape) -> Mapping[str, Any]:
    """Return the entry of a table of products that is nearest to the product `name` of a layer of this shape."""
    fitting = [entry for entry in entries if (entry["product"], entry["precision"]) == (name, shape.number_format)]
    return min(fitting, key=lambda entry: apart(entry["shape"], shape.product(name)))


def layer_shape(cfg: TrainConfig) -> LayerShape:
    """Return the shape of one rank's layers."""
    m, p = cfg.model, cfg.precision
    return LayerShape(
        m.hidden_size,
        m.ffn_hidden_size,
        m.num_attention_heads,
        m.num_query_groups,
        tensor_parallel=m.tensor_model_parallel_size,
        context_parallel=m.context_parallel_size,
        tokens=m.seq_length // m.context_parallel_size * m.micro_batch_size,
        precision="bf16" if p.fp8 is None else "fp8" if p.fp8_recipe == "delayed" else "fp8_tensorwise",
        sequences=m.micro_batch_size,
    )
