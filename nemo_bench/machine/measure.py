"""What a rank measures of its device and its links: the only module of this room that imports torch."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nemo_bench.config import TrainConfig
from nemo_bench.machine import node
from nemo_bench.training.gpu import check_gpu, open_sampler

MIB = 1 << 20
E4M3_MAX = 448.0
JOIN_S = 60
PINGS = 20
PAIR_S = 0.6  # in which two ranks send each other what they can, one after the other


def sustained(action: Callable[[], object], synchronize: Callable[[], object], chunk: int, seconds: float) -> float:
    """Return how often a second an action runs, over the last half of `seconds`; it is waited for once a chunk."""
    for _ in range(2):  # a GPU's first seconds are at clocks that its power limit does not let it hold
        count, start = 0, time.perf_counter()
        while (elapsed_s := time.perf_counter() - start) < seconds / 2:
            for _ in range(chunk):
                action()
            synchronize()
            count += chunk
    return count / elapsed_s


class Measures:
    """The tasks of a rank; each returns what it found as JSON."""

    def __init__(self, cfg: TrainConfig, rank: int, folder: Path) -> None:
        self.cfg, self.rank, self.folder = cfg, rank, folder
        self.on_gpu, self.local_rank = cfg.gpu.device == "cuda", rank % cfg.trainer.devices
        self.device = torch.device(f"cuda:{self.local_rank}" if self.on_gpu else "cpu")
        if self.on_gpu:
            check_gpu(cfg, self.local_rank)
            torch.cuda.set_device(self.device)
        elif "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // cfg.trainer.devices))

    def facts(self, of_node: bool) -> dict[str, Any]:
        """Return the rank's environment and, where it is asked for, what is its node's."""
        return {"environment": node.environment(), "node": node.node_facts(self.folder) if of_node else None}

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def compute(self, precisions: list[str]) -> dict[str, Any]:
        """Return the matrix rate in each number format (TFLOP/s), memory bandwidth, and the GPU's state meanwhile."""
        size, seconds, chunk = (8192, 5.0, 16) if self.on_gpu else (512, 2.0, 1)
        sampler = open_sampler(torch.cuda.get_device_properties(self.device)) if self.on_gpu else None
        rates = {}
        for precision in precisions:
            rate = sustained(self._product(precision, size), self.synchronize, chunk, seconds)
            rates[f"{precision}_tflops"] = 2 * size**3 * rate / 1e12
        found = {"rates": rates, "clocks": {}, "gpu": None}
        if sampler:  # while the GPU is at its clocks and links at their speed
            found |= {"clocks": sampler.take(), "gpu": node.gpu_facts(sampler.nvml, sampler.handle)}
            sampler.stop()
        copied = torch.empty((2048 if self.on_gpu else 32) * MIB, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(copied)
        rate = sustained(lambda: target.copy_(copied), self.synchronize, 1, seconds / 10)
        rates["memory_gb_s"] = 2 * copied.numel() * rate / 1e9
        if self.on_gpu:
            host = torch.empty(256 * MIB, dtype=torch.uint8, pin_memory=True)
            part = target[: host.numel()]
            rate = sustained(lambda: part.copy_(host, non_blocking=True), self.synchronize, 1, seconds / 10)
            rates["to_device_gb_s"] = host.numel() * rate / 1e9
            del copied, target, part
            torch.cuda.empty_cache()
        return found

    def _product(self, precision: str, size: int) -> Callable[[], object]:
        """Return what multiplies two random matrices once, as benchmarks/peers/matrix_rate.py does."""
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        left, right = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
        if precision != "fp8":
            result = torch.empty_like(left)
            return lambda: torch.mm(left, right, out=result)
        scales = [E4M3_MAX / matrix.abs().max().float() for matrix in (left, right)]
        left8, right8 = (
            (matrix.float() * scale).to(torch.float8_e4m3fn) for matrix, scale in zip((left, right), scales)
        )
        columns = right8.t().contiguous().t()  # the hardware multiplies rows by columns
        inverse = [scale.reciprocal() for scale in scales]
        return lambda: torch._scaled_mm(left8, columns, *inverse, out_dtype=torch.bfloat16, use_fast_accum=True)

    def join(self, port: int) -> list[str]:
        """Set up torch.distributed; return the network that NCCL uses, where this rank writes its log."""
        log = self.folder / f"nccl.{self.rank}.log"
        if self.on_gpu and self.local_rank == 0:
            os.environ |= {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,NET", "NCCL_DEBUG_FILE": str(log)}
        dist.init_process_group(
            "nccl" if self.on_gpu else "gloo",
            init_method=f"tcp://{os.environ['MASTER_ADDR']}:{port}",
            rank=self.rank,
            world_size=self.cfg.world_size,
            timeout=timedelta(seconds=JOIN_S),
        )
        dist.all_reduce(torch.ones(1, device=self.device))  # NCCL connects here
        self.synchronize()
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        networks = {line.rpartition("Using network ")[2].strip() for line in lines if "Using network " in line}
        return sorted(networks)

    def pair(self, opponent: int | None) -> dict[str, float] | None:
        """Return the latency to another rank, and what comes from it while nothing goes the other way."""
        if opponent is None:
            return None
        first, in_s = self.rank < opponent, 0.0
        small, large = (
            torch.ones(size, dtype=torch.uint8, device=self.device)
            for size in (1024, (256 if self.on_gpu else 1) * MIB)
        )
        turns = (first, not first)  # whether this one sends
        for _ in range(2):  # NCCL connects the two in the first
            both_s = self._timed(lambda: self._messages(large, opponent, turns), 1)
        number = torch.tensor(int(max(1, min(PAIR_S / both_s, 64))), device=self.device)
        self._messages(number, opponent, (first,))  # the first decides
        latency_s = self._timed(lambda: self._messages(small, opponent, turns), PINGS)
        count = int(number.item())
        for sends in turns:
            seconds = self._timed(functools.partial(self._messages, large, opponent, (sends,) * count), 1)
            in_s = in_s if sends else seconds
        return {"latency_us": latency_s / 2 * 1e6, "gb_s": large.numel() * count / in_s / 1e9}

    def _messages(self, tensor: torch.Tensor, peer: int, turns: tuple[bool, ...]) -> None:
        """Send a tensor, or receive it, as often as there are turns."""
        for sends in turns:
            _exchange([dist.P2POp(dist.isend if sends else dist.irecv, tensor, peer)])

    def _timed(self, action: Callable[[], object], count: int) -> float:
        self.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            action()
        self.synchronize()
        return (time.perf_counter() - start) / count

    def group(self, which: list[Any]) -> dict[str, float]:
        """Return what a process group of the layout reaches, by operation and size: GB/s that a rank moves.

        Of an all-gather or reduce-scatter of `size` in all, a rank moves (n - 1)/n of it (nccl-tests' bus bandwidth).
        """
        name, ranks = which
        group = dist.new_group(ranks, use_local_synchronization=True)
        rates = {}
        for mib in (16, 64, 256) if self.on_gpu else (1,):
            whole = torch.zeros(mib * MIB // 2 // len(ranks) * len(ranks), dtype=torch.bfloat16, device=self.device)
            part, gb = whole[: whole.numel() // len(ranks)].clone(), 2 * whole.numel() / 1e9
            actions = {"all-gather": functools.partial(dist.all_gather_into_tensor, whole, part, group)}
            if self.on_gpu:  # gloo has none
                actions["reduce-scatter"] = functools.partial(dist.reduce_scatter_tensor, part, whole, group=group)
            moved_gb = gb * (len(ranks) - 1) / len(ranks)
            if name == "PP":
                place, received = ranks.index(self.rank), torch.empty_like(whole)
                to = dist.P2POp(dist.isend, whole, ranks[(place + 1) % len(ranks)], group)
                ring = [to, dist.P2POp(dist.irecv, received, ranks[place - 1], group)]
                actions, moved_gb = {"p2p": functools.partial(_exchange, ring)}, gb
            for operation, action in actions.items():
                self._timed(action, 3)
                rates[f"{operation} {mib} MiB"] = moved_gb / self._timed(action, 10 if self.on_gpu else 3)
        return rates


def _exchange(operations: list[Any]) -> None:
    for work in dist.batch_isend_irecv(operations):
        work.wait()
