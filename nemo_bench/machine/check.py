"""The coordinator's part of a machine check: what is measured in which order, and what is written of it."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

from nemo_bench.cluster.processes import free_port
from nemo_bench.config import TrainConfig
from nemo_bench.files import write_json, write_text
from nemo_bench.machine import findings
from nemo_bench.machine.coordination import Coordinator, Lost
from nemo_bench.machine.evidence import Evidence
from nemo_bench.machine.schedule import Round, layout_groups, tournament
from nemo_bench.record.machine import CHECK, EVIDENCE, write_latest

LIMIT_S = 170.0
# What is slow is measured again, beside its peers: noise passes, and a fault is there each time.
TRIES = 4
AGAIN_S = 60.0  # left, or nothing is measured again


def run(cfg: TrainConfig, folder: Path, port: int) -> int:
    """Check the machine, write and print what there is to say; return 1 where there are findings."""
    start = time.monotonic()
    evidence = asyncio.run(coordinate(cfg, port))
    content = findings.conclude(cfg, evidence, folder, time.monotonic() - start)
    write_text(folder / EVIDENCE, json.dumps(evidence.content()) + "\n")
    write_json(folder / CHECK, content)
    if evidence.lost is None:
        write_latest(Path(cfg.stage_path), content)
    print(findings.text(content), flush=True)
    return 1 if content["findings"] else 0


async def coordinate(cfg: TrainConfig, port: int) -> Evidence:
    """Have all ranks measure; where one is lost, the evidence is what came before."""
    evidence = Evidence(cfg.gpu.device)
    async with Coordinator(cfg.world_size, port, LIMIT_S) as ranks:
        try:
            await _measure(cfg, ranks, evidence)
        except Lost as lost:
            evidence.lost = lost
    return evidence


async def _measure(cfg: TrainConfig, ranks: Coordinator, evidence: Evidence) -> None:
    devices = cfg.trainer.devices
    evidence.hosts = await ranks.join()
    evidence.facts = await ranks.ask("facts", lambda rank: rank % devices == 0)
    formats = ["fp32"] if cfg.gpu.device == "cpu" else [name for name in ("bf16", "fp8") if name in cfg.gpu.peak_tflops]
    for _ in range(TRIES):
        evidence.compute.append(await ranks.ask("compute", lambda rank: formats))
        if not evidence.slow_ranks() or ranks.left_s < AGAIN_S:
            break
    if cfg.world_size == 1:
        return
    port = free_port()  # on rank 0's node, where this runs
    evidence.networks = await ranks.ask("join", lambda rank: port)
    rounds = tournament(cfg.trainer.num_nodes, devices)
    for attempt in range(TRIES):
        slow = {ranks for _, ranks in evidence.slow_links()}
        for each in rounds:
            if attempt == 0 or slow & set(each.pairs):
                _add_pairs(evidence, each, await ranks.ask("pair", each.opponents.__getitem__))
        if ranks.left_s < AGAIN_S:
            break
    for name, groups in layout_groups(cfg).items():
        own = {rank: group for group in groups for rank in group}
        answers = await ranks.ask("group", [[name, own[rank]] for rank in range(cfg.world_size)].__getitem__)
        for group in groups:
            for operation in answers[group[0]]:
                slowest = min(answers[rank][operation] for rank in group)
                evidence.add_link(f"{name} {operation}", tuple(group), slowest)


def _add_pairs(evidence: Evidence, each: Round, answers: list[dict[str, float]]) -> None:
    for low, high in each.pairs:
        evidence.add_link(each.link, (low, high), answers[low]["gb_s"], answers[high]["gb_s"])
        evidence.latencies_us.setdefault(each.link, []).append(answers[low]["latency_us"])
