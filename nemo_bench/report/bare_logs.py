"""Bare logs of anybody's training as a report takes them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from nemo_bench import flops
from nemo_bench.record.redaction import redact
from nemo_bench.report import ranks, runs
from nemo_bench.report.logs import Log, read_log
from nemo_bench.report.model import Run
from nemo_bench.report.references import architecture_in_recipe

_SIZES = {size.name for size in fields(flops.Architecture)} - {"vocab_size"}
_PRECISION = re.compile(r"(?:bf16|fp8|fp16|fp32|mxfp8|nvfp4)(?:_\w+)?$")


@dataclass(frozen=True)
class Given:
    """What the command line says of bare logs; None where their path or content may tell."""

    # names of the configuration groups
    model: str | None = None
    precision: str | None = None
    gpu: str | None = None
    gpus: int | None = None  # in the whole job
    global_batch_size: int | None = None  # sequences
    seq_length: int | None = None  # tokens
    max_steps: int | None = None  # meant
    architecture: flops.Architecture | None = None  # the model's sizes; None: those of conf/model/<model>.yaml


def load_log(path: Path, others: Sequence[Path], given: Given, total_tokens: float) -> Run:
    """Return the run that a log file tells of, as far as it, its path and `given` go; OSError if it cannot be read.

    `others` are the files of the job's other ranks: the slowest ends each step.
    """
    logs = [read_log(file) for file in (path, *others)]
    log = max(logs, key=lambda log: (len(log.steps), log.steps.loss.count(None) == 0))
    for other in logs:
        for i, time_s in enumerate(other.steps.time_s):
            log.steps.time_s[i] = max(log.steps.time_s[i], time_s)
    run, warnings = _with_model(_identified(path, given, log), given, log), runs.log_warnings(log)
    keys = ("model", "precision", "gpus", "global_batch_size", "seq_length")
    missing = [key for key in keys if not getattr(run, key)]
    if log.steps and missing:
        warnings.append(f"not known from its path or content: name it with {' '.join(f'{key}=...' for key in missing)}")
    elif log.steps and run.gpu is None:
        warnings.append(f"no MFU: name the device with gpu=... ({', '.join(runs.options('gpu'))})")
    max_steps = given.max_steps or (log.max_steps if log.max_steps is not None else log.total)
    state, why = _log_state(log, max_steps)
    if state == "completed" and log.last_error:
        warnings.append(f"after its last step, the log ends in an error: {redact(log.last_error)}")
    run = replace(
        run,
        state=state,
        why_not_final=why,
        max_steps=max_steps,
        steps=log.steps,
        ranks=ranks.compared((), {}, log),
        warnings=tuple(warnings),
    )
    known = run.gpu is not None and run.precision is not None
    peak = runs.peak(runs.choice("gpu", str(run.gpu)), str(run.precision), {}) if known else (None, None)
    return runs.measured(run, log, peak, total_tokens)


def _identified(path: Path, given: Given, log: Log) -> Run:
    """Return what the run is, and where each part of it comes from: the command line before the path before the log."""
    values: dict[str, Any] = {"global_batch_size": log.global_batch_size}
    sources = {"global_batch_size": "log"} if log.global_batch_size else {}
    # <version>/<precision>/<model>/<gpus>/..., the recipe's layout
    parts = path.absolute().parent.parts
    for i in range(len(parts) - 3, 0, -1):
        if _PRECISION.match(parts[i].lower()) and re.fullmatch(r"[0-9]{1,7}", parts[i + 2]):
            named = {"version": parts[i - 1], "precision": parts[i].lower(), "model": parts[i + 1].lower()}
            # Releases of 2024 are NeMo 1's: of another program's log the folder's name tells no software.
            software = log.program if log.program and parts[i - 1].startswith("24.") else parts[i - 1]
            values |= {**named, "software": software, "gpus": int(parts[i + 2])}
            sources |= dict.fromkeys((*named, "gpus"), "path")
            break
    keys = ("model", "precision", "gpus", "gpu", "global_batch_size", "seq_length")
    chosen = {key: getattr(given, key) for key in keys if getattr(given, key) is not None}
    remarks = [
        f"{key}={value} is given, and its path says {values[key]}"
        for key, value in chosen.items()
        if sources.get(key) == "path" and value != values[key]
    ]
    sources |= dict.fromkeys(chosen, "command line")
    about: dict[str, Any] = {**values, **chosen, "identified": sources, "remarks": tuple(remarks)}
    return Run(name=path.name, path=str(path), source="log", **about)


def _with_model(run: Run, given: Given, log: Log) -> Run:
    """Return the run with its model's sizes and sequence length: given, printed, the recipe's, or conf/model's."""
    if run.model not in runs.options("model"):
        return replace(run, architecture=given.architecture)
    conf = runs.choice("model", str(run.model))
    recipes = architecture_in_recipe(run.version, run.model, run.precision, run.gpus)
    printed = {key: int(text) for key, text in log.printed.items() if key in _SIZES and text.isdecimal()}
    sizes = given.architecture or replace(recipes or runs.architecture_of(conf), **printed)
    if run.seq_length is not None:
        return replace(run, architecture=sizes)
    identified = {**run.identified, "seq_length": f"conf/model/{run.model}.yaml"}
    seq_length = int(log.printed.get("seq_length", conf["seq_length"]))
    return replace(run, architecture=sizes, seq_length=seq_length, identified=identified)


def _log_state(log: Log, max_steps: int | None) -> tuple[str, str | None]:
    because = f": {redact(log.last_error)}" if log.last_error else ""
    if not log.steps:
        framework = f"; it looks like {log.framework}'s, which is not read" if log.framework else ""
        return "unknown", f"no line with train_step_timing and a step{framework}{because}"
    if log.unreadable_end:
        return "incomplete", f"the log is unreadable after step {log.steps.last}{because}"
    if log.reached or (max_steps is not None and (log.done or 0) >= max_steps):
        return "completed", None
    if max_steps is None and not log.last_error:
        return "unknown", None
    of = "" if max_steps is None else f" of {max_steps}"
    return "incomplete", f"the log ends at step {log.done}{of}{because}"
