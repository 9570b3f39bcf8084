"""What tensor parallelism adds to a layer: gathers, scatters, user buffers, and waits of ranks in lockstep.

Each was measured on two GPUs, or played on one; docs/estimate.md says how.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from statistics import NormalDist

from nemo_bench.config import TrainConfig
from nemo_bench.estimate.network import Network
from nemo_bench.estimate.rates import LayerRates, Rates, constant, nearest, piecewise

# Products of the backward pass beside which a collective runs in bulk, and the SMs that NVIDIA's tables give it.
_BULK_SMS = {"fc1 dgrad": 2, "fc1 wgrad": 4, "qkv dgrad": 4, "qkv wgrad": 24}
_PIPELINE_PARTS = 4


@dataclass(frozen=True)
class TensorParallel:
    """A layer's tensor-parallel communication."""

    cfg: TrainConfig
    rates: Rates
    layer: LayerRates
    network: Network

    def added_ms(self) -> dict[str, dict[str, float]]:
        """Return what each direction takes longer, by product (ms)."""
        m = self.cfg.model
        if m.tensor_model_parallel_size == 1:
            return {"forward": {}, "backward": {}}
        if m.sequence_parallel and m.tp_comm_overlap:
            return self._user_buffers()
        return self._collectives(m.sequence_parallel)

    def _moved_bytes(self, number_bytes: int = 2) -> float:
        """Return what a rank sends or receives of a micro-batch's activations between the layers."""
        size, shape = self.cfg.model.tensor_model_parallel_size, self.layer.shape
        return shape.tokens * shape.hidden_size * number_bytes * (size - 1) / size

    def _nccl_ms(self, collective: str, number_bytes: int = 2) -> float:
        measured = self.rates.tables["nccl"][collective]
        speed = measured["gb_s"] * self.network.nvlink_factor * 1e6
        return float(measured["latency_ms"] + self._moved_bytes(number_bytes) / speed)

    def _collectives(self, sequence_parallel: bool) -> dict[str, dict[str, float]]:
        """NCCL between the products, but for those of the backward pass that run beside products."""
        if not sequence_parallel:
            all_reduce = self._nccl_ms("all_gather") + self._nccl_ms("reduce_scatter")
            backward = {op: self._beside(op, all_reduce) for op in ("fc1 wgrad", "qkv wgrad")}
            return {"forward": {"proj": all_reduce, "fc2": all_reduce}, "backward": backward}
        # Gathered in the format that products read.
        gather = self._nccl_ms("all_gather", 2 if self.layer.shape.precision == "bf16" else 1)
        scatter = self._nccl_ms("reduce_scatter")
        backward = {"fc2 dgrad": gather, "proj dgrad": gather}
        for op in ("fc1", "qkv"):
            backward[f"{op} dgrad"] = self._beside(f"{op} dgrad", gather)
            backward[f"{op} wgrad"] = self._beside(f"{op} wgrad", scatter)
        return {"forward": {"qkv": gather, "proj": scatter, "fc1": gather, "fc2": scatter}, "backward": backward}

    def _beside(self, op: str, collective_ms: float) -> float:
        """Return how much longer a product and a collective take together than the product alone."""
        alone = self.layer.products_ms[op]
        held = nearest(self.rates.tables["beside_held_sms"], op, self.layer.shape)
        slowdown = piecewise(list(zip(held["sms"], held["slowdown"])), constant("gather_sms")["tensor_parallel"])
        return max(alone * (1 + slowdown * min(1.0, collective_ms / alone)), collective_ms) - alone

    def _user_buffers(self) -> dict[str, dict[str, float]]:
        """Transformer Engine's user buffers: rings of copies, pipelined reduce-scatters, and bulk collectives."""
        tables, shape, products = self.rates.tables["user_buffers"], self.layer.shape, self.layer.products_ms

        def ring(op: str) -> float:
            return float(products[op] * (nearest(tables["ring"], op, shape)["ratio"] - 1))

        def pipelined(op: str) -> float:
            speed = constant("nvlink_reduce_scatter_gb_s") * self.network.nvlink_factor * 1e6
            held = constant("nvlink_latency_ms") / 2 + self._moved_bytes() / _PIPELINE_PARTS / speed
            entry = nearest(tables["pipeline"], op, shape)
            return products[op] * (piecewise(list(zip(entry["held_ms"], entry["ratio"])), held) - 1)

        def bulk(op: str, sms: int) -> float:
            entry = nearest([entry for entry in tables["bulk"] if entry["sms"] == sms], op, shape)
            # As long as the collective lasts; the table's moved 3/4 of 4,096 tokens of hidden size 8,192.
            return float(entry["added_ms"] * self._moved_bytes() / (4096 * 8192 * 2 * 3 / 4))

        forward = {"qkv": ring("qkv"), "proj": pipelined("proj"), "fc1": ring("fc1"), "fc2": pipelined("fc2")}
        backward = {op: ring(op) for op in ("fc2 dgrad", "proj dgrad")}
        backward |= {op: bulk(op, sms) for op, sms in _BULK_SMS.items()}
        amax = 2 * constant("tensorwise_amax_ms") if shape.precision == "fp8_tensorwise" else 0.0
        return {"forward": {**forward, "amax": amax}, "backward": {**backward, "amax": amax}}


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
    normal = NormalDist()
    low, high, parts = -6 * deviation, slowest_lag + 7 * deviation, 200
    width = (high - low) / parts
    mean = high
    for part in range(parts):
        x = low + (part + 0.5) * width
        mean -= width * normal.cdf((x - slowest_lag) / deviation) * normal.cdf(x / deviation) ** (ranks - 1)
    return mean - slowest_lag
