"""Times of a layer and of the head on one rank, from the rates of its GPU kind."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nemo_bench.config import TrainConfig
from nemo_bench.estimate.network import Network
from nemo_bench.estimate.rates import DIRECTIONS, LayerRates, LayerShape, Pass, Rates, constant, piecewise
from nemo_bench.estimate.tensor_parallel import TensorParallel, lockstep_wait


@dataclass(frozen=True)
class LayerTime:
    """One direction of a layer, one micro-batch (ms)."""

    products: float
    attention: float
    other: float
    recomputed: float  # of the forward pass, in the backward pass
    context_parallel: float  # exchange that attention does not hide
    tensor_parallel: float
    wait: float  # for other ranks in lockstep

    @property
    def kernels(self) -> float:
        """What the GPU's own speed decides."""
        return self.products + self.attention + self.other + self.recomputed

    @property
    def communication(self) -> float:
        return self.context_parallel + self.tensor_parallel + self.wait


@dataclass(frozen=True)
class HeadTime:
    """Embedding, and final norm, output layer and loss, of one micro-batch (ms)."""

    embedding_forward: float
    embedding_backward: float
    forward: float
    backward: float
    weight_gradient: float  # part of `backward`
    exchange: float  # reduce-scatter behind the embedding, gather before the output layer; each direction, each once


def layer_times(cfg: TrainConfig, rates: Rates, layer: LayerRates, network: Network, lag: float) -> list[LayerTime]:
    """Return the forward and the backward pass of a layer; `lag`: how much slower the slowest GPU is."""
    m, shape = cfg.model, layer.shape
    added = TensorParallel(cfg, rates, layer, network).added_ms()
    precision = "bf16" if shape.precision == "bf16" else "fp8"
    ranks = m.tensor_model_parallel_size * m.context_parallel_size
    wait = lockstep_wait(ranks, lag, rates.tables["unsteadiness"][precision])
    recomputed = recomputed_ms(cfg, rates, layer)
    times = []
    for direction in DIRECTIONS:
        one_pass = layer.of(direction)
        products, other = sum(one_pass.products_ms.values()), other_ms(cfg, rates, shape, one_pass, direction)
        again = recomputed if direction == "backward" else 0.0
        tensor_parallel = sum(added[direction].values())
        if again and m.recompute_granularity == "full":  # with its communication
            tensor_parallel += sum(added["forward"].values())
        exchange = _exchange_ms(cfg, shape, network, one_pass.attention_ms, direction)
        waiting = wait * (products + one_pass.attention_ms + other + again)
        times.append(LayerTime(products, one_pass.attention_ms, other, again, exchange, tensor_parallel, waiting))
    return times


def other_ms(cfg: TrainConfig, rates: Rates, shape: LayerShape, one_pass: Pass, direction: str) -> float:
    """Return norms, SwiGLU, casts, residuals and copies on this GPU's memory, less what sequence parallelism shares."""
    scaled = {}
    for kernel, ms in one_pass.kernels_ms.items():
        if kernel == "other":
            slowdown = min(constant("other_kernels_slowdown"), rates.most_slowdown)
        else:
            slowdown = rates.memory_slowdown(shape.traffic_bytes(kernel, direction), ms)
        scaled[kernel] = ms * slowdown
    total = float(sum(scaled.values()))
    if not cfg.model.sequence_parallel or shape.tensor_parallel == 1:
        return total
    sizes = [(int(size), share) for size, share in rates.tables["norm_share"].items()]
    norm_share = piecewise(sizes, shape.tensor_parallel)
    residual = scaled["residual"]
    if direction == "backward":  # the table's holds other sums too
        moved = shape.traffic_bytes("residual", direction)
        alone = moved / rates.tables["memory_gb_s"]["add"] / 1e6
        residual = alone * rates.memory_slowdown(moved, alone)
    return float(total - scaled["norm"] * (1 - norm_share) - residual * (1 - 1 / shape.tensor_parallel))


def recomputed_ms(cfg: TrainConfig, rates: Rates, layer: LayerRates) -> float:
    """Return what the backward pass of an average layer computes again (ms)."""
    m, forward = cfg.model, layer.forward
    if m.recompute_granularity == "full":
        other = other_ms(cfg, rates, layer.shape, forward, "forward")
        chunks = m.pipeline_model_parallel_size * (m.virtual_pipeline_model_parallel_size or 1)
        share = min((m.recompute_num_layers or 1) * chunks / m.num_layers, 1) if m.recompute_method == "block" else 1
        return (sum(forward.products_ms.values()) + forward.attention_ms + other) * share
    if m.recompute_granularity != "selective":
        return 0.0
    parts = {
        "core_attn": forward.attention_ms,
        "mlp": forward.products_ms["fc1"] + forward.products_ms["fc2"] + forward.kernels_ms["activation"],
        "layernorm": forward.kernels_ms["norm"] / layer.shape.tensor_parallel,
    }
    return sum(parts[module] for module in m.recompute_modules)


def _exchange_ms(cfg: TrainConfig, shape: LayerShape, network: Network, attention_ms: float, direction: str) -> float:
    """Return how much of the exchange of keys and values is not hidden behind attention.

    A ring of CP ranks passes them on CP-1 times, with their gradients in the backward pass, each behind a CP-th of
    attention.
    """
    ranks = shape.context_parallel
    if ranks == 1:
        return 0.0
    width = 2 * shape.num_query_groups / shape.num_attention_heads * shape.hidden_size / shape.tensor_parallel
    moved = shape.tokens * width * 2 * (1 if direction == "forward" else 2)
    stride = shape.tensor_parallel
    # The ring leaves the NVLink domain where the group does.
    sent = network.p2p_ms(moved, stride if stride * ranks <= network.domain_gpus else network.domain_gpus)
    return max(0.0, sent - attention_ms / ranks) * (ranks - 1)


def head_time(cfg: TrainConfig, rates: Rates, network: Network, tokens: int) -> HeadTime:
    """Return the times of the model's ends, scaled by product size from the nearest that was measured."""
    m = cfg.model
    vocabulary = cfg.padded_vocab_size / m.tensor_model_parallel_size

    def distance(entry: dict[str, float]) -> float:
        sizes = ((tokens, "tokens"), (m.hidden_size, "hidden_size"), (vocabulary, "vocabulary"))
        return sum(abs(math.log(size / entry[name])) for size, name in sizes)

    near = min(rates.tables["heads"], key=distance)
    to_fleet = near["matrix_tflops"] / rates.matrix_tflops
    rows, width = tokens / near["tokens"], m.hidden_size / near["hidden_size"]
    product = rows * width * vocabulary / near["vocabulary"]
    exchange = 0.0
    if m.tensor_model_parallel_size > 1:
        size = tokens * m.hidden_size * 2 * (m.tensor_model_parallel_size - 1) / m.tensor_model_parallel_size
        speed = constant("nvlink_all_gather_gb_s") * network.nvlink_factor * 1e6
        exchange = constant("nvlink_latency_ms") + size / speed
    return HeadTime(
        embedding_forward=near["embedding_forward_ms"] * rows * width * rates.most_slowdown,
        # Its gradient adds to a table of the vocabulary's size as well as to the tokens' rows.
        embedding_backward=near["embedding_backward_ms"] * math.sqrt(product) * rates.most_slowdown,
        forward=near["forward_ms"] * product * to_fleet,
        backward=near["backward_ms"] * product * to_fleet,
        weight_gradient=near["weight_gradient_ms"] * product * to_fleet,
        exchange=exchange,
    )
