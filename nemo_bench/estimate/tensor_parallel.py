"""What tensor parallelism adds to a layer: gathers, scatters, user buffers, and waits of ranks in lockstep.

Each was measured on two GPUs, or played on one; docs/estimate.md says how.
"""

from __future__ import annotations

import functools
from statistics import NormalDist

from nemo_bench.config import TrainConfig
from nemo_bench.estimate.network import Network
from nemo_bench.estimate.rates import LayerShape, Passes, Rates, constant, nearest, piecewise

# Products of the backward pass beside which a collective runs in bulk, and the SMs that NVIDIA's tables give it.
_BULK_SMS = {"fc1 dgrad": 2, "fc1 wgrad": 4, "qkv dgrad": 4, "qkv wgrad": 24}
_PIPELINE_PARTS = 4


class TensorParallel:
    """A layer's tensor-parallel communication."""

    def __init__(self, cfg: TrainConfig, rates: Rates, shape: LayerShape, passes: Passes, network: Network) -> None:
        self.model, self.tables, self.shape, self.network = cfg.model, rates.tables, shape, network
        self.products_ms = passes["forward"].products_ms | passes["backward"].products_ms
        size = shape.tensor_parallel
        # What a rank sends or receives of a micro-batch's activations between the layers, in bf16.
        self.moved_bytes = shape.tokens * shape.hidden_size * 2 * (size - 1) / size

    def added_ms(self) -> dict[str, float]:
        """Return how much longer each direction takes (ms)."""
        if self.shape.tensor_parallel == 1:
            return {"forward": 0.0, "backward": 0.0}
        if self.model.sequence_parallel and self.model.tp_comm_overlap:
            return self._user_buffers()
        gather, scatter = self._nccl_ms("all_gather"), self._nccl_ms("reduce_scatter")
        if not self.model.sequence_parallel:
            beside = [self._beside(op, gather + scatter) for op in ("fc1 wgrad", "qkv wgrad")]
            return {"forward": 2 * (gather + scatter), "backward": sum(beside)}
        if self.shape.precision != "bf16":  # gathered in the format that products read
            gather = self._nccl_ms("all_gather", self.moved_bytes / 2)
        # NCCL between the products, but for those of the backward pass that run beside products.
        beside = [self._beside(f"{op} dgrad", gather) + self._beside(f"{op} wgrad", scatter) for op in ("fc1", "qkv")]
        return {"forward": 2 * gather + 2 * scatter, "backward": 2 * gather + sum(beside)}

    def _nccl_ms(self, collective: str, moved_bytes: float = 0.0) -> float:
        measured = self.tables["nccl"][collective]
        speed = measured["gb_s"] * self.network.nvlink_factor * 1e6
        return float(measured["latency_ms"] + (moved_bytes or self.moved_bytes) / speed)

    def _beside(self, op: str, collective_ms: float) -> float:
        """Return how much longer a product and a collective take together than the product alone."""
        alone = self.products_ms[op]
        held = nearest(self.tables["beside_held_sms"], op, self.shape)
        slowdown = piecewise(list(zip(held["sms"], held["slowdown"])), constant("gather_sms")["tensor_parallel"])
        return max(alone * (1 + slowdown * min(1.0, collective_ms / alone)), collective_ms) - alone

    def _user_buffers(self) -> dict[str, float]:
        """Transformer Engine's user buffers: rings of copies, pipelined reduce-scatters, and bulk collectives."""
        tables, shape, products = self.tables["user_buffers"], self.shape, self.products_ms
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
        return {
            "forward": ring("qkv") + pipelined("proj") + ring("fc1") + pipelined("fc2") + amax,
            "backward": ring("fc2 dgrad") + ring("proj dgrad") + bulks + amax,
        }


def slowest_of(number: int) -> float:
    """Return the expected largest of so many standard normal numbers (Blom's approximation)."""
    return NormalDist().inv_cdf((number - 0.375) / (number + 0.25)) if number > 1 else 0.0


@functools.lru_cache(maxsize=256)
def lockstep_wait(ranks: int, slowest_lag: float, deviation: float) -> float:
    """Return how much longer a layer takes where `ranks` wait for each other, as a share of its time.

    Each rank's time is normal with this deviation (power control at its limit); one lags behind by `slowest_lag`, which
    is not counted. The mean of the largest, integrated.
    """
    if ranks == 1:
        return 0.0
    normal, parts = NormalDist(), 200
    low, mean = -6 * deviation, slowest_lag + 7 * deviation
    width = (mean - low) / parts
    for part in range(parts):
        x = low + (part + 0.5) * width
        mean -= width * normal.cdf((x - slowest_lag) / deviation) * normal.cdf(x / deviation) ** (ranks - 1)
    return mean - slowest_lag
