"""Run folders as a report takes them, and what every run has: its peak, its statistics, its numbers."""

from __future__ import annotations

import re
import statistics
from dataclasses import fields, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from nemo_bench import flops
from nemo_bench.errors import BenchError
from nemo_bench.files import plain_yaml
from nemo_bench.project import PROJECT
from nemo_bench.record.first_error import by_number
from nemo_bench.record.folder import CONFIG, EVENTS, PROFILE, STEPS, RunFolder, Status, read_lines, read_object
from nemo_bench.record.node import NODE, kept_environment
from nemo_bench.record.redaction import redact, redact_values
from nemo_bench.record.stall import said_of_ranks
from nemo_bench.report import profile as step_profile
from nemo_bench.report import ranks, remarks
from nemo_bench.report.logs import Log, read_log
from nemo_bench.report.model import SHORT_NAMES, Numbers, Record, Run
from nemo_bench.report.statistics import CHECKPOINT, MIN_STEADY_STEPS, OTHER_BATCH, VALIDATION, Steps, step_times
from nemo_bench.report.statistics import PROFILE as PROFILED

DEFAULT_TOTAL_TOKENS = 1e12
LAST_LOSSES = 5  # whose mean is called the last loss: a single step's is noisy
_REPEATED = "{} steps were done again after a restart; the later ones count"
# Share of its time that rank 0 waited for a core, beyond which its steps tell of the machine's load.
_LONGEST_WAIT = 0.25
_LOADED = (
    "this machine was loaded: rank 0 waited for a core in {:.0%} of its time; leave it alone, or set "
    "OMP_WAIT_POLICY=PASSIVE beside other trainings"
)
_SOCKETS = (
    'NCCL takes TCP sockets between the nodes ("Using network Socket"), which is slow: NCCL_DEBUG=INFO says '
    "why it finds no InfiniBand or RoCE; NCCL_IB_HCA names the adapters"
)
_GPUS_A_NODE = 8  # at most: a bare log does not tell its nodes
_MOST_PADDING = 128 * 128  # Megatron pads the vocabulary to a multiple of 128 TP

_CONF = PROJECT / "conf"
# The Python YAML loader reads a configuration in 25 ms, this one in 2.
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
Peak = tuple[float | None, str | None]  # dense, of a GPU, in TFLOP/s; where it comes from
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError, OSError, yaml.YAMLError)


def architecture_of(model: dict[str, Any]) -> flops.Architecture:
    return flops.Architecture(**{size.name: _count(model, size.name) for size in fields(flops.Architecture)})


def _count(section: dict[str, Any], name: str) -> int:
    """Return a setting that counts something; raise ValueError for less than one."""
    if (value := int(section[name])) < 1:
        raise ValueError(f"{name}={value} must be at least 1")
    return value


@cache
def options(group: str) -> list[str]:
    """Return the names of the choices of a configuration group (conf/<group>)."""
    return sorted(path.stem for path in (_CONF / group).glob("*.yaml"))


@cache
def choice(group: str, name: str) -> dict[str, Any]:
    """Return what a file of a configuration group sets in it, over the files of the group that it starts from."""
    content = yaml.load((_CONF / group / f"{name}.yaml").read_text(), _Loader)
    own = content.get(group, content)  # conf/gpu/cpu.yaml sets keys of other groups, too
    above = [choice(group, base) for base in own.pop("defaults", []) if base != "_self_"]
    return {key: value for content in [*above, own] for key, value in content.items()}


def load_run(run_dir: Path, total_tokens: float | None = None) -> Run:
    """Return the run that `run_dir` records; raise BenchError if its record is missing or damaged.

    Days to train are of `total_tokens`, or of what its configuration names.
    """
    if odd := [path.name for path in run_dir.iterdir() if path.exists() and not path.is_file() and not path.is_dir()]:
        raise BenchError(f"{run_dir}: the record cannot be read ({', '.join(odd)}: neither a file nor a folder)")
    try:
        return _load(RunFolder(run_dir), total_tokens)
    except _DAMAGE as error:
        what = str(error).partition("\n")[0]
        raise BenchError(f"{run_dir}: the record cannot be read ({type(error).__name__}: {what})") from None


def _load(folder: RunFolder, total_tokens: float | None) -> Run:
    config = yaml.load(plain_yaml(folder.path / CONFIG), _Loader)
    about, status, node_path = folder.read(), folder.status(), folder.path / NODE
    node = read_object(node_path) if node_path.exists() else {}  # a run that ended early has none
    rows, events = (read_lines(folder.path / name)[0] for name in (STEPS, EVENTS))
    log = read_log(folder.log(0)) if folder.log(0).is_file() else Log()
    run = _configured(folder.path, config)
    steps, warnings = _recorded_steps(rows, events)
    if not steps and log.steps:  # other entrypoints write no steps.jsonl
        steps = log.steps
        warnings += ["the steps are read from the log: four digits each", *_averaged(config), *log_warnings(log)]
    devices, peaks = ranks.read_devices(folder.path, rows), folder.measured_peaks()
    profiles = by_number((folder.path / PROFILE).glob("rank*.json"))
    if left_out := sorted({name for event in events for name in event.get("settings") or ()}):
        warnings.append(f"left out, since the installed version lacks them and does the same: {', '.join(left_out)}")
    ended = bool(events) and events[-1].get("event") == "done"
    state, why = _state(status, ended, steps, run.max_steps or 0, warnings)
    memory = [device.peak_memory_gib or 0 for device in devices] or [row.get("peak_memory_gib", 0) for row in rows]
    waited = max((event.get("cpu_wait_share") or 0 for event in events), default=0)
    run = replace(
        run,
        state=state,
        why_not_final=why,
        remarks=(*said_of_ranks(events), *([_LOADED.format(waited)] if waited > _LONGEST_WAIT else [])),
        gpu_reported=", ".join(dict.fromkeys(str(gpu["name"]) for gpu in node.get("gpus") or ())),
        software=_software(run, config, node),
        steps=steps,
        peak_memory_gib=max(memory, default=None),
        ranks=ranks.compared(devices, peaks, log),
        devices=devices,
        profiles=tuple(step_profile.from_dict(read_object(path)) for path in profiles),
        record=Record(
            started_at=about.get("created_at"),
            ended_at=status.ended_at,
            command=redact(about.get("command") or "") or None,
            overrides=tuple(map(redact, about.get("overrides") or ())),
            git=about.get("git"),
            config=redact_values(config),
            packages=node.get("packages") or {},
            hardware={key: value for key, value in node.items() if key not in ("packages", "environment")},
            environment=redact_values(kept_environment(node.get("environment") or {})),
            events=tuple({key: event.get(key) for key in ("event", "after_step", "time")} for event in events),
        ),
        warnings=tuple(warnings),
    )
    tokens = float(config.get("total_tokens", DEFAULT_TOTAL_TOKENS)) if total_tokens is None else total_tokens
    return measured(run, log, peak(config["gpu"], str(run.precision), peaks), tokens)


def _averaged(config: dict[str, Any]) -> list[str]:
    """Return what NeMo 1 was told of its step times, where they are not each step's own."""
    manager = (config.get("entrypoint") or {}).get("settings", {}).get("exp_manager", {})
    steps = (manager.get("step_timing_kwargs") or {}).get("buffer_size", 1)
    return [f"each step time is the mean of {steps} steps, the step and those before it"] if steps > 1 else []


def _configured(run_dir: Path, config: dict[str, Any]) -> Run:
    model, trainer = config["model"], config["trainer"]
    nodes, batch = _count(trainer, "num_nodes"), _count(model, "global_batch_size")
    gpus = nodes * _count(trainer, "devices")
    sizes = {name: short for name, short in SHORT_NAMES.items() if short != "GBS"}
    layout = {short: 1 if model.get(name) is None else _count(model, name) for name, short in sizes.items()}
    layout["DP"] = gpus // (layout["TP"] * layout["PP"] * layout["CP"])
    if layout["DP"]:
        layout["GA"] = batch // (layout["MBS"] * layout["DP"])
    container = (config.get("cluster") or {}).get("container")
    return Run(
        name=run_dir.name,
        path=str(run_dir),
        source="run folder",
        model=str(model["name"]),
        precision=str(config["precision"]["name"]),
        gpus=gpus,
        nodes=nodes,
        gpu=str(config["gpu"]["name"]),
        global_batch_size=batch,
        seq_length=_count(model, "seq_length"),
        layout=layout,
        architecture=architecture_of(model),
        version=config.get("results_version"),
        entrypoint=(config.get("entrypoint") or {}).get("name"),
        container=Path(str(container["image"])).name if container else None,
        data=(config.get("data") or {}).get("name"),
        identified=dict.fromkeys(("model", "precision", "gpus", "gpu", "global_batch_size"), "run record"),
        max_steps=_count(trainer, "max_steps"),
    )


def _software(run: Run, config: dict[str, Any], node: dict[str, Any]) -> str | None:
    """Return what trained: the container's release, else what was installed; not what the results folder is called."""
    if release := re.search(r"\d\d\.\d\d(?:\.\d+)?", run.container or ""):
        return release[0]
    bridge = (config.get("entrypoint") or {}).get("stack") == "megatron_bridge"
    name, package = ("bridge", "megatron-bridge") if bridge else ("nemo", "nemo_toolkit")
    version = (node.get("packages") or {}).get(package)
    return f"{name}-{version}" if version else None


def _recorded_steps(rows: list[dict[str, Any]], events: list[dict[str, Any]]) -> tuple[Steps, list[str]]:
    """Return the steps of steps.jsonl, with what events.jsonl says went on between them, and warnings."""
    steps, repeated = Steps(), 0
    for row in rows:
        loss, norm = (None if row.get(key) is None else float(row[key]) for key in ("loss", "grad_norm"))
        if row["step"] <= steps.last:  # after a requeue: the later one counts
            repeated += steps.restart(row["step"])
        steps.append(row["step"], float(row["train_step_timing_s"]), loss, norm)
    starts: list[int] = []
    paused: dict[int, str] = {}
    for event in events:
        if event.get("event") == "training":
            starts.append(int(event.get("first_step", 0)))
            paused = {after: reason for after, reason in paused.items() if after < starts[-1]}
        elif event.get("event") in (VALIDATION, CHECKPOINT, PROFILED) and event.get("after_step") is not None:
            paused[int(event["after_step"])] = str(event["event"])
    steps.restarts = sorted({*steps.restarts, *starts[1:]})
    # NeMo's timer stops before callbacks save and Lightning validates: the step that feels it is the next one.
    steps.excluded = [paused.get(before) for before in [-1, *steps.step][: len(steps)]]
    warnings = [_REPEATED.format(repeated)] if repeated else []
    if len(starts) > 1:
        warnings.append(f"started {len(starts)} times: see the events")
    return steps, warnings


def peak(gpu: dict[str, Any], precision: str, measured: dict[int, dict[str, Any]]) -> Peak:
    """Return the dense peak of a GPU (TFLOP/s), and where it comes from: published, else measured by the ranks."""
    published = (gpu.get("peak_tflops") or {}).get(precision.partition("_")[0])
    if published is not None:
        return float(published), f"{gpu.get('name')} {precision}, dense, published"
    if not measured:
        return None, None
    text = "measured: {dtype} matrix product of {size}^3 on {threads} threads a process"
    return statistics.fmean(peak["tflops"] for peak in measured.values()), text.format(**next(iter(measured.values())))


def _state(status: Status, ended: bool, steps: Steps, max_steps: int, warnings: list[str]) -> tuple[str, str | None]:
    """Return the run's state, and why its steps are not all there; an end after the last step is only worth a word."""
    state, done = status.state, steps.last + 1
    if state not in ("submitted", "running", "completed", "failed", "killed", "interrupted"):
        raise ValueError(f"unknown state {state}")
    if state in ("submitted", "running") and ended:
        state = "completed"  # rank 0 saw the end of training; who started it has not written so, or cannot
    because = f": {redact(' '.join(status.reason.split()))}" if status.reason else ""
    if state == "completed":
        if not steps:
            return state, "no training step was recorded"
        return state, f"the record ends at step {done} of {max_steps}" if done < max_steps else None
    if done < max_steps or state == "running":
        return state, f"{state} at step {done} of {max_steps}{because}"
    how = "no end was recorded" if state == "submitted" else state
    warnings.append(f"{how} after its last step, {done} of {max_steps}{because}")
    return state, None


def measured(run: Run, log: Log, peak: Peak, total_tokens: float) -> Run:
    """Return the run with its numbers, and with what its log says: which steps count, and whether it is final."""
    times, few = step_times(run.steps), None
    numbers = _numbers_at(times.mean_s, run, peak, total_tokens) if times else None
    several_nodes = (run.nodes or 1) > 1 or (run.gpus or 1) > _GPUS_A_NODE
    if losses := [loss for loss in run.steps.loss if loss is not None]:
        last = losses[-LAST_LOSSES:]
        run = replace(run, first_loss=losses[0], last_loss=sum(last) / len(last))
    if run.steps and times is None:
        few = "no step time was recorded"
    elif times and times.counted < MIN_STEADY_STEPS:
        few = f"only {times.description}: not a measurement (it takes {MIN_STEADY_STEPS})"
    run = replace(run, times=times)
    invalid = _contradiction(run, log) or remarks.invalid(run, numbers)
    why = "; ".join(text for text in (run.why_not_final, invalid, few) if text) or None
    return replace(
        run,
        invalid=invalid,
        why_not_final=why,
        numbers=numbers if why is None else None,
        gpu_reported=run.gpu_reported or log.printed.get("gpu"),
        peak_memory_gib=run.peak_memory_gib or log.peak_memory_gib,
        remarks=(*run.remarks, *([_SOCKETS] if log.sockets and several_nodes else [])),
        warnings=(*run.warnings, *remarks.warnings(run, numbers, log.rates)),
    )


def _numbers_at(step_time_s: float, run: Run, peak: Peak, total_tokens: float) -> Numbers | None:
    """Return all that follows from a step time: no FLOPs without the model's sizes, no MFU without a peak.

    None where the run's GPUs, batch or sequence are not known.
    """
    batch, seq_length, gpus = run.global_batch_size, run.seq_length, run.gpus
    peak_tflops, peak_source = peak
    if not (seq_length and batch and gpus):
        return None
    step: dict[str, Any] = {"global_batch_size": batch, "step_time_s": step_time_s}
    tokens_per_s = flops.tokens_per_second(seq_length=seq_length, **step)
    recipe, causal = None, None
    if run.architecture is not None:
        works = [run.architecture.flops_per_sequence(seq_length, causal=causal) for causal in (False, True)]
        recipe, causal = (flops.tflops_per_gpu(flops_per_sequence=work, num_gpus=gpus, **step) for work in works)
    return Numbers(
        step_time_s=step_time_s,
        tokens_per_s=tokens_per_s,
        tokens_per_s_per_gpu=tokens_per_s / gpus,
        tflops_per_gpu=recipe,
        tflops_per_gpu_causal=causal,
        peak_tflops=peak_tflops,
        peak_source=peak_source,
        mfu=recipe / peak_tflops if recipe and peak_tflops else None,
        mfu_causal=causal / peak_tflops if causal and peak_tflops else None,
        total_tokens=total_tokens,
        days_to_train=flops.days_to_train(tokens=total_tokens, tokens_per_s=tokens_per_s),
    )


def _contradiction(run: Run, log: Log) -> str | None:
    """Return where what the log prints of the run is not what its record, its path or the command line say."""
    ours = {"world_size": run.gpus, "seq_length": run.seq_length, "global_batch_size": run.global_batch_size}
    ours |= vars(run.architecture) if run.architecture else {}
    theirs = {**log.printed, "global_batch_size": str(log.global_batch_size or "")}
    for key, value in ours.items():
        printed = theirs.get(key, "")
        if value is not None and printed.isdigit() and int(printed) != value:
            return f"{key.replace('world_size', 'gpus')}={value} is given, and the log has {printed}"
    highest_rank = max(log.rank_times_s, default=0)
    if log.samples_a_step:
        return f"the log prints a batch of {log.global_batch_size}, and consumes {log.samples_a_step} samples a step"
    if run.gpus and highest_rank >= run.gpus:
        return f"gpus={run.gpus} is given, and the log has lines of rank {highest_rank}"
    if run.precision and "fp8" in theirs and ("fp8" in run.precision) != (theirs["fp8"] not in ("None", "False")):
        return f"precision={run.precision} is given, and the log has fp8 {theirs['fp8']}"
    vocab_size, padded = run.architecture.vocab_size if run.architecture else None, theirs.get("padded_vocab_size", "")
    if vocab_size and padded.isdigit() and not 0 <= int(padded) - vocab_size < _MOST_PADDING:
        return f"vocab_size={vocab_size} is given, and the log has {padded}, padded"
    return None


def log_warnings(log: Log) -> list[str]:
    """Return what a reader should know about the steps of a log."""
    stride = statistics.median([b - a for a, b in pairwise(log.steps.step)] or [1])
    batches = log.steps.excluded.count(OTHER_BATCH)
    interval = log.program in ("Megatron-LM", "Megatron-Bridge")
    texts = [
        (log.unreadable, f"{log.unreadable} lines with train_step_timing are cut off or garbled, and left out"),
        (log.repeated, _REPEATED.format(log.repeated)),
        (log.several, f"{log.several} times a step has another time: several ranks in one log; the slowest counts"),
        (batches, f"{batches} steps have another global batch size than {log.global_batch_size}, and are left out"),
        (interval, "each step time is from one line of the log to the next: a step, and what lies between two"),
        (stride > 1, f"one line every {stride:g} steps: it prints the mean of their times"),
    ]
    return [text for applies, text in texts if applies]
