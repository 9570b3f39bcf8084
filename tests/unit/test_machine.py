"""The machine check's tournament, coordination and verdicts, with ranks that only say what they would measure."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from nemo_bench.cluster.processes import free_port
from nemo_bench.config import TrainConfig
from nemo_bench.machine import findings
from nemo_bench.machine.coordination import Coordinator
from nemo_bench.machine.rank import LIMIT_S, coordinate
from nemo_bench.machine.schedule import layout_groups, tournament

from ..composing import composed
from ..simulated_ranks import DEVICES

PROJECT = Path(__file__).resolve().parents[2]


def checked(cfg: TrainConfig, faults: dict[str, Any], processes: int) -> dict[str, Any]:
    """What a check concludes of simulated ranks, shared out to so many processes."""
    port, share = free_port(), -(-cfg.world_size // processes)
    command = [sys.executable, "-m", "tests.simulated_ranks", str(port)]
    ranks = [
        subprocess.Popen(
            [*command, str(first), str(min(first + share, cfg.world_size)), json.dumps(faults)], cwd=PROJECT
        )
        for first in range(0, cfg.world_size, share)
    ]
    evidence = asyncio.run(coordinate(cfg, Coordinator(cfg.world_size, LIMIT_S), port, Path("none")))
    for process in ranks:
        process.wait(timeout=20)
    return findings.conclude(evidence, Path("folder"))


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 5, 17, 256])
def test_in_a_tournament_nobody_meets_twice_and_all_meet_enough(nodes: int) -> None:
    rounds = tournament(nodes, DEVICES)
    pairs = [(a, b) for _, opponents in rounds for a, b in enumerate(opponents) if b is not None]
    assert len(pairs) == len(set(pairs)) and set(pairs) == {(b, a) for a, b in pairs} and len(rounds) <= 15
    met = Counter(a for a, _ in pairs)
    assert min(met.values()) >= 5 + min(nodes - 1, 3) - nodes % 2


def test_the_groups_are_megatrons() -> None:
    cfg = composed("scale=64gpu", "model.tensor_model_parallel_size=4", "model.context_parallel_size=2")
    groups = layout_groups(cfg)
    assert groups["TP"][1] == [4, 5, 6, 7] and groups["CP"][0] == [0, 4]
    assert all(sorted(chain.from_iterable(each)) == list(range(64)) for each in groups.values())


def test_2048_ranks_are_checked_by_16_processes_within_two_minutes() -> None:
    cfg, start = composed("scale=2048gpu"), time.monotonic()
    (a, b) = next((a, b) for _, each in tournament(256, DEVICES)[-3:] for a, b in enumerate(each) if a > 800 and b)
    faults = {"slow GPU": 293, "slow link": [a, b], "slow NIC": 1204, "sick GPU": 7, "states": {"uncorrected_ecc": 3}}
    content = checked(cfg, faults, processes=15)
    assert time.monotonic() - start < 120
    assert [each["ranks"] for each in content["findings"]] == [(293,), (1204,), (b, a), (7,)]
    assert content["exclude"] == ["n1", "n151", "n37"]
