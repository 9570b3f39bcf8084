"""What a rank measures of its node, its device and its links; the only module of this room that imports torch."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nemo_bench.config import TrainConfig
from nemo_bench.record.machine import READ_FILE
from nemo_bench.record.node import kept_environment
from nemo_bench.training.gpu import check_gpu, open_sampler

MIB = 1 << 20
E4M3_MAX = 448.0
PAIR_S = 0.6  # in which two ranks send each other what they can, one after the other
PINGS = 20
HEAD_START_CYCLES = 10_000_000  # some 5 ms, in which the host gets ahead
# Xid numbers of NVIDIA's catalogue that speak of hardware, not of a program's mistake.
HARDWARE_XIDS = (48, 62, 63, 64, 74, 79, 92, 94, 95, 109, 119, 120, 140, 143)
_OWN_VARIABLES = re.compile(r"SLURM|PMI|(LOCAL_|NODE_)?RANK$|CUDA_VISIBLE_DEVICES")


class Measures:
    """The tasks of a rank; each returns what it measured as JSON."""

    def __init__(self, cfg: TrainConfig, rank: int, folder: Path) -> None:
        self.cfg, self.rank, self.folder = cfg, rank, folder
        self.on_gpu, self.local_rank = cfg.gpu.device == "cuda", rank % cfg.trainer.devices
        self.device = torch.device(f"cuda:{self.local_rank}" if self.on_gpu else "cpu")
        self.groups: dict[str, Any] = {}
        if self.on_gpu:
            check_gpu(cfg, self.local_rank)
            torch.cuda.set_device(self.device)
        elif "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // cfg.trainer.devices))
        names = [name for name in ("bf16", "fp8") if name in cfg.gpu.peak_tflops] if self.on_gpu else ["fp32"]
        self.size = 8192 if self.on_gpu else 512
        self.products = {name: self._product(name) for name in names}
        print(f"rank {rank} measures", flush=True)

    def facts(self, of_node: bool) -> dict[str, Any]:
        """Return the environment that the job really has and, where it is asked for, what is the node's."""
        kept = kept_environment(dict(os.environ))
        environment = {name: value for name, value in kept.items() if not _OWN_VARIABLES.match(name)}
        return {"environment": environment, "node": node_facts(self.folder / READ_FILE) if of_node else None}

    def compute(self, _: object) -> dict[str, Any]:
        """Return the matrix rate in each number format, memory bandwidth, and the GPU's state meanwhile."""
        seconds, chunk = (5.0, 16) if self.on_gpu else (2.0, 1)
        sampler = open_sampler(torch.cuda.get_device_properties(self.device)) if self.on_gpu else None
        rates = {}
        for name, product in self.products.items():
            rates[f"{name}_tflops"] = 2 * self.size**3 * self._sustained(product, chunk, seconds) / 1e12
        answer = {"rates": rates, "clocks": {}, "gpu": None}
        if sampler:  # while the GPU is at its clocks and links at their speed
            answer |= {"clocks": sampler.take(), "gpu": gpu_facts(sampler.nvml, sampler.handle)}
            sampler.stop()
        size = (2048 if self.on_gpu else 32) * MIB
        source, target = (torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(2))
        rate = self._sustained(functools.partial(target.copy_, source), 8, seconds / 10)
        rates["memory_gb_s"] = 2 * source.numel() * rate / 1e9
        if self.on_gpu:
            host = torch.empty(256 * MIB, dtype=torch.uint8, pin_memory=True)
            copy = functools.partial(target[: host.numel()].copy_, host, non_blocking=True)
            rates["to_device_gb_s"] = host.numel() * self._sustained(copy, 4, seconds / 10) / 1e9
            del source, target, copy
            torch.cuda.empty_cache()
        return answer

    def _sustained(self, action: Callable[[], object], chunk: int, seconds: float) -> float:
        """Return how often a second an action runs, over the last half of `seconds`, and waited for once a chunk.

        A GPU's first seconds are at clocks that its power limit does not let it hold. On a CPU, who is early goes on
        for a while: who is late would have its cores.
        """
        rates = []
        for _ in range(2 if self.on_gpu else 3):
            count, start = 0, time.perf_counter()
            while (elapsed_s := time.perf_counter() - start) < seconds / 2:
                for _ in range(chunk):
                    action()
                self._synchronize()
                count += chunk
            rates.append(count / elapsed_s)
        return rates[1]

    def _product(self, name: str) -> Callable[[], object]:
        """Return what multiplies two random matrices once, as benchmarks/peers/matrix_rate.py does."""
        dtype = torch.float32 if name == "fp32" else torch.bfloat16
        left, right = (torch.randn(self.size, self.size, device=self.device).to(dtype) for _ in range(2))
        if name != "fp8":
            return functools.partial(torch.mm, left, right, out=torch.empty_like(left))
        scales = [E4M3_MAX / matrix.abs().max().float() for matrix in (left, right)]
        small, other = ((m.float() * scale).to(torch.float8_e4m3fn) for m, scale in zip((left, right), scales))
        columns = other.t().contiguous().t()  # the hardware multiplies rows by columns
        inverse = [scale.reciprocal() for scale in scales]
        out = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
        return functools.partial(torch._scaled_mm, small, columns, *inverse, **out)

    def join(self, port: int) -> list[str]:
        """Set up torch.distributed; return the networks that NCCL uses, where this rank writes its log."""
        log = self.folder / f"nccl.{self.rank}.log"
        if self.on_gpu and self.local_rank == 0:
            os.environ |= {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,NET", "NCCL_DEBUG_FILE": str(log)}
        dist.init_process_group(
            "nccl" if self.on_gpu else "gloo",
            init_method=f"tcp://{os.environ['MASTER_ADDR']}:{port}",
            rank=self.rank,
            world_size=self.cfg.world_size,
            timeout=timedelta(minutes=1),
        )
        dist.all_reduce(torch.ones(1, device=self.device))  # NCCL connects here
        self._synchronize()
        text = log.read_text(errors="replace") if log.exists() else ""
        return sorted(set(re.findall(r"Using network (\w+)", text)))

    def pair(self, opponent: int | None) -> dict[str, float] | None:
        """Return the latency to another rank, and what comes from it while nothing goes the other way."""
        if opponent is None:
            return None
        first, in_s = self.rank < opponent, 0.0
        turns = (first, not first)  # whether this one sends
        sizes = (1024, (256 if self.on_gpu else 1) * MIB)
        small, large = (torch.ones(size, dtype=torch.uint8, device=self.device) for size in sizes)
        for _ in range(2):  # NCCL connects the two in the first
            both_s = self._timed(functools.partial(self._messages, large, opponent, turns), 1)
        number = torch.tensor(int(max(1, min(PAIR_S / both_s, 64))), device=self.device)
        self._messages(number, opponent, (first,))  # the first decides
        latency_s = self._timed(functools.partial(self._messages, small, opponent, turns), PINGS)
        count = int(number.item())
        for sends in turns:
            seconds = self._timed(functools.partial(self._messages, large, opponent, (sends,)), count)
            in_s = in_s if sends else seconds
        return {"latency_us": latency_s / 2 * 1e6, "gb_s": large.numel() / in_s / 1e9}

    def group(self, which: list[Any]) -> dict[str, float]:
        """Return what a process group of the layout reaches, by operation and size: GB/s that a rank moves.

        Of an all-gather or reduce-scatter of `size` in all, a rank moves (n - 1)/n of it (nccl-tests' bus bandwidth).
        """
        name, ranks = which
        if name not in self.groups:
            self.groups[name] = dist.new_group(ranks, use_local_synchronization=True)
        group, number, place = self.groups[name], len(ranks), ranks.index(self.rank)
        rates = {}
        for mib in (16, 64, 256) if self.on_gpu else (1,):
            whole = torch.zeros(mib * MIB // 2 // number * number, dtype=torch.bfloat16, device=self.device)
            part, gb = whole[: whole.numel() // number].clone(), 2 * whole.numel() / 1e9
            actions = {"all-gather": functools.partial(dist.all_gather_into_tensor, whole, part, group)}
            if self.on_gpu:  # gloo has none
                actions["reduce-scatter"] = functools.partial(dist.reduce_scatter_tensor, part, whole, group=group)
            if name == "PP":
                to = dist.P2POp(dist.isend, whole, ranks[(place + 1) % number], group)
                of = dist.P2POp(dist.irecv, torch.empty_like(whole), ranks[place - 1], group)
                actions = {"p2p": functools.partial(_exchange, [to, of])}
            for operation, action in actions.items():
                self._timed(action, 2)
                seconds = statistics.median(self._timed(action, 10 if self.on_gpu else 1) for _ in range(5))
                rates[f"{operation} {mib} MiB"] = gb / seconds * (1 if name == "PP" else (number - 1) / number)
        return rates

    def _messages(self, tensor: torch.Tensor, peer: int, turns: tuple[bool, ...]) -> None:
        for sends in turns:
            _exchange([dist.P2POp(dist.isend if sends else dist.irecv, tensor, peer)])

    def _timed(self, action: Callable[[], object], count: int) -> float:
        """Return the mean seconds of `count` actions; on a GPU by its own clock, with all of them queued before."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if self.on_gpu else []
        if events:
            torch.cuda._sleep(HEAD_START_CYCLES)
            action()  # ends on all ranks at once
            events[0].record()
        start = time.perf_counter()
        for _ in range(count):
            action()
        if not events:
            return (time.perf_counter() - start) / count
        events[1].record()
        self._synchronize()
        return float(events[0].elapsed_time(events[1])) / 1e3 / count

    def _synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


def _exchange(operations: list[Any]) -> None:
    for work in dist.batch_isend_irecv(operations):
        work.wait()


def node_facts(read_file: Path) -> dict[str, Any]:
    """Return what /sys, /proc and /etc say of this node; None where a facility is not there."""
    ports = {}
    for port in Path("/sys/class/infiniband").glob("*/ports/*"):
        ports[f"{port.parents[1].name}/{port.name}"] = f"{_text(port / 'state')}, {_text(port / 'rate')}"
    plugins = "".join(_text(path) or "" for path in Path("/etc/slurm").glob("plugstack.conf*"))
    kernel_log = subprocess.run(["dmesg"], capture_output=True, text=True, errors="replace").stdout
    xids = re.findall(r"NVRM: Xid \(PCI:([\da-fA-F:.]+)\): (\d+)", kernel_log)
    start, size = time.perf_counter(), 0
    with contextlib.suppress(OSError), open(read_file, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # past this node's own cache
        while part := file.read(4 * MIB):
            size += len(part)
    return {
        "driver": _text(Path("/proc/driver/nvidia/version")),
        "cpu_governor": _text(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        "hca_ports": ports or None,
        "enroot": re.findall(r"^\s*(ENROOT_\w+.*)", _text(Path("/etc/enroot/enroot.conf")) or "", re.M) or None,
        "pyxis": re.findall(r".*pyxis.*", plugins) or None,
        "xids": sorted({f"{gpu}: Xid {number}" for gpu, number in xids if int(number) in HARDWARE_XIDS}),
        "stage_read_gb_s": size / (time.perf_counter() - start) / 1e9,
    }


def _text(path: Path) -> str | None:
    with contextlib.suppress(OSError):
        return path.read_text().strip()
    return None


def gpu_facts(nvml: Any, handle: Any) -> dict[str, Any]:
    """Return what NVML says of a GPU that is at work; None for what it does not know."""

    def ask(name: str, *arguments: Any) -> Any:
        with contextlib.suppress(nvml.NVMLError):
            return getattr(nvml, f"nvmlDeviceGet{name}")(handle, *arguments)
        return None

    _, _, pending, failed = ask("RemappedRows") or (None,) * 4
    links = [link for link in range(nvml.NVML_NVLINK_MAX_LINKS) if ask("NvLinkState", link)]
    kinds = ("replay", "recovery", "crc")
    errors = {
        name: sum(ask("NvLinkErrorCounter", link, kind) or 0 for link in links) for kind, name in enumerate(kinds)
    }
    return {
        "serial": ask("Serial"),
        "power_limit_w": (ask("PowerManagementLimit") or 0) / 1000,
        "uncorrected_ecc": ask("TotalEccErrors", nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC),
        "row_remap_pending": pending,
        "row_remap_failed": failed,
        "pcie": [ask("CurrPcieLinkGeneration"), ask("CurrPcieLinkWidth")],
        "max_pcie": [ask("MaxPcieLinkGeneration"), ask("MaxPcieLinkWidth")],
        "nvlinks": len(links),
        "nvlink_errors": {name: number for name, number in errors.items() if number},
    }
