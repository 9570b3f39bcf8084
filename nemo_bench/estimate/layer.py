"""Times of a layer and of the head on one rank, from the rates of its GPU kind."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nemo_bench.config import TrainConfig
from nemo_bench.estimate.network import Network
from nemo_bench.estimate.rates import LayerRates, LayerShape, Pass, Rates, apart, constant, piecewise
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
    deviation = rates.tables["unsteadiness"]["bf16" if shape.precision == "bf16" else "fp8"]
    wait = lockstep_wait(m.tensor_model_parallel_size * m.context_parallel_size, lag, deviation)
    times: list[LayerTime] = []
    for direction, one_pass in layer.passes.items():
        products, attention = sum(one_pass.products_ms.values()), one_pass.attention_ms
        other = other_ms(cfg, rates, shape, one_pass, direction)
        again, tensor_parallel = 0.0, sum(added[direction].values())
        if direction == "backward":
            again = recomputed_ms(cfg, layer.passes["forward"], times[0])
            if m.recompute_granularity == "full":  # with its communication
                tensor_parallel += times[0].tensor_parallel
        exchange = _exchange_ms(shape, network, attention, direction)
        waiting = wait * (products + attention + other + again)
        times.append(LayerTime(products, attention, other, again, exchange, tensor_parallel, waiting))
    return times


def other_ms(cfg: TrainConfig, rates: Rates, shape: LayerShape, one_pass: Pass, direction: str) -> float:
    """Return norms, SwiGLU, casts, residuals and copies on this GPU's memory, less what sequence parallelism shares."""
    unknown = min(constant("other_kernels_slowdown"), rates.most_slowdown)
    scaled = {}
    for kernel, ms in one_pass.kernels_ms.items():
        known = rates.memory_slowdown(shape.traffic_bytes(kernel, direction), ms)
        scaled[kernel] = ms * (unknown if kernel == "other" else known)
    total = sum(scaled.values())
    if not cfg.model.sequence_parallel or shape.tensor_parallel == 1:
        return total
    shares = [(int(size), share) for size, share in rates.tables["norm_share"].items()]
    residual = scaled["residual"]
    if direction == "backward":  # the table's holds other sums too
        moved = shape.traffic_bytes("residual", direction)
        alone = moved / rates.tables["memory_gb_s"]["add"] / 1e6
        residual = alone * rates.memory_slowdown(moved, alone)
    shared = scaled["norm"] * (1 - piecewise(shares, shape.tensor_parallel))
    return float(total - shared - residual * (1 - 1 / shape.tensor_parallel))


def recomputed_ms(cfg: TrainConfig, rates: Pass, forward: LayerTime) -> float:
    """Return what the backward pass of an average layer computes again (ms), of the forward pass's times."""
    m = cfg.model
    if m.recompute_granularity == "full":
        chunks = m.pipeline_model_parallel_size * (m.virtual_pipeline_model_parallel_size or 1)
        share = min((m.recompute_num_layers or 1) * chunks / m.num_layers, 1) if m.recompute_method == "block" else 1
        return forward.kernels * share
    parts = {
        "core_attn": forward.attention,
        "mlp": rates.products_ms["fc1"] + rates.products_ms["fc2"] + rates.kernels_ms["activation"],
        "layernorm": rates.kernels_ms["norm"] / m.tensor_model_parallel_size,
    }
    return sum(parts[name] for name in m.recompute_modules) if m.recompute_granularity == "selective" else 0.0


def _exchange_ms(shape: LayerShape, network: Network, attention_ms: float, direction: str) -> float:
    """Return how much of the exchange of keys and values is not hidden behind attention.

    A ring of CP ranks passes them on CP-1 times, with their gradients in the backward pass, each behind a CP-th of
    attention.
    """
    ranks = shape.context_parallel
    width = 2 * shape.num_query_groups / shape.num_attention_heads * shape.hidden_size / shape.tensor_parallel
    moved = shape.tokens * width * 2 * (1 if direction == "forward" else 2)
    # The ring leaves the NVLink domain where the group does.
    inside = shape.tensor_parallel * ranks <= network.domain_gpus
    sent = network.p2p_ms(moved, shape.tensor_parallel if inside else network.domain_gpus)
    return max(0.0, sent - attention_ms / ranks) * (ranks - 1)


def head_time(cfg: TrainConfig, rates: Rates, network: Network, tokens: int) -> HeadTime:
    """Return the times of the model's ends, scaled by product size from the nearest that was measured."""
    m, tp = cfg.model, cfg.model.tensor_model_parallel_size
    sizes = {"tokens": tokens, "hidden_size": m.hidden_size, "vocabulary": cfg.padded_vocab_size / tp}
    near = min(rates.tables["heads"], key=lambda entry: apart(sizes.values(), [entry[name] for name in sizes]))
    rows = tokens / near["tokens"] * m.hidden_size / near["hidden_size"]
    product = rows * sizes["vocabulary"] / near["vocabulary"]
    to_fleet = product * near["matrix_tflops"] / rates.matrix_tflops
    speed = constant("nvlink_all_gather_gb_s") * network.nvlink_factor * 1e6
    exchange = constant("nvlink_latency_ms") + tokens * m.hidden_size * 2 * (tp - 1) / tp / speed
    return HeadTime(
        embedding_forward=near["embedding_forward_ms"] * rows * rates.most_slowdown,
        # Its gradient adds to a table of the vocabulary's size as well as to the tokens' rows.
        embedding_backward=near["embedding_backward_ms"] * math.sqrt(product) * rates.most_slowdown,
        forward=near["forward_ms"] * to_fleet,
        backward=near["backward_ms"] * to_fleet,
        weight_gradient=near["weight_gradient_ms"] * to_fleet,
        exchange=exchange if tp > 1 else 0.0,
    )
