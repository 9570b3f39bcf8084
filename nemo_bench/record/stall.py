"""Whom a run waits for whose steps have stopped: read from the stacks that faulthandler left in the ranks' logs.

A rank that left none is stopped, or its node is gone. One whose stack is in no collective, while others wait in one, is
what they wait for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nemo_bench.record.first_error import read_end
from nemo_bench.record.folder import STALLED, STRAGGLER, RunFolder

FRESH_S = 10.0  # so much older than the youngest log, a log holds no stack of this stall
SHOWN = 6
_DUMP = re.compile(r"^Timeout \([\d:.]+\)!$", re.MULTILINE)
_THREAD = re.compile(r"^(?:Current t|T)hread 0x", re.MULTILINE)
_FRAME = re.compile(r'^  File "(.+)", line (\d+) in (.+)$', re.MULTILINE)
# torch's frames of a collective, and the frame that times it (training/peers.py).
_COLLECTIVE = re.compile(r"/torch/distributed/|/nemo_bench/training/peers\.py$")


def said_of_ranks(events: Sequence[dict[str, Any]]) -> list[str]:
    """Return what was said of ranks that lagged or stood still while they trained, the last of each."""
    named = (event for event in events if event.get("event") in (STRAGGLER, STALLED))
    last = {(event["event"], event.get("rank")): event for event in named}
    return [f"after step {event['after_step']}: {event['text']}" for event in last.values()]


def who_keeps_it(run: RunFolder, ranks: int, place: Callable[[int], str]) -> str:
    """Return the ranks that others wait for, and what each waits in; `place` says where a rank runs."""
    logs = {rank: log for rank in range(ranks) if (log := run.log(rank)).exists()}
    changed = {rank: log.stat().st_mtime for rank, log in logs.items()}
    groups: dict[str, list[int]] = {}
    silent = [*range(ranks)]
    for rank, log in logs.items():
        if changed[rank] > max(changed.values()) - FRESH_S and (doing := _doing(log)):
            groups.setdefault(doing, []).append(rank)
            silent.remove(rank)
    texts = [f"{_named(silent, place)} left no stack: stopped, or the node is gone"] if silent else []
    for doing, group in sorted(groups.items(), key=lambda item: item[0].startswith("waiting")):
        texts.append(f"{doing}: {_named(group, place)}")
    return "; ".join(texts[:SHOWN])


def _doing(log: Path) -> str | None:
    """Return what a rank's main thread does, by the last stack in its log; None without one."""
    # Threads are listed from the youngest on, their frames from the innermost.
    _, *dumps = _DUMP.split(read_end(log))
    stack = _FRAME.findall(_THREAD.split(dumps[-1])[-1]) if dumps else []
    if not stack:
        return None
    depth = next((at for at, (file, *_) in enumerate(stack) if not _COLLECTIVE.search(file)), 0)
    path, line, function = stack[depth]
    place = f"{'/'.join(Path(path).parts[-2:])}:{line} ({function})"
    names = [frame[2] for frame in stack[:depth] if frame[2] not in ("held", "wrapper")]
    return f"waiting in {names[-1] if names else 'a collective'}, called at {place}" if depth else f"at {place}"


def _named(ranks: list[int], place: Callable[[int], str]) -> str:
    more = f" and {len(ranks) - SHOWN} more" if len(ranks) > SHOWN else ""
    return ", ".join(f"rank {rank} ({place(rank)})" for rank in ranks[:SHOWN]) + more
