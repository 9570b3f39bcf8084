"""A point judged by a published number: what must agree, what may differ, and which step time is held against it."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace

from nemo_bench.report import model
from nemo_bench.report.model import Change, Point, Run, Verdict, flatten
from nemo_bench.report.references import Reference, ReferencePoint
from nemo_bench.report.remarks import of_runs
from nemo_bench.report.runs import choice, options
from nemo_bench.report.statistics import LONGEST_WARM_UP, OTHER_BATCH, Steps, is_time

_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
_SHAPE = ("gpus", "precision", "seq_length", "global_batch_size")
_VOCAB_MULTIPLE = 128  # Megatron pads the vocabulary to this, times TP


def must_agree(run: Run, row: ReferencePoint) -> list[Change]:
    """Return the one list of what makes a run comparable with a published row: what was published, and what was run."""
    sizes: dict[str, int] = vars(run.architecture) if run.architecture else {}
    multiple = _VOCAB_MULTIPLE * row.layout.get("TP", 1)
    vocabularies = row.architecture["vocab_size"], sizes.get("vocab_size")
    theirs, ours = (size and math.ceil(size / multiple) * multiple for size in vocabularies)
    pairs = {
        **{name: (row.architecture[name], sizes.get(name)) for name in _SIZES},
        "padded vocabulary": (theirs, ours),
        "gpu": (row.gpu, _gpu(run)),
        **{key: (getattr(row, key), getattr(run, key)) for key in _SHAPE},
    }
    return [Change(key, str(before), None if after is None else str(after)) for key, (before, after) in pairs.items()]


def _gpu(run: Run) -> str | None:
    """Return the kind of GPU; what the driver calls it counts, where it was configured as another."""
    if not run.gpu or not run.gpu_reported or run.gpu not in options("gpu"):
        return run.gpu
    named = choice("gpu", run.gpu).get("driver_name")
    same = run.gpu_reported == named if named else run.gpu.lower() in run.gpu_reported.lower()
    return run.gpu if same else f"{run.gpu_reported} (configured as {run.gpu})"


def differences(run: Run, row: ReferencePoint) -> Iterator[str]:
    """Yield how the run differs from the published one in what leaves the verdict standing."""
    if _other_software(run, row):
        ours = [run.software or "not known", run.container or ("no container" if run.source == "run folder" else "")]
        yield f"software: {' in '.join(filter(None, ours))}, published with {row.software} in {row.container}"
    if layout := [key for key, value in row.layout.items() if run.layout.get(key, value) != value]:
        ours, theirs = ([f"{key}{sizes[key]}" for key in layout] for sizes in (run.layout, row.layout))
        yield f"layout: {' '.join(ours)}, published with {' '.join(theirs)}"
    if run.data is not None and run.data != row.data:
        data = "random tokens (data=mock)" if run.data == "mock" else f"data={run.data}"
        yield f"data: {data}, published with {row.data}"
    if run.record.environment:
        yield from _unequal("environment", run.record.environment, row.environment)
    if run.record.config:
        yield from _unequal("settings", flatten(run.record.config), {key: str(v) for key, v in row.settings.items()})


def _other_software(run: Run, row: ReferencePoint) -> bool:
    same = run.software == row.software or (run.container and run.container == row.container)
    assumed = run.source == "log" and (run.software is None or run.software in row.recipes)
    return not (same or assumed)


def _unequal(kind: str, ours: dict[str, str], theirs: dict[str, str]) -> list[str]:
    keys = [key for key, value in theirs.items() if ours.get(key) != value]
    values = ", ".join(f"{key}={ours[key]}" if key in ours else f"{key} not set" for key in keys)
    return [f"{kind}: {values}, published with {', '.join(theirs[key] for key in keys)}"] if keys else []


def published(run: Run, references: Sequence[Reference]) -> ReferencePoint | None:
    """Return the row to hold a run against, the likest one; None: nothing is published for its model and GPUs."""
    sizes = [getattr(run.architecture, name, None) for name in _SIZES]
    rows = [
        row
        for table in references
        for row in table.points
        if (row.precision, row.gpus) == (run.precision, run.gpus)
        and (row.model == run.model or [row.architecture[name] for name in _SIZES] == sizes)
    ]

    def likeness(row: ReferencePoint) -> tuple[int, bool, bool, bool, bool, bool]:
        agreeing = sum(change.before == change.after for change in must_agree(run, row))
        software = not _other_software(run, row)
        same_layout = all(run.layout.get(key) == size for key, size in row.layout.items() if key != "layers")
        named = run.version in (row.software, *row.recipes)
        nemo_1 = [str(entrypoint).startswith("nemo_24") for entrypoint in (run.entrypoint, row.entrypoint)]
        same_program = run.entrypoint is not None and nemo_1[0] == nemo_1[1]  # Megatron-Bridge is NeMo 2's successor
        return agreeing, software and same_layout, software, same_program, named, same_layout

    return max(rows, key=likeness, default=None)


def judge(point: Point, runs: Sequence[Run], references: Sequence[Reference], tolerance: float) -> Verdict:
    """Return the verdict of a point that has its numbers and its row, of all its repeats."""
    final = [run for run in runs if run.numbers is not None]
    run, row = (final or runs)[0], point.reference
    left_out = dict.fromkeys(f"left out: {run.why_not_final}" for run in runs if final and run.numbers is None)
    verdict = Verdict(remarks=(*of_runs(final), *left_out))
    if row is not None:
        several = [f"of {len(references)} tables, the row of {row.reference} is taken"] if len(references) > 1 else []
        verdict = replace(
            verdict,
            must_agree=tuple(must_agree(run, row)),
            differences=tuple(differences(run, row)),
            remarks=(*verdict.remarks, *several, *row.notes),
        )
    if not final:
        unknown = "global_batch_size or seq_length is not known: name it with global_batch_size=... or seq_length=..."
        reasons = "; ".join(dict.fromkeys(run.why_not_final or unknown for run in runs))
        value, kind = (model.INVALID, "valid") if any(run.invalid for run in runs) else (model.INCOMPLETE, "finished")
        return replace(verdict, value=value, why=f"no {kind} run: {reasons}")
    if row is None:
        return verdict
    if obstacles := _obstacles(verdict.must_agree):
        why = f"another run than the published, of {row.step_time_s:g} s: {obstacles}"
        return replace(verdict, value=model.NOT_COMPARABLE, why=why)
    return _judged(verdict, point, final, row, tolerance)


def _obstacles(must_agree: Sequence[Change]) -> str:
    """Return what disagrees or is not known; empty where all agree."""
    other = [change for change in must_agree if change.before != change.after]
    texts = [f"{change.key}={change.after}, published {change.before}" for change in other if change.after]
    if unknown := [change.key for change in other if not change.after]:
        texts.append(f"not known: {', '.join(unknown)}" + ("; name it with gpu=..." if "gpu" in unknown else ""))
    return "; ".join(texts)


def _judged(verdict: Verdict, point: Point, final: Sequence[Run], row: ReferencePoint, tolerance: float) -> Verdict:
    statistic, measured_s = _measured(point, final, row)
    ratio = row.step_time_s / measured_s
    value = _level(ratio, tolerance)
    why = (
        f"{abs(ratio - 1):.1%} {'faster' if ratio >= 1 else 'slower'} than published by the {statistic} "
        f"({measured_s:.4g} s, published {row.step_time_s:g} s), tolerance {tolerance:.1%}"
    )
    if final[0].source == "log":
        sources = {key: final[0].identified.get(key) for key in ("model", "precision", "gpus", "seq_length")}
        assumed = [key for key, source in sources.items() if source != "command line"]
        why += f"; the log itself does not tell {', '.join([*assumed, 'layout, data and environment'])}"
    if doubts := [*dict.fromkeys(_doubts(tolerance, point, final, row, value))]:
        value, why = model.UNDECIDED, f"{'; '.join(doubts)}; {why}"
    return replace(verdict, value=value, why=why, ratio=ratio, statistic=statistic)


def _level(ratio: float, tolerance: float) -> str:
    if ratio < 1 - tolerance:
        return model.FAIL
    return model.FASTER if ratio > 1 + tolerance else model.PASS


def _measured(point: Point, final: Sequence[Run], row: ReferencePoint) -> tuple[str, float]:
    """Return the reference's own statistic, else the mean of the steps that count, and its value over the repeats."""
    assert point.numbers is not None and point.last_s is not None
    if row.statistic == "last step":
        return row.statistic, point.last_s
    if row.statistic != "mean":  # mean of steps 35 to 44
        first, last = map(int, re.findall(r"\d+", row.statistic))
        means = [_mean_between(run.steps, first, last) for run in final]
        if None not in means:
            return row.statistic, statistics.fmean(mean for mean in means if mean)
    return "mean of the steps that count", point.numbers.step_time_s


def _mean_between(steps: Steps, first: int, last: int) -> float | None:
    """Return the mean time of these steps, counted from 1, whatever the log counts from; None where one is missing."""
    base = 1 - min(steps.step[0], 1)
    times = [time for step, time in zip(steps.step, steps.time_s) if first <= step + base <= last and is_time(time)]
    return statistics.fmean(times) if len(times) == last - first + 1 else None


def _doubts(tolerance: float, point: Point, final: Sequence[Run], row: ReferencePoint, value: str) -> Iterator[str]:
    """Yield what keeps the point from a plain verdict."""
    assert point.numbers is not None and point.median_s is not None and point.last_s is not None
    mean_s = point.numbers.step_time_s
    times_s = {"mean": mean_s, "median": point.median_s, "last step": point.last_s}
    levels = {name: _level(row.step_time_s / time_s, tolerance) for name, time_s in times_s.items()}
    if {*levels.values()} != {value}:
        yield ", ".join(f"{verdict} by the {name}" for name, verdict in levels.items())
    if point.step_time is not None and point.step_time.margin > tolerance * mean_s:
        # Of a lower end below zero, nothing is known but that it is faster.
        ends = {_level(row.step_time_s / max(end, 1e-9), tolerance) for end in point.step_time.interval}
        if ends != {value}:
            margin = f"± {point.step_time.margin / mean_s:.0%}"
            yield f"the 95% interval of the mean, {margin}, exceeds the tolerance"
    if value == model.FAIL:
        return
    if mean_s > (1 + tolerance) * point.median_s:
        yield f"the mean exceeds the median by {mean_s / point.median_s - 1:.0%}"
    if any(run.state == "unknown" for run in final):
        yield "the log does not say how many steps were meant; max_steps=... does"
    for run in final:
        assert run.times is not None
        # Steps of a batch ramp-up are another job's.
        disturbed = len(run.steps) - run.times.warmup_steps - run.times.counted - run.times.excluded.get(OTHER_BATCH, 0)
        if disturbed > LONGEST_WARM_UP * len(run.steps):
            yield f"{disturbed} of {len(run.steps)} steps are left out"
        if run.times.unsteady_steps > LONGEST_WARM_UP * run.times.steps:
            slow = f"the first {run.times.unsteady_steps} of {run.times.steps} steps are slower"
            yield f"{slow}: no warm-up is so long"
