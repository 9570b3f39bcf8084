"""Times of a layer and of the head on one rank, from the rates of its GPU kind."""

from __future__ import annotations

import math

from nemo_bench.config import TrainConfig
from nemo_bench.estimate.network import Network
from nemo_bench.estimate.rates import LayerShape, Pass, Rates, apart, constant, piecewise
from nemo_bench.estimate.tensor_parallel import TensorParallel, lockstep_wait

# Parts of a layer's time: what the GPU's own speed decides, and the rest.
KERNELS = ("matrix products", "attention", "other kernels", "recomputation")
COMMUNICATION = ("tensor parallel", "waits in lockstep", "context parallel")
_OUTPUT = ("forward", "backward", "weight_gradient")


def layer_times(
    cfg: TrainConfig, rates: Rates, shape: LayerShape, network: Network, lag: float
) -> list[dict[str, float]]:
    """Return the parts (KERNELS, COMMUNICATION) of a layer's forward and backward pass of one micro-batch (ms).

    `lag`: how much slower the slowest GPU is, as a share.
    """
    passes, again = rates.layer(shape), cfg.model.recompute_granularity == "full"
    added, times = TensorParallel(cfg, rates, shape, passes, network).added_ms(), list[dict[str, float]]()
    deviation = rates.tables["unsteadiness"][shape.number_format]
    wait = lockstep_wait(shape.tensor_parallel * shape.context_parallel, lag, deviation)
    for direction, own in passes.items():
        time = {
            "matrix products": sum(own.products_ms.values()),
            "attention": own.attention_ms,
            "other kernels": _other_ms(cfg, rates, shape, own, direction),
            "recomputation": _recomputed_ms(cfg, passes["forward"], times[0]) if times else 0.0,
            "tensor parallel": added[direction] + (times[0]["tensor parallel"] if times and again else 0.0),
            "context parallel": _exchange_ms(shape, network, own.attention_ms, direction),
        }
        time["waits in lockstep"] = wait * kernels_ms(time)
        times.append(time)
    return times


def kernels_ms(time: dict[str, float]) -> float:
    """Return the part of a layer's time that the GPU's own speed decides."""
    return sum(time[name] for name in KERNELS)


def communication_ms(time: dict[str, float]) -> float:
    """Return the rest."""
    return sum(time[name] for name in COMMUNICATION)


def _other_ms(cfg: TrainConfig, rates: Rates, shape: LayerShape, own: Pass, direction: str) -> float:
    """Return norms, SwiGLU, casts, residuals and copies on this GPU's memory, less what sequence parallelism shares."""
    unknown = min(constant("other_kernels_slowdown"), rates.most_slowdown)
    scaled = {}
    for kernel, ms in own.kernels_ms.items():
        known = rates.memory_slowdown(shape.traffic_bytes(kernel, direction), ms)
        scaled[kernel] = ms * (unknown if kernel == "other" else known)
    total = sum(scaled.values())
    if not cfg.model.sequence_parallel or shape.tensor_parallel == 1:
        return total
    residual = scaled["residual"]
    if direction == "backward":  # the table's holds other sums too
        moved = shape.traffic_bytes("residual", direction)
        alone = moved / rates.tables["memory_gb_s"]["add"] / 1e6
        residual = alone * rates.memory_slowdown(moved, alone)
    shares = [(int(size), share) for size, share in rates.tables["norm_share"].items()]
    shared = scaled["norm"] * (1 - piecewise(shares, shape.tensor_parallel))
    return float(total - shared - residual * (1 - 1 / shape.tensor_parallel))


def _recomputed_ms(cfg: TrainConfig, rates: Pass, forward: dict[str, float]) -> float:
    """Return what the backward pass of an average layer computes again, of the forward pass's times."""
    m = cfg.model
    if m.recompute_granularity == "full":
        chunks = m.pipeline_model_parallel_size * (m.virtual_pipeline_model_parallel_size or 1)
        share = min((m.recompute_num_layers or 1) * chunks / m.num_layers, 1) if m.recompute_method == "block" else 1
        return kernels_ms(forward) * share
    parts = {
        "core_attn": forward["attention"],
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


def head_times(cfg: TrainConfig, rates: Rates, network: Network, tokens: int) -> dict[str, float]:
    """Return the times of a micro-batch at the model's ends (ms), scaled by product size from the nearest measured.

    `forward`, `backward`: final norm, output layer, loss; `weight_gradient`: part of `backward`; `exchange`: the
    reduce-scatter behind the embedding, its gradient's gather, and the gather before the output layer, each once.
    """
    m, tp = cfg.model, cfg.model.tensor_model_parallel_size
    sizes = {"tokens": tokens, "hidden_size": m.hidden_size, "vocabulary": cfg.padded_vocab_size / tp}
    near = min(rates.tables["heads"], key=lambda entry: apart(sizes.values(), [entry[name] for name in sizes]))
    rows = tokens / near["tokens"] * m.hidden_size / near["hidden_size"]
    product = rows * sizes["vocabulary"] / near["vocabulary"]
    speed = constant("nvlink_all_gather_gb_s") * network.nvlink_factor * 1e6
    exchange = constant("nvlink_latency_ms") + tokens * m.hidden_size * 2 * (tp - 1) / tp / speed
    scales = {name: product * near["matrix_tflops"] / rates.matrix_tflops for name in _OUTPUT}
    scales["embedding_forward"] = rows * rates.most_slowdown
    # Its gradient adds to a table of the vocabulary's size as well as to the tokens' rows.
    scales["embedding_backward"] = math.sqrt(product) * rates.most_slowdown
    times = {name: near[f"{name}_ms"] * scale for name, scale in scales.items()}
    return times | {"exchange": exchange if tp > 1 else 0.0}
