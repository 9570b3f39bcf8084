"""Why a run failed, in words, and what to change: read from its ranks' exceptions and logs, and from Slurm's.

Running out of memory and time-outs of collectives are explained with this run's own numbers; all other known causes
stand in `causes.yaml`. An unknown failure keeps its own words: its first error line, and the file it stands in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_bench.checks.smaller import smaller_configurations
from nemo_bench.config import TrainConfig, load
from nemo_bench.entrypoints import entrypoint_of
from nemo_bench.errors import BenchError
from nemo_bench.launch.causes import known_cause
from nemo_bench.memory import GIB, MemoryEstimate, estimate_memory
from nemo_bench.record.first_error import FirstError, first_error
from nemo_bench.record.folder import CONFIG, RunFolder, tail
from nemo_bench.record.node import NODE

# The end of a log: it holds a C++ stack trace of each process group after the lines of interest.
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
        text: its exception's message; without one, its log from the first error on.
        logs: the end of each rank's log, by rank.
        software: versions of torch and driver, for messages about them; empty if they are not known.
    """

    cfg: TrainConfig
    rank: int
    text: str
    logs: Mapping[int, str]
    software: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """What the user reads of a failed run: its cause if that is known, with remedies; and its first error."""

    cause: str | None
    remedies: list[str]
    error: FirstError | None
    refused: bool = False  # the rank said itself what is wrong: a BenchError

    @property
    def headline(self) -> str:
        """Return the cause in one line; if it is not known, the error's own words."""
        return self.cause or (self.error.line if self.error else "")

    @property
    def advice(self) -> list[str]:
        """Return the lines after the headline."""
        return self.remedies + ([f"first error, in {self.error.log}: {self.error.line}"] if self.error else [])


def diagnose(cfg: TrainConfig, run: RunFolder, rank: int | None, error: Mapping[str, Any] | None) -> Diagnosis:
    """Return why a run failed.

    Args:
        cfg: the run's configuration.
        run: its folder.
        rank: the rank that failed first; None if that is not known.
        error: its exception as RunFolder.write_rank_error wrote it; None if it left none.
    """
    if error is not None and error["type"] == BenchError.__name__:
        headline, *remedies = str(error["message"]).splitlines()
        return Diagnosis(headline, remedies, None, refused=True)
    logs = {}
    for log_rank in range(cfg.world_size):
        if run.log(log_rank).exists():
            logs[log_rank] = "\n".join(tail(run.log(log_rank), LOG_LINES))
    first, software = first_error(run.path, rank), _software(run)
    suspects = [rank] if rank is not None else sorted(logs)
    if error is not None and (first is None or first.killed_rank is None):
        lines = explain(Evidence(cfg, int(error["rank"]), f"{error['type']}: {error['message']}", logs, software))
    else:
        evidence = [Evidence(cfg, suspect, logs.get(suspect, ""), logs, software) for suspect in suspects]
        lines = next(filter(None, map(_with_numbers, evidence)), None)
        if lines is None and first is not None:
            lines = explain(Evidence(cfg, rank or 0, first.text, logs, software))
    return Diagnosis(lines[0], lines[1:], first) if lines else Diagnosis(None, [], first)


def failure_text(run_dir: Path) -> str:
    """Return a failed run's first error and what it means; empty if its logs have none."""
    run = RunFolder(run_dir)
    error = next(iter(run.rank_errors()), None)
    diagnosis = diagnose(load(run_dir / CONFIG), run, int(error["rank"]) if error else None, error)
    own_words = [f"rank {error['rank']} on {error['host']}: {error['type']}: {error['message']}"] if error else []
    if diagnosis.refused:
        return own_words[0]
    return "\n".join([*own_words, *([diagnosis.cause] if diagnosis.cause else []), *diagnosis.advice])


def explain(evidence: Evidence) -> list[str] | None:
    """Return a line about the cause and lines about what to do; None if the cause is not known."""
    values = {
        "rank": evidence.rank,
        "vocab_size": f"{evidence.cfg.padded_vocab_size:,}",
        "software": f" ({evidence.software})" if evidence.software else "",
    }
    return _with_numbers(evidence) or known_cause(evidence.text, Path(evidence.cfg.stage_path), values)


def _with_numbers(evidence: Evidence) -> list[str] | None:
    """Explain what is explained with this run's numbers; its patterns are safe to look for in a whole log."""
    return _collective_timeout(evidence) or _stuck(evidence) or _out_of_memory(evidence)


def _software(run: RunFolder) -> str:
    if not (run.path / NODE).exists():
        return ""
    node = json.loads((run.path / NODE).read_text())
    gpus = node["gpus"] or [{}]
    versions = {"torch": node["packages"].get("torch"), "driver": gpus[0].get("driver_version")}
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version)


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


def _out_of_memory(evidence: Evidence) -> list[str] | None:
    if not _OUT_OF_MEMORY.search(evidence.text):
        return None
    cfg = evidence.cfg
    sizes = {name: match[1] for name, pattern in _TORCH_MEMORY.items() if (match := pattern.search(evidence.text))}
    by = "" if sizes else " (asked for outside PyTorch: by NCCL, cuBLAS, cuDNN or CUDA itself)"
    lines = [f"out of GPU memory{by}" + "".join(f"; {name} {size}" for name, size in sizes.items())]
    if "held by other processes" in sizes:
        lines.append("other processes use this GPU: nvidia-smi names them")
    if entrypoint_of(cfg).memory_is_estimated:
        estimate = estimate_memory(cfg)
        lines.append(f"needed by this configuration, estimated: {_estimated(estimate)}")
        lines.append(f"what takes less, by the same estimate: {smaller_configurations(cfg)}")
    if _bytes(sizes.get("reserved by PyTorch, unused", "0 bytes")) > FRAGMENTED_BYTES:
        lines.append(
            "much reserved and unused is fragmentation: export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
        )
    return lines


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
    text = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
    if estimate.optimizer_step_bytes:
        text += f"; in the optimizer's step {estimate.optimizer_step_bytes / GIB:.1f} instead of the last two"
    return (
        f"{estimate.total_bytes / GIB:.1f} GiB on a GPU of pipeline stage {estimate.stage} ({text}), "
        "plus what CUDA and NCCL take"
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
_DUMP_SIGNAL = "Received a dump signal due to a collective timeout from"
_STUCK = re.compile(r"ProcessGroupNCCL's watchdog got stuck for (\d+) seconds")
# Lines that end a log without saying what the rank was doing.
_ABORT = re.compile(r"ProcessGroupNCCL|TCPStore|^\s*frame #|terminate called|what\(\):|most recent call first|^\s*$")


def _collective_timeout(evidence: Evidence) -> list[str] | None:
    if not _TIMEOUT.search(evidence.text) and _DUMP_SIGNAL not in evidence.text:
        return None
    reports = {rank: match for rank, log in evidence.logs.items() if (match := _TIMEOUT.search(log))}
    if match := _TIMEOUT.search(evidence.text):
        reports[evidence.rank] = match
    if not reports:
        return None
    rank = evidence.rank if evidence.rank in reports else min(reports)
    first = reports[rank]
    states = {rank: match for rank, log in evidence.logs.items() if (match := _STATUS.search(log))}
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
        for silent in missing[:3]:
            lines.append(f"  rank{silent}.out ends: {_last_line(evidence.logs.get(silent))}")
    elif behind:
        lines.append(f"{_ranks(behind)} had begun fewer collectives than the others: look there first")
    else:
        lines.append("all ranks reported it: the network or a GPU is a likelier cause than one process")
    lines.append(
        "NCCL_DEBUG=INFO says how the ranks connect; TORCH_NCCL_TRACE_BUFFER_SIZE=2000 makes torch name the stuck "
        "collective's caller; on the nodes: dmesg (Xid), ibstat, nvidia-smi"
    )
    return lines


def _stuck(evidence: Evidence) -> list[str] | None:
    match = _STUCK.search(evidence.text)
    if match is None:
        return None
    return [
        f"a call of CUDA or NCCL hangs on rank {evidence.rank}: NCCL's watchdog stood still for {match[1]} s",
        "`dmesg | grep -i xid` and `nvidia-smi` on that node say whether the GPU still answers; if the wait is "
        "legitimate, TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC allows more",
    ]


def _behind(states: Mapping[int, re.Match[str]]) -> list[int]:
    """Return the ranks that had enqueued less than another rank of the same process group."""
    most: dict[str, int] = {}
    for state in states.values():
        most[state["group"]] = max(most.get(state["group"], -1), int(state["enqueued"]))
    return sorted(rank for rank, state in states.items() if int(state["enqueued"]) < most[state["group"]])


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:SHOWN_RANKS]))
    more = f" and {len(ranks) - SHOWN_RANKS} more" if len(ranks) > SHOWN_RANKS else ""
    return f"rank{'' if len(ranks) == 1 else 's'} {shown}{more}"


def _last_line(log: str | None) -> str:
    lines = [line for line in (log or "").splitlines() if not _ABORT.search(line)]
    return lines[-1][:160] if lines else "(nothing)"
