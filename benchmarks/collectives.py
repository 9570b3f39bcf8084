"""Measures NCCL between the GPUs of one host, for the table of collectives in a file of rates.

    python benchmarks/collectives.py output=nccl.json

All-gather, reduce-scatter and a ring of sends, over 2, 4 and 8 ranks as far as there are GPUs, of 16 to 256 MiB in all.
Each is fitted to latency + moved bytes / rate, as nemo_bench/estimate/rates/*.json hold it. NVLink multicast stays off.

Options: output=FILE, sizes_mib=16,32,64,128,256, repeats=30, gpus=N (all).
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

WARM_UPS = 5
MIB = 2**20


def fitted(moved_bytes: Sequence[float], times_ms: Sequence[float]) -> dict[str, float]:
    """Return latency (ms) and rate (GB/s) that make the relative errors of the times least, and the largest of them."""
    ones, sizes = [1 / ms for ms in times_ms], [moved / ms for moved, ms in zip(moved_bytes, times_ms)]
    a, aa, b, bb = sum(ones), sum(one * one for one in ones), sum(sizes), sum(size * size for size in sizes)
    ab = sum(one * size for one, size in zip(ones, sizes))
    latency = (a * bb - b * ab) / (aa * bb - ab * ab)
    per_byte = (aa * b - ab * a) / (aa * bb - ab * ab)
    errors = [abs(latency * one + per_byte * size - 1) for one, size in zip(ones, sizes)]
    fit = {"latency_ms": round(latency, 4), "gb_s": round(1 / per_byte / 1e6, 1)}
    return {**fit, "largest_error": round(max(errors), 3)}


def collectives(group: Any, ranks: int, rank: int, size_bytes: int, device: str) -> dict[str, Callable[[], object]]:
    """Return the collectives over a group, each on tensors of `size_bytes` in all."""
    import torch
    import torch.distributed as dist

    whole = torch.randn(size_bytes // 2, device=device).bfloat16()
    part = torch.randn(size_bytes // 2 // ranks, device=device).bfloat16()
    received = torch.empty_like(whole)

    def ring() -> None:
        following, before = (rank + 1) % ranks, (rank - 1) % ranks
        sends = [dist.P2POp(dist.isend, whole, following, group), dist.P2POp(dist.irecv, received, before, group)]
        for request in dist.batch_isend_irecv(sends):
            request.wait()

    return {
        "all_gather": lambda: dist.all_gather_into_tensor(whole, part, group=group),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole, group=group),
        "p2p": ring,
    }


def timed_ms(run: Callable[[], object], repeats: int, group: Any) -> float:
    """Return the mean time of a collective of the slowest rank, many back to back."""
    import torch
    import torch.distributed as dist

    for _ in range(WARM_UPS):
        run()
    dist.barrier(group=group)
    if torch.cuda.is_available():
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        torch.cuda._sleep(100_000_000)  # some 50 ms, in which the host gets ahead
        run()  # ends on all ranks at once
        events[0].record()
        for _ in range(repeats):
            run()
        events[1].record()
        events[1].synchronize()
        mean = torch.tensor([events[0].elapsed_time(events[1]) / repeats], device="cuda")
    else:
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        mean = torch.tensor([(time.perf_counter() - start) * 1e3 / repeats])
    dist.all_reduce(mean, dist.ReduceOp.MAX, group=group)
    return float(mean)


def worker(rank: int, world: int, options: dict[str, str]) -> None:
    """Measure as one rank; the first one writes the file after each group of ranks."""
    import torch
    import torch.distributed as dist

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(rank)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29517", RANK=str(rank), WORLD_SIZE=str(world))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    sizes = [float(size) * MIB for size in options["sizes_mib"].split(",")]
    tables: dict[str, Any] = {}
    for ranks in [number for number in (2, 4, 8) if number <= world]:
        group = dist.new_group(list(range(ranks)))
        if rank >= ranks:
            continue
        times: dict[str, list[float]] = {}
        for size in sizes:
            for name, run in collectives(group, ranks, rank, int(size), device).items():
                times.setdefault(name, []).append(timed_ms(run, int(options["repeats"]), group))
        for name, values in times.items():
            # A rank sends its own part ranks - 1 times, or its whole tensor once.
            moved = [size if name == "p2p" else size * (ranks - 1) / ranks for size in sizes]
            points = {f"{size / MIB:g}": round(ms, 4) for size, ms in zip(sizes, values)}
            tables.setdefault(name, {})[str(ranks)] = {**fitted(moved, values), "ms_by_mib": points}
        if rank == 0:
            write(Path(options["output"]), tables, device)
    dist.barrier()
    dist.destroy_process_group()


def write(output: Path, tables: dict[str, Any], device: str) -> None:
    """Write what was measured so far."""
    import torch

    cuda = device == "cuda"
    head = {
        "hardware": f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()} of one host" if cuda else "CPU",
        "versions": {"torch": torch.__version__, "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else ""},
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "method": "python benchmarks/collectives.py; NVLink multicast off",
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({**head, "nccl": tables}, indent=1) + "\n")
    for name, by_ranks in tables.items():
        print(name, {ranks: (entry["latency_ms"], entry["gb_s"]) for ranks, entry in by_ranks.items()}, flush=True)


def main() -> None:
    options = dict(argument.partition("=")[::2] for argument in sys.argv[1:])
    defaults = {"output": "", "sizes_mib": "16,32,64,128,256", "repeats": "30", "gpus": ""}
    if not set(options) <= set(defaults) or not options.get("output"):
        sys.exit(__doc__)
    import torch
    import torch.multiprocessing

    # A program that uses multicast can put a shared host's GPUs out of service.
    os.environ |= {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
    options = {**defaults, **options}
    world = int(options["gpus"] or torch.cuda.device_count())
    torch.multiprocessing.spawn(worker, (world, options), nprocs=world)


if __name__ == "__main__":
    main()
