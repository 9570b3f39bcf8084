"""Measures how long GPUs that work in lockstep wait for each other, against what each GPU's own unsteadiness predicts.

    torchrun --nproc-per-node 4 benchmarks/lockstep.py output=lockstep.json

Each GPU replays one layer of the 70B (a shard of four) as CUDA graphs: alone, and with an all-reduce of one number
behind each pass, in groups of 2 and 4 GPUs. The time of the all-reduce itself is measured beside and taken off.
Options: output=FILE, seconds=1.5 (of each run, behind as long a warm-up), precisions=bf16,fp8.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))
os.environ.pop("PYTORCH_CUDA_ALLOC_CONF", None)
os.environ |= {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}

from benchmarks import operator_layers  # noqa: E402
from benchmarks.operator_traces import Case  # noqa: E402
from nemo_bench.estimate.layer import lockstep_wait  # noqa: E402

CASE = Case(8192, 28672, 64, 8, 4, 1, 4096, "bf16", layers=1)


def replayed(layers: Any, meet: Callable[[], object] | None, count: int) -> list[float]:
    """Return the times of `count` layers, forward and backward (ms), after a warm-up of as many."""
    import torch

    def event() -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    events = [event()]
    for _ in range(2 * count):
        for graph in (layers.forward, layers.backward):
            graph.replay()
            if meet is not None:
                meet()
        events.append(event())
        if len(events) > 40:
            events[-40].synchronize()  # the queue stays short, and never runs empty
    torch.cuda.synchronize()
    times = [one.elapsed_time(other) for one, other in zip(events, events[1:])]  # noqa: RUF007
    return times[count:]


def meeting_ms(meet: Callable[[], object]) -> float:
    """Return what a meeting takes behind work that is as long on every GPU."""
    import torch

    means: list[float] = []
    for often in (0, 1) * 3:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        torch.cuda._sleep(20_000_000)
        meet()
        events[0].record()
        for _ in range(50):
            torch.cuda._sleep(3_000_000)
            if often:
                meet()
        events[1].record()
        events[1].synchronize()
        means.append(events[0].elapsed_time(events[1]) / 50)
    return statistics.median(means[1::2]) - statistics.median(means[::2])


def in_lockstep(series: Sequence[Sequence[float]]) -> float:
    """Return the mean time of layers that each wait for the slowest of these GPUs, their series shifted at random."""
    number, sums = min(map(len, series)), []
    for shift in range(0, number, max(1, number // 40)):
        rows = zip(*([*one[k * shift % number :], *one[: k * shift % number]] for k, one in enumerate(series)))
        sums.append(statistics.fmean(map(max, rows)))
    return statistics.fmean(sums)


def measure(precision: str, seconds: float, rank: int, world: int, operators: Any) -> list[dict[str, Any]]:
    """Return the waits of each group size, as rank 0 sees all ranks."""
    import torch
    import torch.distributed as dist

    number, entries = torch.ones(1, device="cuda"), []
    groups = {size: dist.new_group(list(range(size))) for size in (2, 4, 8) if size <= world}
    with operator_layers.recorded(replace(CASE, precision=precision), operators) as layers:
        replayed(layers, None, 20)
        one_ms = torch.tensor([statistics.median(replayed(layers, None, 20))], device="cuda")
        dist.all_reduce(one_ms, dist.ReduceOp.MAX)
        count = int(seconds * 1e3 / float(one_ms))
        for size, group in groups.items():
            if rank < size:
                meet = functools.partial(dist.all_reduce, number, group=group)
                runs = {"alone": None, "together": meet}
                own: dict[str, list[list[float]]] = {name: [] for name in runs}
                for name in ("alone", "together") * 2:
                    own[name].append(replayed(layers, runs[name], count))
                seen: list[Any] = [None] * size
                dist.all_gather_object(seen, {**own, "meet_ms": meeting_ms(meet)}, group=group)
                if rank == 0:
                    entries.append({"precision": precision, "ranks": size, **waits(seen), "series": seen})
            dist.barrier()
    return entries


def waits(seen: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the waits of one group: measured, from the GPUs' own series, and by the estimate's formula."""
    alone = [[time for run in rank["alone"] for time in run] for rank in seen]
    means = [statistics.fmean(times) for times in alone]
    together = statistics.fmean(time for rank in seen for run in rank["together"] for time in run)
    meet = statistics.fmean(rank["meet_ms"] for rank in seen)
    deviation = statistics.fmean(statistics.pstdev(times) / statistics.fmean(times) for times in alone)
    mean, slowest = statistics.fmean(means), max(means)
    others = (sum(means) - slowest) / (len(means) - 1)
    formula = lockstep_wait(len(seen), slowest / others - 1, deviation) * others / slowest
    shares = {
        "wait_over_mean": (together - 2 * meet) / mean - 1,
        "wait_over_slowest": (together - 2 * meet) / slowest - 1,
        "series_over_slowest": in_lockstep(alone) / slowest - 1,
        "formula_over_slowest": formula,
    }
    times = {"alone_ms": [round(one, 4) for one in means], "together_ms": together, "meet_ms": meet}
    return {**times, "deviation": round(deviation, 4), **{name: round(share, 4) for name, share in shares.items()}}


def main() -> None:
    options = dict(argument.partition("=")[::2] for argument in sys.argv[1:])
    options = {"seconds": "1.5", "precisions": "bf16,fp8", **options}
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    import torch

    operators, entries = operator_layers.prepare(), []
    for precision in options["precisions"].split(","):
        entries += measure(precision, float(options["seconds"]), rank, world, operators)
        if rank == 0:  # after each, so that a call that dies halfway leaves something
            head = {"hardware": torch.cuda.get_device_name(), "torch": torch.__version__, "case": vars(CASE)}
            Path(options["output"]).write_text(json.dumps({**head, "groups": entries}) + "\n")
            for entry in entries:
                print({name: value for name, value in entry.items() if name != "series"}, flush=True)


if __name__ == "__main__":
    main()
