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

    @property
    def size(self) -> int:
        return self.cfg.model.tensor_model_parallel_size

    @property
    def activation_bytes(self) -> float:
        """A micro-batch's activations between the layers, in bf16."""
        return self.layer.shape.tokens * self.layer.shape.hidden_size * 2.0

    @property
    def gathered_bytes(self) -> float:
        """The same, in the format that products read."""
        return self.activation_bytes / (1 if self.layer.shape.precision == "bf16" else 2)

    def added_ms(self) -> dict[str, dict[str, float]]:
        """Return what each direction takes longer, by product (ms)."""
        if self.size == 1:
            return {"forward": {}, "backward": {}}
        if not self.cfg.model.sequence_parallel:
            return self._reduced()
        return self._user_buffers() if self.cfg.model.tp_comm_overlap else self._exposed()

    def _nccl_ms(self, collective: str, size_bytes: float) -> float:
        measured = self.rates.tables["nccl"][collective]
        moved = size_bytes * (self.size - 1) / self.size
        return float(measured["latency_ms"] + moved / (measured["gb_s"] * self.network.nvlink_factor * 1e6))

    def _reduced(self) -> dict[str, dict[str, float]]:
        """Without sequence parallelism: two all-reduces forward, and two behind weight gradients backward."""
        all_reduce = self._nccl_ms("all_gather", self.activation_bytes)
        all_reduce += self._nccl_ms("reduce_scatter", self.activation_bytes)
        backward = {op: self._beside(op, all_reduce) for op in ("fc1 wgrad", "qkv wgrad")}
        return {"forward": {"proj": all_reduce, "fc2": all_reduce}, "backward": backward}

    def _exposed(self) -> dict[str, dict[str, float]]:
        """NCCL between the products; four collectives of the backward pass run beside products."""
        gather = self._nccl_ms("all_gather", self.gathered_bytes)
        scatter = self._nccl_ms("reduce_scatter", self.activation_bytes)
        backward = {"fc2 dgrad": gather, "proj dgrad": gather}
        for op in ("fc1", "qkv"):
            backward[f"{op} dgrad"] = self._beside(f"{op} dgrad", gather)
            backward[f"{op} wgrad"] = self._beside(f"{op} wgrad", scatter)
        return {"forward": {"qkv": gather, "proj": scatter, "fc1": gather, "fc2": scatter}, "backward": backward}

    def _beside(self, op: str, collective_ms: float) -> float:
        """Return how much longer a product and a collective take together than the product alone."""
        alone = self._product_ms(op)
        held = nearest(self.rates.tables["beside_held_sms"], op, self.layer.shape)
        slowdown = piecewise(list(zip(held["sms"], held["slowdown"])), constant("gather_sms")["tensor_parallel"])
        return max(alone * (1 + slowdown * min(1.0, collective_ms / alone)), collective_ms) - alone

    def _product_ms(self, op: str) -> float:
        return {**self.layer.forward.products_ms, **self.layer.backward.products_ms}[op]

    def _user_buffers(self) -> dict[str, dict[str, float]]:
        """Transformer Engine's user buffers: rings of copies, pipelined reduce-scatters, and bulk collectives."""
        forward = {"qkv": self._ring("qkv"), "proj": self._pipelined("proj")}
        forward |= {"fc1": self._ring("fc1"), "fc2": self._pipelined("fc2")}
        backward = {op: self._ring(op) for op in ("fc2 dgrad", "proj dgrad")}
        backward |= {op: self._bulk(op, sms) for op, sms in _BULK_SMS.items()}
        if self.layer.shape.precision == "fp8_tensorwise":
            for added in (forward, backward):
                added["amax"] = 2 * constant("tensorwise_amax_ms")
        return {"forward": forward, "backward": backward}

    def _table(self, kind: str, op: str) -> list[dict[str, object]]:
        return [entry for entry in self.rates.tables["user_buffers"][kind] if entry["product"] == op]

    def _ring(self, op: str) -> float:
        ratio = nearest(self._table("ring", op), op, self.layer.shape)["ratio"]
        return float(self._product_ms(op) * (ratio - 1))

    def _pipelined(self, op: str) -> float:
        speed = constant("nvlink_reduce_scatter_gb_s") * self.network.nvlink_factor * 1e6
        part = self.activation_bytes / _PIPELINE_PARTS * (self.size - 1) / self.size
        held = constant("nvlink_latency_ms") / 2 + part / speed
        entry = nearest(self._table("pipeline", op), op, self.layer.shape)
        return self._product_ms(op) * (piecewise(list(zip(entry["held_ms"], entry["ratio"])), held) - 1)

    def _bulk(self, op: str, sms: int) -> float:
        fitting = [entry for entry in self._table("bulk", op) if entry["sms"] == sms]
        entry = nearest(fitting, op, self.layer.shape)
        # As long as the collective lasts. The table's: 4,096 tokens of hidden size 8,192, three of four parts moved.
        moved = self.activation_bytes * (self.size - 1) / self.size
        return float(entry["added_ms"] * moved / (4096 * 8192 * 2 * 3 / 4))


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
