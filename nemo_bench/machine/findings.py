"""From the evidence of a machine check to what there is to say: findings, their places, and the machine's own rates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_bench.config import TrainConfig
from nemo_bench.machine.evidence import Evidence, middle
from nemo_bench.record.folder import timestamp

# What a healthy machine reaches at least of what conf/gpu and conf/cluster say.
EXPECTED = 0.85
SHOWN = 8
# What NVML says of a GPU where something is wrong.
_STATES = {
    "uncorrected_ecc": "uncorrected ECC errors: {}",
    "row_remap_pending": "a row of its memory is to be remapped: reset the GPU",
    "row_remap_failed": "a row of its memory could not be remapped: replace the GPU",
    "nvlink_errors": "NVLink errors: {}",
}
# What nodes may have each for itself.
_OWN = ("xids", "stage_read_gb_s")


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, and the ranks that it is about."""

    what: str
    ranks: tuple[int, ...]
    sick: bool = True  # whether their nodes are better left out


def conclude(cfg: TrainConfig, evidence: Evidence, folder: Path, seconds: float) -> dict[str, Any]:
    """Return the content of the check's file."""
    results, hosts = [*_findings(cfg, evidence)], dict(enumerate(evidence.hosts))
    gpus = [answer["gpu"] or {} for answer in evidence.compute[-1]] if evidence.compute else [{}] * cfg.world_size
    sick = {hosts[rank] for each in results if each.sick for rank in each.ranks if rank in hosts}
    nodes = [facts["node"] for facts in evidence.facts if facts["node"]]
    places = [
        {"host": hosts.get(rank), "gpu": rank % cfg.trainer.devices, "serial": gpus[rank].get("serial")}
        for rank in range(cfg.world_size)
    ]
    return {
        "schema_version": 1,
        "checked_at": timestamp(),
        "cluster": cfg.cluster.name,
        "gpu": cfg.gpu.name,
        "nodes": cfg.trainer.num_nodes,
        "gpus": cfg.world_size,
        "folder": str(folder),
        "seconds": round(seconds, 1),
        "findings": [{**vars(each), "where": [places[rank] for rank in each.ranks]} for each in results],
        # Where every node is sick, the cause is what they share.
        "exclude": sorted(sick) if len(sick) < cfg.trainer.num_nodes else [],
        "rates": _rates(evidence),
        "not_there": sorted({name for node in nodes for name, value in node.items() if value is None}),
        "node": nodes[0] if nodes else None,
    }


def _findings(cfg: TrainConfig, e: Evidence) -> Iterator[Finding]:
    if e.lost is not None:
        for why in dict.fromkeys(e.lost.ranks.values()):
            yield Finding(f"{e.lost.task}: {why}", tuple(rank for rank, words in e.lost.ranks.items() if words == why))
    yield from _slow(cfg, e)
    yield from _links(cfg, e)
    for rank, answer in enumerate(e.compute[-1] if e.compute else []):
        gpu, clocks = answer["gpu"] or {}, answer["clocks"]
        for name, words in _STATES.items():
            if gpu.get(name):
                yield Finding(words.format(gpu[name]), (rank,))
        # A power cap is what a busy GPU runs into.
        if held := [reason for reason in clocks.get("throttle_reasons", ()) if reason != "sw_power_cap"]:
            yield Finding(f"clocks held back at work: {', '.join(held)}", (rank,))
        limit_w, usual_w = gpu.get("power_limit_w"), cfg.gpu.power_limit_w or gpu.get("default_power_limit_w")
        if limit_w and usual_w and limit_w < usual_w:
            yield Finding(f"power limit {limit_w:.0f} W, usually {usual_w:.0f} W", (rank,))
        if gpu.get("pcie") != gpu.get("max_pcie"):
            yield Finding("PCIe generation and width {pcie}, possible {max_pcie}".format(**gpu), (rank,))
    yield from _nodes(e)
    sockets = tuple(rank for rank, networks in enumerate(e.networks) if "Socket" in networks)
    if sockets and cfg.trainer.num_nodes > 1:
        yield Finding("NCCL uses sockets between nodes: it has no plugin for the network's adapters", sockets, False)


def _slow(cfg: TrainConfig, e: Evidence) -> Iterator[Finding]:
    slow, expected = e.slow_ranks(), {f"{name}_tflops": tflops for name, tflops in cfg.gpu.sustained_tflops.items()}
    expected["memory_gb_s"] = cfg.gpu.memory_gb_s or 0.0
    for name in e.compute[0][0]["rates"] if e.compute else ():
        rates = e.rates(name)
        usual = middle(rates.values())
        for rank, rate in sorted(rates.items()):
            if rank in slow.get(name, ()):
                yield Finding(f"{name} {rate:.4g}: {rate / usual:.0%} of its peers' {usual:.4g}", (rank,))
            elif rate < EXPECTED * expected.get(name, 0.0):
                yield Finding(f"{name} {rate:.4g}: {rate / expected[name]:.0%} of conf/gpu's", (rank,))


def _links(cfg: TrainConfig, e: Evidence) -> Iterator[Finding]:
    guilty, alone = e.blame()
    for kind, expected in (("in_node", cfg.cluster.nvlink_gb_s), ("network", cfg.cluster.nic_gb_s)):
        usual = middle(e.of_kind(kind).values(), 0.75)
        if 0 < usual < EXPECTED * (expected or 0.0):
            yield Finding(f"{kind} {usual:.3g} GB/s, {expected:g} by conf/cluster", tuple(range(len(e.hosts))), False)
    for kind, rank in guilty:
        rates = e.of_kind(kind)
        own, usual = middle([rates[link] for link in rates if rank in link[1]]), middle(rates.values(), 0.75)
        yield Finding(f"{kind} {own:.3g} GB/s with most others, which reach {usual:.3g}", (rank,))
    for kind, ranks in alone:
        rates = e.of_kind(kind)
        usual = middle(rates.values(), 0.75)
        words = f"slow link, {kind}: {rates[kind, ranks]:.3g} GB/s among these, others {usual:.3g}"
        yield Finding(words, ranks, sick=False)


def _nodes(e: Evidence) -> Iterator[Finding]:
    """Yield hardware errors, and what a node's software, ports or environment have otherwise than most."""
    nodes = {
        rank: {**facts["node"], "environment": facts["environment"]}
        for rank, facts in enumerate(e.facts)
        if facts["node"]
    }
    for rank, node in nodes.items():
        if node["xids"]:
            yield Finding(f"hardware errors in the kernel's log: {', '.join(node['xids'][:SHOWN])}", (rank,))
        for name in (name for name in node if name not in _OWN):
            texts = {str(other[name]): other[name] for other in nodes.values()}
            usual = Counter(str(other[name]) for other in nodes.values()).most_common(1)[0][0]
            if str(node[name]) != usual:
                words = f"{name} differs from most: {_apart(node[name], texts[usual])}"
                yield Finding(words, (rank,), sick=name == "hca_ports")


def _apart(one: Any, other: Any) -> str:
    """Return what one has and the other has not, in a line."""
    if isinstance(one, dict) and isinstance(other, dict):
        names = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
        return "; ".join(f"{name} {one.get(name)}, elsewhere {other.get(name)}" for name in names[:SHOWN])
    return f"{one}, elsewhere {other}"


def _rates(e: Evidence) -> dict[str, dict[str, float]]:
    """Return this machine's own rates, the middle and the least of each."""
    values = {name: [*e.rates(name).values()] for name in (e.compute[0][0]["rates"] if e.compute else ())}
    values |= {f"{kind}_gb_s": [*e.of_kind(kind).values()] for kind in e.kinds}
    values |= {f"{kind}_latency_us": latencies for kind, latencies in e.latencies_us.items()}
    values["stage_read_gb_s"] = [facts["node"]["stage_read_gb_s"] or 0.0 for facts in e.facts if facts["node"]]
    return {name: {"middle": middle(each), "least": min(each)} for name, each in values.items() if each}


def text(content: dict[str, Any]) -> str:
    """Return a check in words, for a terminal."""
    head = "machine check of {cluster}: {nodes} x {gpus_per_node} {gpu}, {seconds:.0f} s"
    lines = [head.format(**content, gpus_per_node=content["gpus"] // content["nodes"])]
    for name, rate in content["rates"].items():
        lines.append(f"  {name:32} {rate['middle']:10.4g}   least {rate['least']:.4g}")
    lines.append(f"  not there: {', '.join(content['not_there']) or '-'}")
    for each in content["findings"]:
        names = [
            f"{place['host'] or '?'} GPU {place['gpu']} {place['serial'] or ''}".strip() for place in each["where"]
        ]
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        lines.append(f"FINDING  {', '.join(names[:SHOWN])}{more}: {each['what']}")
    if content["exclude"]:
        lines.append(f"leave them out: --exclude={','.join(content['exclude'])}")
    return "\n".join([*lines, f"{len(content['findings']) or 'no'} findings; evidence: {content['folder']}"])
