"""What the ranks of a machine check have measured, and what there is to say of it: findings, places, own rates."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_bench.config import TrainConfig
from nemo_bench.record.folder import timestamp

# Below this share of its peers' a rate is slow. GPUs of a kind differ by 0.7% (estimate/constants.yaml). Ranks on CPUs
# share cores, and a message between two that wait for cores takes up to ten times as long.
SLOW = {
    "cuda": {"bf16_tflops": 0.95, "fp8_tflops": 0.95, "memory_gb_s": 0.85, "to_device_gb_s": 0.75, "links": 0.8},
    "cpu": {"fp32_tflops": 0.6, "memory_gb_s": 0.0, "links": 0.05},
}
# What a healthy machine reaches at least of what conf/gpu and conf/cluster say. Copies within the memory of healthy
# H200s read 81 to 88% of the data sheet.
EXPECTED, EXPECTED_OF_MEMORY = 0.85, 0.75
SHOWN = 20
# What NVML says of a GPU where something is wrong.
_STATES = {
    "uncorrected_ecc": "uncorrected ECC errors: {}",
    "row_remap_pending": "a row of its memory is to be remapped: reset the GPU",
    "row_remap_failed": "a row of its memory could not be remapped: replace the GPU",
    "nvlink_errors": "NVLink errors: {}",
}
Ranks = tuple[int, ...]


@dataclass
class Evidence:
    """All answers, by rank."""

    cfg: TrainConfig
    hosts: list[str] = field(default_factory=list)
    facts: list[dict[str, Any]] = field(default_factory=list)
    gpus: list[dict[str, Any]] = field(default_factory=list)
    networks: list[list[str]] = field(default_factory=list)
    # By rate, and by the rank, the pair or the group that it is of; of a pair, one a direction.
    readings: dict[str, dict[Ranks, tuple[float, ...]]] = field(default_factory=dict)
    latencies_us: dict[str, list[float]] = field(default_factory=dict)
    lost: tuple[Any, ...] = ()  # the task, and the ranks that did not do it, each with why
    seconds: float = 0.0

    def add(self, name: str, ranks: Ranks, *rates: float) -> None:
        """Keep the best of all tries: noise only makes them slower."""
        readings = self.readings.setdefault(name, {})
        readings[ranks] = tuple(map(max, rates, readings.get(ranks, rates)))

    def rates(self, name: str) -> dict[Ranks, float]:
        """Return the readings of one rate, of the slower direction."""
        return {ranks: min(rates) for ranks, rates in self.readings[name].items()}

    def usual(self, name: str) -> float:
        """Return what a quarter of the readings exceed: of the pairs of four nodes, one of them slow, half are slow."""
        return middle(self.rates(name).values(), 0.75)

    def expected(self, name: str) -> float:
        """Return what a rate must reach at least by the configuration; 0 if that says nothing."""
        gpu, cluster = self.cfg.gpu, self.cfg.cluster
        rate = {"in_node_gb_s": cluster.nvlink_gb_s, "network_gb_s": cluster.nic_gb_s}.get(name)
        if name == "memory_gb_s":
            return EXPECTED_OF_MEMORY * (gpu.memory_gb_s or 0.0)
        return EXPECTED * (rate or gpu.sustained_tflops.get(name.removesuffix("_tflops"), 0.0))

    def slow(self) -> list[tuple[str, Ranks]]:
        """Return the readings that are slow beside the others, or beside what the configuration says."""
        slow, shares = [], SLOW[self.cfg.gpu.device]
        for name in self.readings:
            least = max(shares.get(name, shares["links"]) * self.usual(name), self.expected(name))
            slow += [(name, ranks) for ranks, rate in self.rates(name).items() if rate < least]
        return slow

    def guilty(self) -> list[tuple[str, Ranks]]:
        """Return what explains all that is slow: ranks by themselves, ranks with most others, and single links.

        What a rank that is named already does to its links is not told again.
        """
        guilty, named = list[tuple[str, Ranks]](), set[int]()
        slow = sorted(self.slow(), key=lambda reading: len(reading[1]))
        links = [(name, ranks) for name, readings in self.readings.items() for ranks in readings]
        played = Counter((name, rank) for name, ranks in links for rank in ranks)
        while slow:
            (who, number), *_ = Counter((name, rank) for name, ranks in slow for rank in ranks).most_common(1)
            alone = len(slow[0][1]) == 1 or number == 1 or number <= played[who] / 2
            guilty.append(slow[0] if alone else (who[0], (who[1],)))
            named |= set(guilty[-1][1])
            slow = [reading for reading in slow if not named & set(reading[1])]
        return guilty

    def content(self) -> dict[str, Any]:
        """Return all of it for a file."""
        readings = {name: [*readings.items()] for name, readings in self.readings.items()}
        return {**vars(self), "readings": readings, "cfg": None}


def middle(values: Collection[float], share: float = 0.5) -> float:
    """Return the value that this share of the others does not exceed, the higher of two; 0 of none."""
    return sorted(values)[math.ceil(share * (len(values) - 1))] if values else 0.0


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, and the ranks that it is about."""

    what: str
    ranks: tuple[int, ...]
    sick: bool = True  # whether their nodes are better left out


def conclude(e: Evidence, folder: Path) -> dict[str, Any]:
    """Return the content of the check's file."""
    cfg, hosts, results = e.cfg, dict(enumerate(e.hosts)), [*_rates(e), *_states(e), *_nodes(e)]
    if e.lost:
        results += [Finding(f"{e.lost[0]}: {why}", (rank,)) for rank, why in e.lost[1].items()]
    sick = {hosts[rank] for each in results if each.sick for rank in each.ranks if rank in hosts}
    serials = dict(enumerate((answer["gpu"] or {}).get("serial") for answer in e.gpus))
    ranks, devices = range(cfg.world_size), cfg.trainer.devices
    places = [{"host": hosts.get(rank), "gpu": rank % devices, "serial": serials.get(rank)} for rank in ranks]
    rates = {name: [*e.rates(name).values()] for name in e.readings} | e.latencies_us
    nodes = [facts["node"] for facts in e.facts if facts["node"]]
    rates["stage_read_gb_s"] = [node["stage_read_gb_s"] for node in nodes]
    return {
        "schema_version": 1,
        "checked_at": timestamp(),
        "cluster": cfg.cluster.name,
        "gpu": cfg.gpu.name,
        "nodes": cfg.trainer.num_nodes,
        "gpus": cfg.world_size,
        "folder": str(folder),
        "seconds": round(e.seconds, 1),
        "findings": [{**vars(each), "where": [places[rank] for rank in each.ranks]} for each in results],
        # Where every node is sick, the cause is what they share.
        "exclude": sorted(sick) if len(sick) < cfg.trainer.num_nodes else [],
        "rates": {name: {"middle": middle(each), "least": min(each)} for name, each in rates.items() if each},
        "not_there": sorted({name for node in nodes for name, value in node.items() if value is None}),
    }


def _rates(e: Evidence) -> Iterator[Finding]:
    for name, ranks in e.guilty():
        rates, usual = e.rates(name), e.usual(name)
        own = middle([rate for others, rate in rates.items() if set(ranks) <= set(others)])
        conf = f", by the configuration at least {e.expected(name):.3g}" if own < e.expected(name) else ""
        yield Finding(f"{name} {own:.3g}, others {usual:.3g}{conf}", ranks, sick=len(ranks) == 1)


def _states(e: Evidence) -> Iterator[Finding]:
    for rank, answer in enumerate(e.gpus):
        gpu, limit_w = answer["gpu"] or {}, e.cfg.gpu.power_limit_w or 0.0
        words = [text.format(gpu[name]) for name, text in _STATES.items() if gpu.get(name)]
        # A power cap is what a busy GPU runs into.
        reasons = set(answer["clocks"].get("throttle_reasons", ())) - {"sw_power_cap"}
        words += [f"clocks held back at work: {reason}" for reason in sorted(reasons)]
        if 0 < gpu.get("power_limit_w", 0.0) < limit_w:
            words.append(f"power limit {gpu['power_limit_w']:.0f} W, {limit_w:.0f} by conf/gpu")
        if gpu.get("pcie") != gpu.get("max_pcie"):
            words.append("PCIe generation and width {pcie}, possible {max_pcie}".format(**gpu))
        yield from (Finding(text, (rank,)) for text in words)


def _nodes(e: Evidence) -> Iterator[Finding]:
    """Yield hardware errors, what a node has otherwise than most, and NCCL on sockets."""
    measured = [(rank, facts) for rank, facts in enumerate(e.facts) if facts["node"]]
    nodes = {rank: facts["node"] | {"environment": facts["environment"]} for rank, facts in measured}
    for rank, node in nodes.items():
        if node["xids"]:
            yield Finding(f"hardware errors in the kernel's log: {', '.join(node['xids'])}", (rank,))
    for name in next(iter(nodes.values()), {}).keys() - {"xids", "stage_read_gb_s"}:
        usual = Counter(str(node[name]) for node in nodes.values()).most_common(1)[0][0]
        for rank, node in nodes.items():
            if str(node[name]) != usual:
                yield Finding(f"{name} differs: {node[name]}, elsewhere {usual}", (rank,), sick=name == "hca_ports")
    sockets = tuple(rank for rank, networks in enumerate(e.networks) if "Socket" in networks)
    if sockets and e.cfg.trainer.num_nodes > 1:
        yield Finding("NCCL uses sockets: it has no plugin for the adapters between the nodes", sockets, sick=False)


def text(content: dict[str, Any]) -> str:
    """Return a check in words, for a terminal."""
    lines = ["machine check of {cluster}: {gpus} x {gpu} on {nodes} nodes, {seconds:.0f} s".format(**content)]
    for name, rate in content["rates"].items():
        lines.append(f"  {name:32} {rate['middle']:10.4g}   least {rate['least']:.4g}")
    lines.append(f"  not there: {', '.join(content['not_there']) or '-'}")
    for each in content["findings"][:SHOWN]:
        names = [f"{place['host']} GPU {place['gpu']} {place['serial'] or ''}".strip() for place in each["where"]]
        lines.append(f"FINDING  {', '.join(names[:SHOWN])}: {each['what']}")
    if content["exclude"]:
        lines.append(f"leave them out: --exclude={','.join(content['exclude'])}")
    return "\n".join([*lines, f"{len(content['findings']) or 'no'} findings; evidence: {content['folder']}"])
