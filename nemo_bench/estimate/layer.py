"""Times of a layer and of the head on one rank, from the rates of its GPU kind.

What tensor parallelism adds was measured on a few GPUs, or played on one; docs/estimate.md says how.
"""

from __future__ import annotations

import functools
import math
from statistics import NormalDist

from nemo_bench.config import TrainConfig
from nemo_bench.estimate.network import Network
from nemo_bench.estimate.rates import Rates, apart, constant, layer_shape, nearest, piecewise

# Parts of a layer's time: what the GPU's own speed decides, and the rest.
KERNELS = ("matrix products", "attention", "other kernels", "recomputation")
COMMUNICATION = ("tensor parallel", "waits in lockstep", "context parallel")
# Products of the backward pass beside which a collective runs in bulk, and the SMs that NVIDIA's tables give it.
_BULK_SMS = {"fc1 dgrad": 2, "fc1 wgrad": 4, "qkv dgrad": 4, "qkv wgrad": 24}
_PIPELINE_PARTS = 4


def pass_ms(time: dict[str, float], speed: float = 1.0) -> float:
    """Return the time of a pass whose kernels take `speed` times as long."""
    return sum(time[name] for name in KERNELS) * speed + sum(time[name] for name in COMMUNICATION)


class Layer:
    """A layer of a point on one rank."""

    def __init__(self, cfg: TrainConfig, rates: Rates, network: Network) -> None:
        self.model, self.rates, self.network, self.shape = cfg.model, rates, network, layer_shape(cfg)
        self.passes = rates.layer(self.shape)
        self.products_ms = self.passes["forward"].products_ms | self.passes["backward"].products_ms
        size = self.shape.tensor_parallel
        # What a rank sends or receives of a micro-batch's activations between the layers, in bf16.
        self.moved_bytes = self.shape.tokens * self.shape.hidden_size * 2 * (size - 1) / size

    def times(self, lag: float) -> list[dict[str, float]]:
        """Return the parts (KERNELS, COMMUNICATION) of the forward and the backward pass of one micro-batch (ms).

        `lag`: how much slower the slowest GPU is, as a share.
        """
        times: list[dict[str, float]] = []
        deviation = self.rates.tables["unsteadiness"][self.shape.number_format]
        wait = lockstep_wait(self.shape.tensor_parallel * self.shape.context_parallel, lag, deviation)
        for (direction, own), added in zip(self.passes.items(), self._tensor_parallel_ms()):
            kernels = {
                "matrix products": sum(own.products_ms.values()),
                "attention": own.attention_ms,
                "other kernels": self._other_ms(direction),
                "recomputation": self._recomputed_ms(times[0]) if times else 0.0,
            }
            communication = {
                "tensor parallel": added,
                "waits in lockstep": wait * sum(kernels.values()),
                "context parallel": self._exchange_ms(direction),
            }
            if times and self.model.recompute_granularity == "full":
                communication["tensor parallel"] += times[0]["tensor parallel"]
            times.append(kernels | communication)
        return times

    def _other_ms(self, direction: str) -> float:
        """Return norms, SwiGLU, casts, residuals and copies, less what sequence parallelism shares."""
        rates, shape, scaled = self.rates, self.shape, {}
        unknown = min(constant("other_kernels_slowdown"), rates.most_slowdown)
        for kernel, ms in self.passes[direction].kernels_ms.items():
            known = rates.memory_slowdown(shape.traffic_bytes(kernel, direction), ms)
            scaled[kernel] = ms * (unknown if kernel == "other" else known)
        total = sum(scaled.values())
        if not self.model.sequence_parallel or shape.tensor_parallel == 1:
            return total
        residual = scaled["residual"]
        if direction == "backward":  # the table's holds other sums too
            moved = shape.traffic_bytes("residual", direction)
            alone = moved / rates.tables["memory_gb_s"]["add"] / 1e6
            residual = alone * rates.memory_slowdown(moved, alone)
        shares = [(int(size), share) for size, share in rates.tables["norm_share"].items()]
        shared = scaled["norm"] * (1 - piecewise(shares, shape.tensor_parallel))
        return float(total - shared - residual * (1 - 1 / shape.tensor_parallel))

    def _recomputed_ms(self, forward: dict[str, float]) -> float:
        """Return what the backward pass of an average layer computes again, of the forward pass's times."""
        m, rates = self.model, self.passes["forward"]
        if m.recompute_granularity == "full":
            chunks = m.pipeline_model_parallel_size * (m.virtual_pipeline_model_parallel_size or 1)
            block = min((m.recompute_num_layers or 1) * chunks / m.num_layers, 1)
            return sum(forward[name] for name in KERNELS) * (block if m.recompute_method == "block" else 1)
        parts = {
            "core_attn": forward["attention"],
            "mlp": rates.products_ms["fc1"] + rates.products_ms["fc2"] + rates.kernels_ms["activation"],
            "layernorm": rates.kernels_ms["norm"] / m.tensor_model_parallel_size,
        }
        return sum(parts[name] for name in m.recompute_modules) if m.recompute_granularity == "selective" else 0.0

    def _exchange_ms(self, direction: str) -> float:
        """Return what the exchange of keys and values adds: it slows attention, and what attention does not hide."""
        # A ring passes them on CP-1 times, with their gradients in the backward pass, each behind a CP-th of attention.
        shape, ranks, domain = self.shape, self.shape.context_parallel, self.network.domain_gpus
        width = 2 * shape.num_query_groups / shape.num_attention_heads * shape.hidden_size / shape.tensor_parallel
        moved = shape.tokens * width * 2 * (1 if direction == "forward" else 2)
        # The ring leaves the NVLink domain where the group does.
        sent = self.network.p2p_ms(moved, shape.tensor_parallel if shape.tensor_parallel * ranks <= domain else domain)
        one = self.passes[direction].attention_ms / ranks
        return float(one * constant("exchange_slowdown") + max(0.0, sent - one)) * (ranks - 1)

    def _tensor_parallel_ms(self) -> tuple[float, float]:
        """Return how much longer the forward and the backward pass take."""
        if self.shape.tensor_parallel == 1:
            return 0.0, 0.0
        if self.model.sequence_parallel and self.model.tp_comm_overlap:
            return self._user_buffers_ms()
        gather, scatter = self._nccl_ms("all_gather"), self._nccl_ms("reduce_scatter")
        if not self.model.sequence_parallel:
            all_reduce = gather + scatter
            return 2 * all_reduce, self._beside("fc1 wgrad", all_reduce) + self._beside("qkv wgrad", all_reduce)
        if self.shape.precision != "bf16":  # gathered in the format that products read
            gather = self._nccl_ms("all_gather", self.moved_bytes / 2)
        # NCCL between the products, but for those of the backward pass that run beside products.
        beside = [self._beside(f"{op} dgrad", gather) + self._beside(f"{op} wgrad", scatter) for op in ("fc1", "qkv")]
        return 2 * gather + 2 * scatter, 2 * gather + sum(beside)

    def _nccl_ms(self, collective: str, moved_bytes: float | None = None) -> float:
        by_ranks = self.rates.tables["nccl"][collective]
        # Of the largest group that was measured, up to this one.
        measured = by_ranks[str(max(ranks for ranks in map(int, by_ranks) if ranks <= self.shape.tensor_parallel))]
        speed = measured["gb_s"] * self.network.nvlink_factor * 1e6
        return float(measured["latency_ms"] + (moved_bytes or self.moved_bytes) / speed)

    def _beside(self, op: str, collective_ms: float) -> float:
        """Return how much longer a product and a collective take together than the product alone."""
        alone = self.products_ms[op]
        held = nearest(self.rates.tables["beside_held_sms"], op, self.shape)
        slowdown = piecewise(list(zip(held["sms"], held["slowdown"])), constant("gather_sms")["tensor_parallel"])
        return max(alone * (1 + slowdown * min(1.0, collective_ms / alone)), collective_ms) - alone

    def _user_buffers_ms(self) -> tuple[float, float]:
        """Transformer Engine's user buffers: rings of copies, pipelined reduce-scatters, and bulk collectives."""
        tables, shape, products = self.rates.tables["user_buffers"], self.shape, self.products_ms
        speed = constant("nvlink_reduce_scatter_gb_s") * self.network.nvlink_factor * 1e6
        held_ms = constant("nvlink_latency_ms") / 2 + self.moved_bytes / _PIPELINE_PARTS / speed

        def ring(op: str) -> float:
            return float(products[op] * (nearest(tables["ring"], op, shape)["ratio"] - 1))

        def pipelined(op: str) -> float:
            entry = nearest(tables["pipeline"], op, shape)
            return products[op] * (piecewise(list(zip(entry["held_ms"], entry["ratio"])), held_ms) - 1)

        def bulk(op: str, sms: int) -> float:
            entry = nearest([entry for entry in tables["bulk"] if entry["sms"] == sms], op, shape)
            # As long as the collective lasts; the table's moved 3/4 of 4,096 tokens of hidden size 8,192.
            return float(entry["added_ms"] * self.moved_bytes / (4096 * 8192 * 2 * 3 / 4))

        amax = 2 * constant("tensorwise_amax_ms") if shape.precision == "fp8_tensorwise" else 0.0
        bulks = sum(bulk(op, sms) for op, sms in _BULK_SMS.items())
        forward = ring("qkv") + pipelined("proj") + ring("fc1") + pipelined("fc2")
        return forward + amax, ring("fc2 dgrad") + ring("proj dgrad") + bulks + amax


def slowest_of(number: int) -> float:
    """Return the expected largest of so many standard normal numbers (Blom's approximation)."""
    return NormalDist().inv_cdf((number - 0.375) / (number + 0.25)) if number > 1 else 0.0


@functools.lru_cache(maxsize=256)
def lockstep_wait(ranks: int, slowest_lag: float, deviation: float) -> float:
    """Return how much longer a layer takes where `ranks` wait for each other, as a share of its time."""
    # Each rank's time is normal with this deviation (power control at its limit); one lags behind by `slowest_lag`,
    # which is not counted. The mean of the largest, integrated.
    if ranks == 1:
        return 0.0
    normal, parts = NormalDist(), 200
    low, mean = -6 * deviation, slowest_lag + 7 * deviation
    width = (mean - low) / parts
    for part in range(parts):
        x = low + (part + 0.5) * width
        mean -= width * normal.cdf((x - slowest_lag) / deviation) * normal.cdf(x / deviation) ** (ranks - 1)
    return mean - slowest_lag


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
    passes = ("forward", "backward", "weight_gradient")
    scales = {name: product * near["matrix_tflops"] / rates.matrix_tflops for name in passes}
    scales["embedding_forward"] = rows * rates.most_slowdown
    # Its gradient adds to a table of the vocabulary's size as well as to the tokens' rows.
    scales["embedding_backward"] = math.sqrt(product) * rates.most_slowdown
    times = {name: near[f"{name}_ms"] * scale for name, scale in scales.items()}
    return times | {"exchange": exchange if tp > 1 else 0.0}
