"""Why a rank failed, in words, and what to change: read from its exception, or from its log where a signal ended it.

The texts looked for are those of torch 2.4 to 2.11, NCCL 2.19 to 2.28 and CUDA. What is not known here is left to the
exception's own words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_bench.config import TrainConfig
from nemo_bench.entrypoints import entrypoint_of
from nemo_bench.errors import BenchError
from nemo_bench.memory import GIB, MemoryEstimate, estimate_memory, what_takes_less
from nemo_bench.record import folder as record
from nemo_bench.record.node import NODE

# Of a log: a C++ stack trace of each process group stands behind what is looked for.
LOG_LINES = 600
SHOWN_RANKS = 8
# More than this reserved by PyTorch and unused is worth a word.
FRAGMENTED_BYTES = 4 << 30


@dataclass(frozen=True)
class Evidence:
    """What is known of a failure.

    Attributes:
        cfg: the run's configuration.
        rank: the rank that failed first.
        text: its exception's message; the end of its log where there is none.
        logs: the end of each rank's log, by rank.
        software: versions of torch and driver, for messages about them; empty where they are not known.
    """

    cfg: TrainConfig
    rank: int
    text: str
    logs: Mapping[int, str]
    software: str = ""


def diagnose(cfg: TrainConfig, run_dir: Path, rank: int | None, error: Mapping[str, Any] | None) -> str | None:
    """Why `rank` failed: a line, and lines about what to do; None where that is not known.

    Args:
        cfg: the run's configuration.
        run_dir: its folder.
        rank: the rank that failed first; None: the first whose log explains a failure.
        error: its exception as record.write_rank_error wrote it; None where it left none.
    """
    if error is not None and error["type"] == BenchError.__name__:
        return str(error["message"])
    logs = {}
    for each in range(cfg.world_size):
        try:
            logs[each] = "\n".join(record.tail(record.RunFolder(run_dir).log(each), LOG_LINES))
        except OSError:
            continue
    software = _software(run_dir)
    if error is not None and rank is not None:
        return explain(Evidence(cfg, rank, f"{error['type']}: {error['message']}", logs, software))
    suspects = [rank] if rank is not None else sorted(logs)
    found = (explain(Evidence(cfg, each, logs.get(each, ""), logs, software)) for each in suspects)
    return next((text for text in found if text), None)


def explain(evidence: Evidence) -> str | None:
    """`diagnose`, of what has been read."""
    for explanation in (_collective_timeout, _out_of_memory, _unusable_gpu, _broken_gpu, _nccl_error):
        if text := explanation(evidence):
            return text
    return None


def _software(run_dir: Path) -> str:
    try:
        node = json.loads((run_dir / NODE).read_text())
        known = {"torch": node["packages"].get("torch"), "driver": (node["gpus"] or [{}])[0].get("driver_version")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""
    return ", ".join(f"{name} {version}" for name, version in known.items() if version)


# --- memory -------------------------------------------------------------------------------------------------

_OUT_OF_MEMORY = re.compile(
    r"CUDA out of memory|CUDA error: out of memory|Failed to CUDA (?:calloc|malloc)"
    r"|Cuda failure (?:\d+ )?'out of memory'|CU(?:BLAS|DNN)_STATUS_ALLOC_FAILED|cudaErrorMemoryAllocation"
)
_SIZE = r"(\d+(?:\.\d+)? (?:bytes|KiB|MiB|GiB))"
_TORCH_MEMORY = {
    "asked for": re.compile(rf"Tried to allocate {_SIZE}"),
    "the GPU has": re.compile(rf"total capac(?:i)?ty of {_SIZE}"),
    "free": re.compile(rf"of which {_SIZE} is free"),
    "this process holds": re.compile(rf"this process has {_SIZE} memory in use"),
    "in PyTorch's tensors": re.compile(rf"{_SIZE} is allocated by PyTorch"),
    "reserved by PyTorch, unused": re.compile(rf"{_SIZE} is reserved by PyTorch but unallocated"),
    "held by other processes": re.compile(rf"Process \d+ has {_SIZE} memory in use"),
}


def _out_of_memory(evidence: Evidence) -> str | None:
    if not _OUT_OF_MEMORY.search(evidence.text):
        return None
    cfg = evidence.cfg
    found = {name: match[1] for name, seen in _TORCH_MEMORY.items() if (match := seen.search(evidence.text))}
    by = "" if found else " (asked for outside of PyTorch: NCCL, cuBLAS, cuDNN or CUDA itself)"
    lines = [f"out of GPU memory{by}" + "".join(f"; {name} {size}" for name, size in found.items())]
    if "held by other processes" in found:
        lines.append("other processes use this GPU: nvidia-smi names them")
    if entrypoint_of(cfg).memory_is_estimated:
        estimate = estimate_memory(cfg)
        lines.append(f"needed by this configuration, estimated: {_estimated(estimate)}")
        lines.append(f"what takes less, by the same estimate: {what_takes_less(cfg)}")
    if _bytes(found.get("reserved by PyTorch, unused", "0 bytes")) > FRAGMENTED_BYTES:
        lines.append(
            "much reserved and unused is fragmentation: export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
        )
    return "\n".join(lines)


def _bytes(size: str) -> float:
    number, unit = size.split()
    return float(number) * {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}[unit]


def _estimated(estimate: MemoryEstimate) -> str:
    parts = {
        "parameters": estimate.parameters_bytes,
        "gradients": estimate.gradients_bytes,
        "optimizer state": estimate.optimizer_bytes,
        "activations": estimate.activations_bytes,
        "logits": estimate.logits_bytes,
    }
    told = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
    if estimate.optimizer_step_bytes:
        told += f"; in the optimizer's step {estimate.optimizer_step_bytes / GIB:.1f} instead of the last two"
    return (
        f"{estimate.total_bytes / GIB:.1f} GiB on a GPU of pipeline stage {estimate.stage} ({told}), "
        "and what CUDA and NCCL take"
    )


# --- collectives --------------------------------------------------------------------------------------------

# The number in "[Rank N]" is the rank within the process group; whose log it is tells the rank of the job.
_TIMEOUT = re.compile(
    r"Watchdog caught collective operation timeout: WorkNCCL\(SeqNum=(?P<number>\d+), OpType=(?P<operation>\w+),"
    r"(?: NumelIn=(?P<numel>\d+), NumelOut=\d+,)? Timeout\(ms\)=(?P<limit>\d+)\) ran for (?P<ran>\d+) milliseconds"
)
# torch 2.3 and 2.4: [PG 1 Rank 0]; later [PG ID 0 PG GUID 0(default_pg) Rank 0]
_STATUS = re.compile(
    r"\[PG (?:ID \d+ PG GUID )?(?P<group>[^\s\]]+) Rank \d+\].*?detected by watchdog at work(?: sequence id)?: \d+"
    r".*?last enqueued (?:NCCL )?work: (?P<enqueued>-?\d+), last completed (?:NCCL )?work: (?P<completed>-?\d+)"
)


# In the logs of ranks that did not see a time-out themselves, before torch ends them.
_TOLD = "Received a dump signal due to a collective timeout from"
_STUCK = re.compile(r"ProcessGroupNCCL's watchdog got stuck for (\d+) seconds")
# Lines that end a log without saying what the rank was doing.
_ABORT = re.compile(r"ProcessGroupNCCL|TCPStore|^\s*frame #|terminate called|what\(\):|most recent call first|^\s*$")


def _collective_timeout(evidence: Evidence) -> str | None:
    if not _TIMEOUT.search(evidence.text) and _TOLD not in evidence.text:
        return _stuck(evidence)
    reports = {rank: match for rank, log in evidence.logs.items() if (match := _TIMEOUT.search(log))}
    if match := _TIMEOUT.search(evidence.text):
        reports[evidence.rank] = match
    if not reports:
        return None
    rank = evidence.rank if evidence.rank in reports else min(reports)
    first = reports[rank]
    states = {each: match for each, log in evidence.logs.items() if (match := _STATUS.search(log))}
    group = f" of process group {states[rank]['group']}" if rank in states else ""
    numel = f" of {int(first['numel']):,} elements" if first["numel"] else ""
    lines = [
        f"NCCL time-out: {first['operation']}{numel} (number {first['number']}{group}) did not end within "
        f"{int(first['limit']) / 1000:,.0f} s on {_ranks(sorted(reports))}"
    ]
    missing = sorted(set(range(evidence.cfg.world_size)) - {*reports})
    behind = _behind(states)
    if missing:
        lines.append(f"not reported by {_ranks(missing)}, for which the others may have waited: look there first")
        for each in missing[:3]:
            lines.append(f"  {record.RunFolder(Path('.')).log(each)} ends: {_last_line(evidence.logs.get(each))}")
    elif behind:
        lines.append(f"{_ranks(behind)} had begun fewer collectives than the others: look there first")
    else:
        lines.append("all ranks reported it: the network or a GPU more likely than one process")
    lines.append(
        "NCCL_DEBUG=INFO says how the ranks connect; TORCH_NCCL_TRACE_BUFFER_SIZE=2000 makes torch name the stuck "
        "collective's caller; on the nodes: dmesg (Xid), ibstat, nvidia-smi"
    )
    return "\n".join(lines)


def _stuck(evidence: Evidence) -> str | None:
    match = _STUCK.search(evidence.text)
    if match is None:
        return None
    return (
        f"a call of CUDA or NCCL hangs on rank {evidence.rank}: NCCL's watchdog stood still for {match[1]} s\n"
        "`dmesg | grep -i xid` and `nvidia-smi` on that node say whether the GPU still answers; where the wait is "
        "legitimate, TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC allows for more"
    )


def _behind(states: Mapping[int, re.Match[str]]) -> list[int]:
    """Ranks that had enqueued less than another rank of the same process group."""
    found = []
    for rank, state in states.items():
        most = max(int(each["enqueued"]) for each in states.values() if each["group"] == state["group"])
        if int(state["enqueued"]) < most:
            found.append(rank)
    return sorted(found)


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:SHOWN_RANKS]))
    more = f" and {len(ranks) - SHOWN_RANKS} more" if len(ranks) > SHOWN_RANKS else ""
    return f"rank{'' if len(ranks) == 1 else 's'} {shown}{more}"


def _last_line(log: str | None) -> str:
    lines = [line for line in (log or "").splitlines() if not _ABORT.search(line)]
    return lines[-1][:160] if lines else "(nothing)"


_NCCL = re.compile(r"(nccl(?:UnhandledCudaError|SystemError|InternalError|InvalidArgument|InvalidUsage|RemoteError)): ")
_NCCL_LAST = re.compile(r"Last error:\s*\n(?P<said>[^\n]+)")
_NCCL_MEANING = {
    "ncclUnhandledCudaError": "a CUDA call inside NCCL failed",
    "ncclSystemError": "a system call failed: a socket, shared memory (/dev/shm), or the network's device",
    "ncclInternalError": "NCCL found itself in a state that cannot be: often ranks of different NCCL versions",
    "ncclInvalidArgument": "NCCL was called with a wrong argument",
    "ncclInvalidUsage": "NCCL was called in a wrong way: often two ranks on one GPU",
    "ncclRemoteError": "the connection to another rank broke: that rank ended, or the network did",
}


def _nccl_error(evidence: Evidence) -> str | None:
    match = _NCCL.search(evidence.text)
    if match is None:
        return None
    said = _NCCL_LAST.search(evidence.text)
    return (
        f"NCCL: {_NCCL_MEANING[match[1]]} ({match[1]}{': ' + said['said'].strip() if said else ''})\n"
        "NCCL_DEBUG=INFO says more; NCCL_SOCKET_IFNAME and NCCL_IB_HCA choose the network's devices"
    )


# --- the GPU ------------------------------------------------------------------------------------------------

_DRIVER_TOO_OLD = re.compile(r"driver on your system is too old \(found version (\d+)\)")


def _unusable_gpu(evidence: Evidence) -> str | None:
    text, software = evidence.text, f" ({evidence.software})" if evidence.software else ""
    if "no kernel image is available" in text:
        return (
            f"torch, Transformer Engine or another library holds no kernels for this GPU{software}\n"
            "`python -c 'import torch; print(torch.cuda.get_arch_list())'` shows torch's; a build of the library for "
            "this GPU mends it (TORCH_CUDA_ARCH_LIST, NVTE_CUDA_ARCHS)"
        )
    if match := _DRIVER_TOO_OLD.search(text):
        found = int(match[1])
        return (
            f"the GPU driver is too old for this torch: it offers CUDA {found // 1000}.{found % 1000 // 10}{software}\n"
            "a newer driver, or a build of torch for that CUDA (pytorch.org), mends it"
        )
    if "CUDA driver version is insufficient for CUDA runtime version" in text:
        return (
            f"the GPU driver is too old for a library's CUDA{software}\n"
            "a newer driver mends it, or a container or build of torch for the CUDA that nvidia-smi shows"
        )
    if "Found no NVIDIA driver" in text or "No CUDA GPUs are available" in text or "no CUDA-capable" in text:
        return (
            f"CUDA sees no GPU{software}: `nvidia-smi` on that node, CUDA_VISIBLE_DEVICES, and whether the container "
            "was given the GPUs tell why"
        )
    return None


_BROKEN = {
    "uncorrectable ECC error": "the GPU's memory has an uncorrectable error",
    "uncorrectable NVLink error": "an NVLink has an uncorrectable error",
    "unspecified launch failure": "a kernel died",
    "an illegal memory access was encountered": "a kernel read or wrote outside of its memory",
    "device-side assert triggered": "a kernel's assertion failed: often a token id outside of the vocabulary",
    "hardware error": "the GPU reports a hardware error",
    "Unable to determine the device handle for GPU": "the GPU is gone from the bus",
    "busy or unavailable": "the GPU is held by another process in exclusive mode, or out of service",
}


def _broken_gpu(evidence: Evidence) -> str | None:
    if "CUDA" not in evidence.text and "Cuda failure" not in evidence.text:
        return None
    for sign, meaning in _BROKEN.items():
        if sign in evidence.text:
            if sign == "device-side assert triggered":
                return f"{meaning}; this model has {evidence.cfg.padded_vocab_size:,} of them"
            return (
                f"{meaning}\n"
                "`dmesg | grep -i xid` and `nvidia-smi -q` on that node say whether it is the hardware (then "
                "cluster.exclude=NODE); CUDA_LAUNCH_BLOCKING=1 names the kernel's caller otherwise"
            )
    return None
