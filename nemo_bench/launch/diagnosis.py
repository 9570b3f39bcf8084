"""Why a run failed, in words, and what to change: from its ranks' exceptions, its logs and the table `causes.yaml`."""

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
LOG_LINES = 600  # of a log's end, which holds a C++ stack trace of each process group after the lines of interest

# torch's words in the log of a rank that saw a time-out; others are told of it before torch ends them.
_TIMEOUT, _TOLD = "Watchdog caught collective operation timeout", "Received a dump signal due to a collective timeout"
# Lines that end a log without saying what the rank was doing.
_ABORT = re.compile(r"ProcessGroupNCCL|TCPStore|^\s*frame #|terminate called|what\(\):|most recent call first|^\s*$")


@dataclass(frozen=True)
class Cause:
    """An entry of `causes.yaml`, whose head describes the fields."""

    pattern: str
    meaning: str
    remedy: str = ""
    source: str = ""
    numbers: str = ""


def diagnose(
    cfg: TrainConfig, run: RunFolder, rank: int | None, error: Mapping[str, Any] | None
) -> tuple[str, list[str]]:
    """Return why a run failed, and lines: what to do, the first error and its log.

    The reason is the cause, if that is known, else the first error's own words, if there are any. `rank` failed first,
    if that is known, and left `error` (write_rank_error).
    """
    if error is not None and error["type"] == BenchError.__name__:  # it says itself what is wrong
        refusal, *remedies = str(error["message"]).splitlines()
        return refusal, remedies
    paths = {number: run.log(number) for number in range(cfg.world_size)}
    logs = {number: "\n".join(tail(path, LOG_LINES)) for number, path in paths.items() if path.exists()}
    first = first_error(run.path, rank)
    own_words, text = (first.line, first.text) if first else ("", "")
    raised = error if error is not None and not (first and first.killed) else None
    if raised is not None:
        own_words, text = str(raised["message"]).strip().partition("\n")[0], f"{raised['type']}: {raised['message']}"
    reason, *advice = explain(cfg, text, logs) or [own_words]
    if first:
        advice.append(f"first error, in {first.log}: {first.line}")
    return f"{raised['type']}: {reason}" if raised is not None else reason, advice


def failure_text(run_dir: Path) -> str:
    """Return a failed run's first error and what it means; empty if its logs have none."""
    run = RunFolder(run_dir)
    try:
        error = next(iter(run.rank_errors()), None)
        reason, advice = diagnose(load(run_dir / CONFIG), run, int(error["rank"]) if error else None, error)
    except (BenchError, OSError, ValueError) as problem:  # a full disk may have cut the record off
        return f"unreadable record: {problem}"
    where = f"rank {error['rank']} on {error['host']}: " if error else ""
    return "\n".join([f"{where}{reason}", *advice])


def explain(cfg: TrainConfig, text: str, logs: Mapping[int, str]) -> list[str] | None:
    """Return a line about the cause and lines about what to do; None if the cause is not known.

    `text`: the exception's message, or the log from the first error on; `logs`: each rank's end.
    """
    if _TOLD in text:
        text = next((log for log in logs.values() if _TIMEOUT in log), text)
    causes, problem, own = read_causes(CAUSES), [], Path(cfg.stage_path) / CAUSES.name
    try:
        causes = (read_causes(own) if own.exists() else []) + causes
    except BenchError as error:  # must not hide why the run failed
        problem = str(error).splitlines()
    for cause in causes:
        if match := re.search(cause.pattern, text, re.MULTILINE):
            values = {"vocab_size": f"{cfg.padded_vocab_size:,}", **match.groupdict("")}
            texts = [Template(text).safe_substitute(values).strip() for text in (cause.meaning, cause.remedy)]
            numbers = {"memory": _memory, "ranks": _ranks_that_waited}.get(cause.numbers)
            own_numbers = numbers(cfg, logs) if numbers else []
            return [texts[0].removesuffix(":"), *own_numbers, *filter(None, texts[1:]), *problem]
    return None


def read_causes(path: Path) -> list[Cause]:
    """Return the entries of a table of causes; raise BenchError if it is not one."""
    try:
        causes = [Cause(**entry) for entry in yaml.safe_load(path.read_text()) or []]
        for cause in causes:
            re.compile(cause.pattern)
    except (yaml.YAMLError, TypeError, re.error) as error:
        raise BenchError(f"{path} is not a table of causes: {error}\n{CAUSES} describes its form") from None
    return causes


def _memory(cfg: TrainConfig, logs: Mapping[int, str]) -> list[str]:
    """Return what the configuration needs by the estimate, and what needs less."""
    if not entrypoint_of(cfg).memory_is_estimated:
        return []
    need = estimate_memory(cfg)
    sizes = {name.removesuffix("_bytes"): size for name, size in vars(need).items() if name != "stage"}
    parts = ", ".join(f"{name.replace('_', ' ')} {size / GIB:.1f}" for name, size in sizes.items())
    return [
        f"needed by this configuration, estimated: {need.total_bytes / GIB:.1f} GiB on a GPU of pipeline stage "
        f"{need.stage} ({parts}: activations and logits are free by then), plus what CUDA and NCCL take",
        f"what takes less, by the same estimate: {smaller_configurations(cfg)}",
    ]


def _ranks_that_waited(cfg: TrainConfig, logs: Mapping[int, str]) -> list[str]:
    """Return which ranks reported a time-out, and which of the others to look at first."""
    reported = sorted(rank for rank, log in logs.items() if _TIMEOUT in log)
    lines = [f"reported by {_ranks(reported)}"] if reported else []
    if silent := sorted(set(range(cfg.world_size)) - {*reported}):
        lines.append(f"not reported by {_ranks(silent)}, for which the others may have waited: look there first")
        return lines + [f"  rank{rank}.out ends: {_last_line(logs.get(rank, ''))}" for rank in silent[:3]]
    return [*lines, "all ranks reported it: the network or a GPU is a likelier cause than one process"]


def _ranks(ranks: list[int]) -> str:
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'' if len(ranks) == 1 else 's'} {', '.join(map(str, ranks[:8]))}{more}"


def _last_line(log: str) -> str:
    return next((line[:160] for line in reversed(log.splitlines()) if not _ABORT.search(line)), "(nothing)")
