"""Why a run failed, in words, and what to change: read from its ranks' exceptions and logs, and from Slurm's.

Running out of memory and time-outs of collectives are explained with this run's own numbers; all other known causes
stand in `causes.yaml`. An unknown failure keeps its own words: its first error line, and the file it stands in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import yaml

from nemo_bench.checks.smaller import smaller_configurations
from nemo_bench.config import TrainConfig, load
from nemo_bench.entrypoints import entrypoint_of
from nemo_bench.errors import BenchError
from nemo_bench.memory import GIB, estimate_memory
from nemo_bench.record.first_error import first_error
from nemo_bench.record.folder import CONFIG, RunFolder, tail

CAUSES = Path(__file__).with_name("causes.yaml")
# The end of a log: it holds a C++ stack trace of each process group after the lines of interest.
LOG_LINES = 600
SHOWN_RANKS = 8


@dataclass(frozen=True)
class Diagnosis:
    """What the user reads of a failed run."""

    cause: str | None  # None if it is not known
    advice: list[str]  # what to do, then the first error and its log
    error_line: str = ""
    refused: bool = False  # the rank said itself what is wrong: a BenchError


def diagnose(cfg: TrainConfig, run: RunFolder, rank: int | None, error: Mapping[str, Any] | None) -> Diagnosis:
    """Return why a run failed.

    Args:
        rank: the rank that failed first; None if that is not known.
        error: its exception as RunFolder.write_rank_error wrote it; None if it left none.
    """
    if error is not None and error["type"] == BenchError.__name__:
        refusal, *remedies = str(error["message"]).splitlines()
        return Diagnosis(refusal, remedies, refused=True)
    paths = {number: run.log(number) for number in range(cfg.world_size)}
    logs = {number: "\n".join(tail(path, LOG_LINES)) for number, path in paths.items() if path.exists()}
    first = first_error(run.path, rank)
    if error is not None and (first is None or first.killed_rank is None):
        lines = explain(cfg, int(error["rank"]), f"{error['type']}: {error['message']}", logs)
    else:
        suspects = [rank] if rank is not None else sorted(logs)
        explained = (_with_numbers(cfg, suspect, logs.get(suspect, ""), logs) for suspect in suspects)
        lines = next(filter(None, explained), None)
        if lines is None and first is not None:
            lines = explain(cfg, rank or 0, first.text, logs)
    cause, advice = (lines[0] if lines else None), (lines or [])[1:]
    if first is None:
        return Diagnosis(cause, advice)
    return Diagnosis(cause, [*advice, f"first error, in {first.log}: {first.line}"], first.line)


def failure_text(run_dir: Path) -> str:
    """Return a failed run's first error and what it means; empty if its logs have none."""
    run = RunFolder(run_dir)
    try:
        error = next(iter(run.rank_errors()), None)
        diagnosis = diagnose(load(run_dir / CONFIG), run, int(error["rank"]) if error else None, error)
    except (OSError, ValueError) as problem:  # a full disk may have cut the record off
        return f"unreadable record: {problem}"
    own_words = [f"rank {error['rank']} on {error['host']}: {error['type']}: {error['message']}"] if error else []
    if diagnosis.refused:
        return own_words[0]
    return "\n".join([*own_words, *filter(None, [diagnosis.cause]), *diagnosis.advice])


def explain(cfg: TrainConfig, rank: int, text: str, logs: Mapping[int, str]) -> list[str] | None:
    """Return a line about the cause and lines about what to do; None if the cause is not known.

    Args:
        rank: the rank that failed first.
        text: its exception's message; without one, its log from the first error on.
        logs: the end of each rank's log, by rank.
    """
    return _with_numbers(cfg, rank, text, logs) or known_cause(
        text, Path(cfg.stage_path), {"vocab_size": f"{cfg.padded_vocab_size:,}"}
    )


def _with_numbers(cfg: TrainConfig, rank: int, text: str, logs: Mapping[int, str]) -> list[str] | None:
    """Explain what is explained with this run's numbers; its patterns are safe to look for in a whole log."""
    return _collective_timeout(cfg, rank, text, logs) or _out_of_memory(cfg, text)


# --- memory -------------------------------------------------------------------------------------------------

_OUT_OF_MEMORY = re.compile(
    r"CUDA out of memory|CUDA error: out of memory|Failed to CUDA (?:calloc|malloc)"
    r"|Cuda failure (?:\d+ )?'out of memory'|CU(?:BLAS|DNN)_STATUS_ALLOC_FAILED|cudaErrorMemoryAllocation"
)
# torch 2.1 to 2.11: what was asked for, then what the GPU has and who holds it.
_TORCH_WORDS = re.compile(
    r"(?m)CUDA out of memory\. Tried to allocate (?P<size>[\d.]+ \w+)\. *(?P<held>.*?) *(?:See documentation|$)"
)


def _out_of_memory(cfg: TrainConfig, text: str) -> list[str] | None:
    if not _OUT_OF_MEMORY.search(text):
        return None
    if torch_words := _TORCH_WORDS.search(text):
        lines = [f"out of GPU memory: asked for {torch_words['size']}", torch_words["held"]]
    else:
        lines = ["out of GPU memory (asked for outside PyTorch: by NCCL, cuBLAS, cuDNN or CUDA itself)"]
    if entrypoint_of(cfg).memory_is_estimated:
        need = estimate_memory(cfg)
        sizes = {name.removesuffix("_bytes"): size for name, size in vars(need).items() if name != "stage"}
        parts = ", ".join(f"{name.replace('_', ' ')} {size / GIB:.1f}" for name, size in sizes.items())
        lines += [
            f"needed by this configuration, estimated: {need.total_bytes / GIB:.1f} GiB on a GPU of pipeline stage "
            f"{need.stage} ({parts}: activations and logits are free by then), plus what CUDA and NCCL take",
            f"what takes less, by the same estimate: {smaller_configurations(cfg)}",
        ]
    return lines


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
# Lines that end a log without saying what the rank was doing.
_ABORT = re.compile(r"ProcessGroupNCCL|TCPStore|^\s*frame #|terminate called|what\(\):|most recent call first|^\s*$")


def _collective_timeout(cfg: TrainConfig, rank: int, text: str, logs: Mapping[int, str]) -> list[str] | None:
    if not _TIMEOUT.search(text) and _DUMP_SIGNAL not in text:
        return None
    texts = [*logs.items(), (rank, text)]
    reports = {number: match for number, log in texts if (match := _TIMEOUT.search(log))}
    if not reports:
        return None
    reporter = rank if rank in reports else min(reports)
    report = reports[reporter]
    states = {number: match for number, log in logs.items() if (match := _STATUS.search(log))}
    group = f" of process group {states[reporter]['group']}" if reporter in states else ""
    numel = f" of {int(report['numel']):,} elements" if report["numel"] else ""
    lines = [
        f"NCCL time-out: {report['operation']}{numel} (number {report['number']}{group}) did not end within "
        f"{int(report['limit']) / 1000:,.0f} s on {_ranks(sorted(reports))}"
    ]
    missing = sorted(set(range(cfg.world_size)) - {*reports})
    if missing:
        lines.append(f"not reported by {_ranks(missing)}, for which the others may have waited: look there first")
        lines += [f"  rank{silent}.out ends: {_last_line(logs.get(silent, ''))}" for silent in missing[:3]]
    elif behind := _behind(states):
        lines.append(f"{_ranks(behind)} had begun fewer collectives than the others: look there first")
    else:
        lines.append("all ranks reported it: the network or a GPU is a likelier cause than one process")
    lines.append(
        "NCCL_DEBUG=INFO says how the ranks connect; TORCH_NCCL_TRACE_BUFFER_SIZE=2000 makes torch name the stuck "
        "collective's caller; on the nodes: dmesg (Xid), ibstat, nvidia-smi"
    )
    return lines


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


def _last_line(log: str) -> str:
    lines = [line for line in log.splitlines() if not _ABORT.search(line)]
    return lines[-1][:160] if lines else "(nothing)"


# --- other known causes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cause:
    """An entry of `causes.yaml`, whose head describes the fields."""

    pattern: str
    meaning: str
    remedy: str = ""
    source: str = ""


def read_causes(path: Path) -> list[Cause]:
    """Return the entries of a table of causes; raise BenchError if it is not one."""
    try:
        causes = [Cause(**entry) for entry in yaml.safe_load(path.read_text()) or []]
        for cause in causes:
            re.compile(cause.pattern)
    except (yaml.YAMLError, TypeError, re.error) as error:
        raise BenchError(f"{path} is not a table of causes: {error}\n{CAUSES} describes its form") from None
    return causes


def known_cause(text: str, stage: Path, values: Mapping[str, object]) -> list[str] | None:
    """Return the meaning and the remedy of the first entry that matches `text`; None if there is none.

    The entries of the stage folder's own `causes.yaml` come first. In an entry, `$name` is one of `values` or a named
    group of its pattern.
    """
    causes, problem = read_causes(CAUSES), []
    if (own := stage / CAUSES.name).exists():
        try:
            causes = read_causes(own) + causes
        except BenchError as error:  # must not hide why the run failed
            problem = str(error).splitlines()
    for cause in causes:
        if match := re.search(cause.pattern, text, re.MULTILINE):
            values = {**values, **{name: group or "" for name, group in match.groupdict().items()}}
            lines = [Template(line).safe_substitute(values) for line in (cause.meaning, cause.remedy) if line]
            return [*(line.strip().removesuffix(":") for line in lines), *problem]
    return None
