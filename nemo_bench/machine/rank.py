"""One rank of a machine check: `python rank.py FOLDER`, with its place in RANK or from srun.

It is called by path: in a container it keeps the image's import path. Rank 0's process coordinates, and forks another
that measures, so that it can tell of that one, too.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

# In place of this file's folder, whose modules have names that others may have too.
sys.path[0] = str(Path(__file__).resolve().parents[2])

from nemo_bench.cluster.processes import end_with_launcher, free_port  # noqa: E402
from nemo_bench.config import TrainConfig, load  # noqa: E402
from nemo_bench.files import write_json, write_text  # noqa: E402
from nemo_bench.machine import findings  # noqa: E402
from nemo_bench.machine.coordination import Coordinator, Lost, serve  # noqa: E402
from nemo_bench.machine.findings import Evidence  # noqa: E402
from nemo_bench.machine.schedule import layout_groups, tournament  # noqa: E402
from nemo_bench.record.folder import CONFIG, RunFolder  # noqa: E402
from nemo_bench.record.machine import CHECK, EVIDENCE, READ_FILE, latest_path  # noqa: E402

LIMIT_S = 170.0
# What is slow is measured again, beside its peers: noise passes, and a fault is there each time. CPUs are noisier.
TRIES = {"cuda": 2, "cpu": 4}


def main(folder: Path) -> int:
    """Return the exit status: 1 where the check has findings, or this rank lost its coordinator."""
    cfg, rank = load(folder / CONFIG), int(os.environ.get("RANK") or os.environ["SLURM_PROCID"])
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    measuring = 0 if rank else os.fork()
    end_with_launcher()
    if measuring:
        ranks = Coordinator(cfg.world_size, LIMIT_S)
        # Where a rank has ended, the launcher ends the others, and this is to tell of it; else the check is cancelled.
        signal.signal(signal.SIGTERM, lambda *_: None if ranks.ended else os._exit(128 + signal.SIGTERM))
        evidence = asyncio.run(coordinate(cfg, ranks, place[1], folder / READ_FILE))
        content = findings.conclude(evidence, folder)
        write_text(folder / EVIDENCE, json.dumps(evidence.content()) + "\n")
        write_json(folder / CHECK, content)
        if not evidence.lost:
            write_json(latest_path(cfg.stage_path, cfg.cluster.name, cfg.gpu.name), content)
        (folder / READ_FILE).unlink(missing_ok=True)
        print(findings.text(content), flush=True)
        os.kill(measuring, signal.SIGKILL)
        return 1 if content["findings"] else 0
    terminal = os.fdopen(os.dup(1), "w")
    with open(RunFolder(folder).log(rank), "ab") as log:
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)

    def measures() -> Any:
        from nemo_bench.machine.measure import Measures  # torch, in some seconds

        return Measures(cfg, rank, folder)

    try:
        serve(place, rank, measures, LIMIT_S)
    except OSError as error:
        print(f"rank {rank}: no word from the coordinator on {place[0]}: {error}", file=terminal, flush=True)
        return 1
    return 0


async def coordinate(cfg: TrainConfig, ranks: Coordinator, port: int, read_file: Path) -> Evidence:
    """Have all ranks measure; where one is lost, the evidence is what came before."""
    evidence, start = Evidence(cfg), time.monotonic()
    server = await ranks.server(port)
    try:
        evidence.hosts = await ranks.answers("start")
        await _measure(cfg, ranks, evidence, read_file)
    except Lost as lost:
        evidence.lost = lost.args
    server.close()  # not waited for: from Python 3.12 on that waits for the ranks, which wait for this
    evidence.seconds = time.monotonic() - start
    return evidence


async def _measure(cfg: TrainConfig, ranks: Coordinator, evidence: Evidence, read_file: Path) -> None:
    devices = cfg.trainer.devices
    evidence.facts = await ranks.ask("facts", lambda rank: rank % devices == 0)
    read_file.unlink(missing_ok=True)  # a check that is cancelled from here on leaves no 64 MiB
    tries = range(TRIES[cfg.gpu.device])
    for attempt in tries:
        if attempt == 0 or _slow(evidence):
            evidence.gpus = await ranks.ask("compute", lambda rank: None)
            for rank, answer in enumerate(evidence.gpus):
                for name, rate in answer["rates"].items():
                    evidence.add(name, (rank,), rate)
    if cfg.world_size == 1:
        return
    port = free_port()  # on rank 0's node, where this runs
    evidence.networks = await ranks.ask("join", lambda rank: port)
    for attempt in tries:
        slow = _slow(evidence)
        for link, opponents in tournament(cfg.trainer.num_nodes, devices):
            pairs = [(a, b) for a, b in enumerate(opponents) if b is not None and a < b]
            if attempt == 0 or slow & set(pairs):
                answers = await ranks.ask("pair", opponents.__getitem__)
                for a, b in pairs:
                    evidence.add(f"{link}_gb_s", (a, b), answers[a]["gb_s"], answers[b]["gb_s"])
                    evidence.latencies_us.setdefault(f"{link}_latency_us", []).append(answers[a]["latency_us"])
    for attempt in tries:
        slow = _slow(evidence)
        for name, groups in layout_groups(cfg).items():
            if attempt == 0 or slow & set(map(tuple, groups)):
                own = {rank: [name, group] for group in groups for rank in group}
                answers = await ranks.ask("group", own.__getitem__)
                for group in groups:
                    for operation in answers[group[0]]:
                        evidence.add(f"{name} {operation}", tuple(group), *(answers[rank][operation] for rank in group))


def _slow(evidence: Evidence) -> set[tuple[int, ...]]:
    """Return the ranks, pairs and groups that are slow so far, and say that they are measured again."""
    slow = evidence.slow()
    if slow:
        print(f"slow so far: {'; '.join(f'{name} of ranks {ranks}' for name, ranks in slow[:8])}", flush=True)
    return {ranks for _, ranks in slow}


if __name__ == "__main__":
    status = main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(status)  # without torch's destructors: a communicator may wait for a rank that is gone
