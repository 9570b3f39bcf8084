"""Runs as a report takes them: this project's run folders, and bare logs of anybody's NeMo."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from nemo_bench import flops
from nemo_bench.errors import BenchError
from nemo_bench.project import PROJECT
from nemo_bench.record import folder as record
from nemo_bench.record.node import NODE, kept_environment
from nemo_bench.record.redaction import redact, redact_values
from nemo_bench.report import profile as step_profile
from nemo_bench.report.devices import read_devices
from nemo_bench.report.logs import Log, read_log
from nemo_bench.report.model import DeviceUse, RankTimes, Run, Steps
from nemo_bench.report.numbers import LAST_LOSSES, numbers_at, too_few
from nemo_bench.report.series import CHECKPOINT, PROFILE, VALIDATION, Row, StepSeries
from nemo_bench.report.statistics import StepTimes, exclusions, step_times

DEFAULT_TOTAL_TOKENS = 1e12
# A rank this much slower than the others is a straggler, if it also stands out from their spread.
STRAGGLER = 0.1

_CONF = PROJECT / "conf"
# What a file that is not what it should be can raise while it is taken apart.
_DAMAGE = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
    AssertionError,
    OmegaConfBaseException,
    YAMLError,
)
_PEAK_FILE = re.compile(r"peak_rank(\d+)\.json$")
_LOG_SUFFIXES = (".out", ".log", ".txt", ".err")
_SHORT = {
    "TP": "tensor_model_parallel_size",
    "PP": "pipeline_model_parallel_size",
    "VP": "virtual_pipeline_model_parallel_size",
    "CP": "context_parallel_size",
    "MBS": "micro_batch_size",
}


@dataclass(frozen=True)
class Given:
    """What the command line says of bare logs; None where their path or content may tell.

    Attributes:
        model, precision, gpu: names of the configuration groups.
        gpus: in the whole job.
        global_batch_size: sequences.
        seq_length: tokens.
        architecture: the model's sizes; None: those of conf/model/<model>.yaml.
    """

    model: str | None = None
    precision: str | None = None
    gpus: int | None = None
    gpu: str | None = None
    global_batch_size: int | None = None
    seq_length: int | None = None
    architecture: flops.Architecture | None = None


def architecture_of(model: dict[str, Any]) -> flops.Architecture:
    """The sizes in a configuration's `model` section.

    Raises:
        KeyError, TypeError, ValueError: one is missing, or no number.
    """
    return flops.Architecture(**{size.name: int(model[size.name]) for size in fields(flops.Architecture)})


def options(group: str) -> list[str]:
    """Names of the choices of a configuration group (conf/<group>)."""
    return sorted(path.stem for path in (_CONF / group).glob("*.yaml"))


def changed_sizes(run: Run) -> dict[str, int]:
    """The sizes in which the run's model is another than conf/model's of that name."""
    if run.architecture is None or run.model not in options("model"):
        return {}
    named = vars(architecture_of(_choice("model", run.model)))
    return {key: value for key, value in vars(run.architecture).items() if named[key] != value}


def _choice(group: str, name: str) -> dict[str, Any]:
    """A file of a configuration group, over the files of the group that it starts from."""
    content = OmegaConf.load(_CONF / group / f"{name}.yaml")
    plain = OmegaConf.to_container(content, resolve=False)
    assert isinstance(plain, dict)
    own = {str(key): value for key, value in plain.items()}
    started_from = [_choice(group, above) for above in own.pop("defaults", []) if above != "_self_"]
    return {key: value for each in [*started_from, own] for key, value in each.items()}


def check(given: Given) -> None:
    """Refuses names that no configuration group has.

    Raises:
        BenchError: with the valid ones.
    """
    for group in ("model", "precision", "gpu"):
        name = getattr(given, group)
        if name is not None and name not in options(group):
            raise BenchError(f"{group}={name}: there is no such {group}\n  valid: {', '.join(options(group))}")
    for key in ("gpus", "global_batch_size", "seq_length"):
        value = getattr(given, key)
        if value is not None and value < 1:
            raise BenchError(f"{key}={value}: must be at least 1")


def find(paths: Sequence[Path], key: str = "runs") -> tuple[list[Path], list[str]]:
    """The run folders and log files that `paths` name or hold, each once, and what could not be looked into.

    In a folder, every run folder below it is found, and every log (.out, .log, .txt, .err) that is in none of them.

    Raises:
        BenchError: a path does not exist.
    """
    found: dict[Path, None] = {}
    closed: list[str] = []
    seen: set[Path] = set()
    for path in paths:
        if not path.exists():
            raise BenchError(
                f"{key}={path}: there is no such file or folder\n"
                "  name run folders, folders that hold some, or log files"
            )
        for each in [path] if path.is_file() else _below(path, seen, closed):
            found[each.resolve()] = None
    return list(found), closed


def _below(folder: Path, seen: set[Path], closed: list[str]) -> Iterator[Path]:
    real = folder.resolve()
    if real in seen:  # by a link, perhaps to a folder above
        return
    seen.add(real)
    try:
        if (folder / record.RUN).is_file():
            yield folder
            return
        entries = sorted(folder.iterdir())
    except OSError as error:
        closed.append(f"{folder}: cannot be looked into ({error.strerror})")
        return
    for path in entries:
        if path.is_dir() and not path.name.startswith("."):
            yield from _below(path, seen, closed)
        elif path.is_file() and path.suffix in _LOG_SUFFIXES:
            yield path


def load(path: Path, given: Given, total_tokens: float) -> Run:
    """The run of a run folder or of a log file.

    Raises:
        BenchError: a run folder without a readable record.
        OSError: it cannot be read.
    """
    return load_run(path, total_tokens) if path.is_dir() else load_log(path, given, total_tokens)


# --- run folders --------------------------------------------------------------------------------------------


def load_run(run_dir: Path, total_tokens: float | None = None) -> Run:
    """The run that `run_dir` records.

    Args:
        run_dir: the run folder.
        total_tokens: budget behind the days to train; None: what the run's configuration names.

    Raises:
        BenchError: config.yaml or run.json is missing or damaged.
    """
    try:
        return _load_run(run_dir, total_tokens)
    except (OSError, *_DAMAGE) as error:
        what = str(error).splitlines()[0] if str(error) else ""
        raise BenchError(f"{run_dir}: the record cannot be read ({type(error).__name__}: {what})") from None


def _load_run(run_dir: Path, total_tokens: float | None) -> Run:
    status = record.RunFolder(run_dir).status()
    about = record.RunFolder(run_dir).read()
    loaded = OmegaConf.to_container(OmegaConf.load(run_dir / record.CONFIG), resolve=True)
    assert isinstance(loaded, dict)
    config: dict[str, Any] = {str(key): value for key, value in loaded.items()}
    model, trainer = config["model"], config["trainer"]
    sizes = architecture_of(model)
    nodes, max_steps = int(trainer["num_nodes"]), int(trainer["max_steps"])
    gpus = nodes * int(trainer["devices"])
    batch, seq_length = int(model["global_batch_size"]), int(model["seq_length"])
    precision, gpu = str(config["precision"]["name"]), str(config["gpu"]["name"])
    warnings: list[str] = []
    node = _json(run_dir / NODE)
    lines, _ = record.read_lines(run_dir / record.EVENTS)
    events = [line for line in lines if isinstance(line, dict)]
    log = _rank0_log(run_dir)
    rows, _ = record.read_lines(run_dir / record.STEPS)
    series, steps_peak_gib = _series(rows, events, warnings)
    devices = _devices(run_dir, rows, warnings)
    if not series.steps and log is not None and log.step:
        # Other entrypoints write no steps.jsonl; what they print is in the rank's log.
        series = _series_of(log)
        if (config.get("entrypoint") or {}).get("name") == "nemo_24_09":
            warnings.append(
                "each step time is the mean of that step and the four before it: the recipe's setting of NeMo"
            )
        else:
            warnings.append("the steps are read from the log: four digits each")
        warnings += _log_warnings(log)
    peaks = _peaks(run_dir)
    peak, peak_source = _peak(config["gpu"], precision, peaks)
    container = (config.get("cluster") or {}).get("container")
    started = [event for event in events if event.get("event") == "training"]
    ended = [event for event in events if event.get("event") == "done"]
    state = status.state
    if state in ("submitted", "running") and ended and events[-1] is ended[-1]:
        state = "completed"  # rank 0 saw the end of training; who started it has not written so, or cannot
    reason = redact(" ".join(status.reason.split())) if status.reason else None
    hardware = {key: value for key, value in node.items() if key not in ("packages", "environment")}
    gpus_seen = node.get("gpus") or [{}]
    return _run(
        series,
        path=run_dir,
        source="run folder",
        state=state,
        state_reason=reason,
        incomplete=_incomplete(state, reason, series.steps, max_steps),
        model=str(model["name"]),
        precision=precision,
        gpus=gpus,
        nodes=nodes,
        gpu=gpu,
        gpu_reported=gpus_seen[0].get("name"),
        global_batch_size=batch,
        seq_length=seq_length,
        layout=_layout(model, gpus, batch),
        sizes=sizes,
        peak_tflops=peak,
        peak_source=peak_source,
        total_tokens=float(config.get("total_tokens", DEFAULT_TOTAL_TOKENS)) if total_tokens is None else total_tokens,
        version=config.get("results_version"),
        entrypoint=(config.get("entrypoint") or {}).get("name"),
        container=Path(str(container["image"])).name if container else None,
        data=(config.get("data") or {}).get("name"),
        identified=dict.fromkeys(("model", "precision", "gpus", "gpu", "global_batch_size"), "run record"),
        started_at=about.get("created_at"),
        ended_at=status.ended_at,
        max_steps=max_steps,
        peak_memory_gib=max((each.peak_memory_gib or 0 for each in devices), default=0)
        or steps_peak_gib
        or (log.peak_memory_gib if log else None),
        ranks=_matrix_rates({rank: float(peak["tflops"]) for rank, peak in peaks.items()})
        + _device_ranks(devices)
        + (_log_ranks(log) if log else ()),
        command=redact(about.get("command") or "") or None,
        overrides=tuple(redact(str(override)) for override in about.get("overrides") or ()),
        git=about.get("git"),
        config=redact_values(config),
        packages=node.get("packages") or {},
        hardware=hardware,
        environment=redact_values(kept_environment(node.get("environment") or {})),
        events=tuple(
            {"event": e.get("event"), "after_step": e.get("after_step"), "time": e.get("time")} for e in events
        ),
        devices=devices,
        profiles=_profiles(run_dir, warnings),
        warnings=warnings + ([f"started {len(started)} times: see the events"] if len(started) > 1 else []),
    )


def _json(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is none: node.json is missing where rank 0 did not come so far."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _peaks(run_dir: Path) -> dict[int, dict[str, Any]]:
    """The matrix rate that each rank measured."""
    found = {int(match[1]): path for path in run_dir.glob("peak_rank*.json") if (match := _PEAK_FILE.match(path.name))}
    peaks = {rank: _json(found[rank]) for rank in sorted(found)}
    return {rank: peak for rank, peak in peaks.items() if isinstance(peak.get("tflops"), (int, float))}


def _profiles(run_dir: Path, warnings: list[str]) -> tuple[step_profile.StepProfile, ...]:
    found = []
    for name, content in record.RunFolder(run_dir).profiles().items():
        try:
            found.append(step_profile.from_dict(content))
        except _DAMAGE:
            warnings.append(f"{record.PROFILE}/{name} is damaged and left out")
    return tuple(found)


def _rank0_log(run_dir: Path) -> Log | None:
    try:
        return read_log(record.RunFolder(run_dir).log(0))
    except OSError:
        return None


def _devices(run_dir: Path, rows: list[dict[str, Any]], warnings: list[str]) -> tuple[DeviceUse, ...]:
    try:
        return read_devices(run_dir, rows)
    except (OSError, *_DAMAGE) as error:
        warnings.append(f"what the devices did cannot be read ({type(error).__name__}: {error})")
        return ()


def _series(
    rows: list[dict[str, Any]], events: list[dict[str, Any]], warnings: list[str]
) -> tuple[StepSeries, float | None]:
    """The steps of steps.jsonl with what events.jsonl says went on between them, and the peak memory in GiB."""
    series = StepSeries()
    damaged, peak_gib = 0, 0.0
    for row in rows:
        try:
            loss, norm = (None if row.get(key) is None else float(row[key]) for key in ("loss", "grad_norm"))
            step = Row(int(row["step"]), float(row["train_step_timing_s"]), loss, norm)
            peak_gib = max(peak_gib, float(row.get("peak_memory_gib", 0)))
        except (KeyError, TypeError, ValueError, AttributeError):
            damaged += 1
            continue
        if series.steps and step.step <= series.steps[-1]:
            series.restart(step.step)  # after a requeue: the later one counts
        series.add(step)
    if damaged:
        warnings.append(f"{damaged} lines of {record.STEPS} are damaged and left out")
    if series.repeated:
        warnings.append(f"{series.repeated} steps were done again after a restart; the later ones count")
    starts: list[int] = []
    paused: dict[int, str] = {}
    for event in events:
        if event.get("event") == "training":
            first = int(event.get("first_step", 0))
            starts = [start for start in starts if start < first] + [first]
            paused = {after: reason for after, reason in paused.items() if after < first}
        elif event.get("event") in (VALIDATION, CHECKPOINT, PROFILE) and event.get("after_step") is not None:
            paused[int(event["after_step"])] = str(event["event"])
    series.restarts = sorted({*series.restarts, *starts[1:]})
    # NeMo's timer stops before callbacks save and Lightning validates: the step that feels it is the next one.
    following = dict(zip([-1, *series.steps], series.steps))
    series.paused = {following[after]: reason for after, reason in paused.items() if after in following}
    return series, peak_gib or None


def _layout(model: dict[str, Any], gpus: int, batch: int) -> dict[str, int]:
    layout = {short: int(model.get(name) or 1) for short, name in _SHORT.items()}
    shards = layout["TP"] * layout["PP"] * layout["CP"]
    layout["DP"] = gpus // shards
    if layout["DP"]:
        layout["GA"] = batch // (layout["MBS"] * layout["DP"])
    return layout


def _peak(gpu: dict[str, Any], precision: str, measured: dict[int, dict[str, Any]]) -> tuple[float | None, str | None]:
    published = (gpu.get("peak_tflops") or {}).get(precision)
    if published is not None:
        return float(published), f"{gpu.get('name')} {precision}, dense, published"
    if not measured:
        return None, None
    first = next(iter(measured.values()))
    rate = statistics.fmean(float(peak["tflops"]) for peak in measured.values())
    return rate, (
        f"measured: {first.get('dtype')} matrix product of {first.get('size')}^3 "
        f"on {first.get('threads')} threads a process"
    )


def _incomplete(state: str, reason: str | None, steps: list[int], max_steps: int) -> str | None:
    done = len(steps) and steps[-1] + 1
    if state != "completed":
        when = "after its last step," if done >= max_steps else "at step"
        return f"{state} {when} {done} of {max_steps}" + (f": {reason}" if reason else "")
    if not steps:
        return "no training step was recorded"
    if done < max_steps:
        return f"the record ends at step {done} of {max_steps}"
    return None


# --- logs ---------------------------------------------------------------------------------------------------


def load_log(path: Path, given: Given, total_tokens: float) -> Run:
    """The run that a log file tells of, as far as it, its path and `given` go.

    Raises:
        OSError: it cannot be read.
    """
    log = read_log(path)
    identity, identified = _identity(path, given, log)
    series, warnings = _series_of(log), _log_warnings(log)
    model, precision, gpu = identity["model"], identity["precision"], identity["gpu"]
    sizes = given.architecture
    if sizes is None and model in options("model"):
        choice = _choice("model", model)
        sizes = architecture_of(choice)
        if identity["seq_length"] is None:
            identity["seq_length"], identified["seq_length"] = choice["seq_length"], f"conf/model/{model}.yaml"
    peak, peak_source = None, None
    if gpu is not None and precision is not None:
        content = _choice("gpu", gpu)
        peak, peak_source = _peak(content.get("gpu", content), precision, {})
    missing = [key for key in ("model", "precision", "gpus", "global_batch_size", "seq_length") if not identity[key]]
    if log.step and missing:
        warnings.append(f"not known from its path or content: name it with {' '.join(f'{key}=...' for key in missing)}")
    elif log.step and gpu is None:
        warnings.append(f"no MFU: name the device with gpu=... ({', '.join(options('gpu'))})")
    max_steps = log.max_steps
    if max_steps is None and log.iterations is not None:
        max_steps = log.iterations if log.bar else log.iterations + log.from_zero
    state, incomplete = _log_state(log, max_steps)
    return _run(
        series,
        path=path,
        source="log",
        state=state,
        state_reason=redact(log.last_error or "") or None if state != "completed" else None,
        incomplete=incomplete,
        nodes=None,
        gpu_reported=None,
        layout={},
        sizes=sizes,
        peak_tflops=peak,
        peak_source=peak_source,
        total_tokens=total_tokens,
        entrypoint=None,
        container=None,
        data=None,
        identified=identified,
        started_at=None,
        ended_at=None,
        max_steps=max_steps,
        peak_memory_gib=log.peak_memory_gib,
        ranks=_log_ranks(log),
        command=None,
        overrides=(),
        git=None,
        config=None,
        packages={},
        hardware={},
        environment={},
        events=tuple({"event": reason, "after_step": step - 1, "time": None} for step, reason in log.paused.items()),
        warnings=warnings,
        **identity,
    )


def _identity(path: Path, given: Given, log: Log) -> tuple[dict[str, Any], dict[str, str]]:
    """What the run is, and where each part of it comes from: the command line before the path before the log."""
    told: dict[str, Any] = {"global_batch_size": log.global_batch_size}
    identified = {"global_batch_size": "log"} if log.global_batch_size else {}
    # <version>/<precision>/<model>/<gpus>/..., the recipe's layout
    parts = path.absolute().parent.parts
    for i in range(len(parts) - 3, 0, -1):
        if parts[i].lower() in options("precision") and parts[i + 2].isdigit():
            named = {"version": parts[i - 1], "precision": parts[i].lower(), "model": parts[i + 1].lower()}
            told |= {**named, "gpus": int(parts[i + 2])}
            identified |= dict.fromkeys((*named, "gpus"), "path")
            break
    keys = ("model", "precision", "gpus", "gpu", "global_batch_size", "seq_length")
    said = {key: getattr(given, key) for key in keys if getattr(given, key) is not None}
    identified |= dict.fromkeys(said, "command line")
    return {**dict.fromkeys((*keys, "version")), **told, **said}, identified


def _series_of(log: Log) -> StepSeries:
    series = StepSeries()
    if log.step:
        series.extend(log.step, log.time_s, log.loss, log.grad_norm)
    series.paused, series.restarts = dict(log.paused), list(log.restarts)
    return series


def _log_state(log: Log, max_steps: int | None) -> tuple[str, str | None]:
    if not log.step:
        return "unknown", "no line with train_step_timing and a step" + _because(log)
    reached = log.max_steps is not None or (log.iteration is not None and log.iteration == log.iterations)
    if reached:
        return "completed", None
    if max_steps is None:
        return "unknown", None
    done = log.iteration if log.bar else log.step[-1] + log.from_zero
    return "incomplete", f"the log ends at step {done} of {max_steps}{_because(log)}"


def _because(log: Log) -> str:
    return f": {redact(log.last_error)}" if log.last_error else ""


def _log_warnings(log: Log) -> list[str]:
    said = [
        (log.unreadable, f"{log.unreadable} lines with train_step_timing are cut off or garbled, and left out"),
        (log.repeated, f"{log.repeated} steps were done again after a restart; the later ones count"),
        (log.several, f"{log.several} times a step has another time: several ranks in one log; the slowest counts"),
        (log.dropped, f"the first {log.dropped} steps are left out: the log holds too many"),
        (
            log.step and log.iterations is None and log.max_steps is None,
            "the log does not say how many steps were meant: whether it is complete is not known",
        ),
    ]
    stride = statistics.median(b - a for a, b in zip(log.step, log.step[1:])) if len(log.step) > 1 else 1
    said.append((stride > 1, f"one line every {stride:g} steps: NeMo prints the mean of their times"))
    return [text for true, text in said if true]


# --- both ---------------------------------------------------------------------------------------------------


def _run(
    series: StepSeries,
    *,
    path: Path,
    incomplete: str | None,
    sizes: flops.Architecture | None,
    peak_tflops: float | None,
    peak_source: str | None,
    total_tokens: float,
    warnings: list[str],
    **identity: Any,
) -> Run:
    """Puts a run together: which steps count, its statistics, whether it is final, and its numbers."""
    restarts = {series.steps.index(step) for step in series.restarts if step in series.steps[1:]}
    paused = [series.paused.get(step) for step in series.steps]
    excluded = exclusions(series.times, paused, restarts)
    times = step_times(series.times, excluded) if None in excluded else None
    losses = [loss for loss in series.losses if loss is not None]
    problems = [incomplete, *(_problems(series, times) if series.steps else [])]
    why_not = "; ".join(problem for problem in problems if problem) or None
    numbers = []
    if why_not is None and times is not None:
        batch, seq_length, gpus = identity["global_batch_size"], identity["seq_length"], identity["gpus"]
        if batch and seq_length and gpus:
            numbers = [
                numbers_at(
                    step_time_s,
                    seq_length=seq_length,
                    global_batch_size=batch,
                    gpus=gpus,
                    sizes=sizes,
                    peak_tflops=peak_tflops,
                    peak_source=peak_source,
                    total_tokens=total_tokens,
                )
                for step_time_s in (times.median_s, times.last_s)
            ]
    gaps = sum(b - a - 1 for a, b in zip(series.steps, series.steps[1:]))
    if identity["source"] == "run folder" and gaps:
        warnings = [*warnings, f"{gaps} steps are missing between others"]
    return Run(
        name=path.name,
        path=str(path),
        final=why_not is None,
        why_not_final=why_not,
        architecture=sizes,
        steps=Steps(
            step=tuple(series.steps),
            time_s=tuple(series.times),
            loss=tuple(series.losses),
            grad_norm=tuple(series.norms),
            excluded=tuple(excluded),
        ),
        times=times,
        numbers=numbers[0] if numbers else None,
        numbers_last=numbers[1] if numbers else None,
        first_loss=losses[0] if losses else None,
        last_loss=statistics.fmean(losses[-LAST_LOSSES:]) if losses else None,
        warnings=tuple(warnings),
        **identity,
    )


def _problems(series: StepSeries, times: StepTimes | None) -> list[str]:
    """What keeps the recorded steps from being a result."""
    found = []
    bad = [
        (step, loss) for step, loss in zip(series.steps, series.losses) if loss is not None and not math.isfinite(loss)
    ]
    if bad:
        found.append(f"the loss is {bad[0][1]} at step {bad[0][0]}" + (" and others" if len(bad) > 1 else ""))
    if times is None:
        found.append("no step time was recorded")
    elif text := too_few(times):
        found.append(text)
    return found


def _matrix_rates(rates: dict[int, float]) -> tuple[RankTimes, ...]:
    """The matrix rates that ranks measured before they trained: all at once on a CPU, each its own GPU's."""
    return _beside("matrix rate (TFLOP/s)", rates, lambda value, others: others / value - 1)


def _device_ranks(devices: tuple[DeviceUse, ...]) -> tuple[RankTimes, ...]:
    rates = {each.rank: each.matrix_tflops for each in devices if each.matrix_tflops}
    times = {each.rank: each.step_time_median_s for each in devices if each.step_time_median_s}
    return _matrix_rates(rates) + _beside("step time (s)", times, lambda value, others: value / others - 1)


def _log_ranks(log: Log) -> tuple[RankTimes, ...]:
    ranks = _beside("step time (s)", log.rank_times_s, lambda value, others: value / others - 1)
    named = {rank.rank for rank in ranks if rank.straggler}
    return ranks + tuple(
        RankTimes(rank, "NVIDIA's straggler detection", None, None, None, True)
        for rank in log.stragglers
        if rank not in named
    )


def _beside(measure: str, values: dict[int, float], slower: Any) -> tuple[RankTimes, ...]:
    """Each rank beside the median of the others."""
    if len(values) < 2:
        return ()
    ordered = sorted(values.values())
    middle = statistics.median(ordered)
    spread = 1.4826 * statistics.median(abs(value - middle) for value in ordered)
    result = []
    for rank, value in values.items():
        at = ordered.index(value)
        others = statistics.median(ordered[:at] + ordered[at + 1 :])
        fraction = slower(value, others)
        stands_out = len(values) == 2 or abs(value - others) > 3 * spread
        result.append(RankTimes(rank, measure, value, others, fraction, fraction > STRAGGLER and stands_out))
    return tuple(result)


def unique_names(paths: Sequence[Path]) -> list[str]:
    """A name for each path: its last part, with as many parts before it as it takes to tell all apart."""
    names = [path.name for path in paths]
    for depth in range(2, max((len(path.parts) for path in paths), default=0) + 1):
        counts = {name: names.count(name) for name in set(names)}
        if max(counts.values(), default=0) < 2:
            break
        names = ["/".join(path.parts[-depth:]) if counts[name] > 1 else name for name, path in zip(names, paths)]
    return [re.sub(r"^/+", "/", name) for name in names]
