"""Times of communication between GPUs, from the links' speeds: NVLink within a domain, one NIC a GPU between them."""

from __future__ import annotations

import math

from nemo_bench.config import TrainConfig
from nemo_bench.estimate.rates import Rates, constant, piecewise


class Network:
    """The links of a job. Ranks are laid out as Megatron does by default: TP, then CP, then DP, PP outermost."""

    def __init__(self, cfg: TrainConfig, rates: Rates) -> None:
        self.pair = rates.tables["nccl"]["p2p"]["2"]
        cluster, nic_gb_s = cfg.cluster, constant("nic_gb_s_by_nodes")[2]
        self.domain_gpus = cluster.nvlink_gpus or cfg.trainer.devices  # joined by NVLink
        # This cluster's speeds over those in constants.yaml.
        self.nvlink_factor = cluster.nvlink_gb_s / constant("nvlink_p2p_gb_s") if cluster.nvlink_gb_s else 1.0
        self.nic_factor = cluster.nic_gb_s / nic_gb_s if cluster.nic_gb_s else 1.0

    def nic_gb_s(self, nodes: float) -> float:
        """Return what one NIC carries in a ring over so many nodes."""
        speeds = sorted(constant("nic_gb_s_by_nodes").items())
        points = [(math.log2(number), speed) for number, speed in speeds]
        return piecewise(points, math.log2(max(nodes, 1))) * self.nic_factor

    def ring_ms(self, size_bytes: float, ranks: int, stride: int, messages: int = 1) -> float:
        """Return the time of an all-gather or reduce-scatter of `size_bytes` in all, in so many messages.

        `stride`: distance between neighbours of the group, in ranks. Latency: NCCL's model of a ring.
        """
        if ranks == 1:
            return 0.0
        in_node = min(ranks, max(1, self.domain_gpus // stride))
        nodes = max(1, ranks // in_node)
        speed = constant("nvlink_all_gather_gb_s") * self.nvlink_factor
        if nodes > 1:
            speed = min(in_node * self.nic_gb_s(nodes), speed)
        hop = constant("ring_latency_ms")
        latency = hop["base"] + (nodes - 1) * hop["between_nodes"] + (ranks - nodes) * hop["in_node"]
        return float(size_bytes * (ranks - 1) / ranks / (speed * 1e6) + latency * messages)

    def p2p_ms(self, size_bytes: float, stride: int) -> float:
        """Return the time in which a tensor reaches the rank that is `stride` ranks away."""
        if stride >= self.domain_gpus:
            return float(constant("p2p_latency_ms") + size_bytes / (self.nic_gb_s(2) * 1e6))
        return float(self.pair["latency_ms"] + size_bytes / (self.pair["gb_s"] * self.nvlink_factor * 1e6))

    def amax_ms(self, ranks: int) -> float:
        """Return the time of the all-reduce of fp8's delayed scaling factors, which only its latency makes."""
        hop, nodes = constant("amax_latency_ms"), max(1.0, ranks / self.domain_gpus)
        in_node = (min(self.domain_gpus, ranks) - 1) * hop["in_node"]
        return float(hop["base"] + 2 * (in_node + math.log2(nodes) * hop["between_nodes"]) + hop["streams"])
