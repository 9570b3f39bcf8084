"""A point judged by a published number: what must agree, what may differ, and which step time is held against it."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import replace

from nemo_bench.report import model
from nemo_bench.report.model import Change, Point, Run, Verdict, flatten
from nemo_bench.report.references import Reference, ReferencePoint
from nemo_bench.report.remarks import of_runs
from nemo_bench.report.runs import device, options
from nemo_bench.report.statistics import LONGEST_WARM_UP, OTHER_BATCH, Steps, is_time

_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
_MEAN_OF_STEPS = re.compile(r"mean of steps (\d+) to (\d+)$")
_VOCAB_MULTIPLE = 128  # Megatron pads the vocabulary to this, times TP


def must_agree(run: Run, row: ReferencePoint) -> list[Change]:
    """Return the one list of what makes a run comparable with a published row: what was published, and what was run."""
    sizes: dict[str, int] = vars(run.architecture) if run.architecture else {}
    multiple = _VOCAB_MULTIPLE * row.layout.get("TP", 1)
    theirs, ours = (
        math.ceil(size / multiple) * multiple if size else None
        for size in (row.architecture["vocab_size"], sizes.get("vocab_size"))
    )
    pairs = {
        **{name: (row.architecture[name], sizes.get(name)) for name in _SIZES},
        "padded vocabulary": (theirs, ours),
        "gpu": (row.gpu, _gpu(run)),
        "gpus": (row.gpus, run.gpus),
        "precision": (row.precision, run.precision),
        "seq_length": (row.seq_length, run.seq_length),
        "global_batch_size": (row.global_batch_size, run.global_batch_size),
    }
    texts = {key: [None if value is None else str(value) for value in pair] for key, pair in pairs.items()}
    return [Change(key, before, after) for key, (before, after) in texts.items()]


def _gpu(run: Run) -> str | None:
    """Return the kind of GPU; what the driver calls it counts, where it was configured as another."""
    if not run.gpu or not run.gpu_reported or run.gpu not in options("gpu"):
        return run.gpu
    named = device(run.gpu).get("driver_name")
    same = run.gpu_reported == named if named else run.gpu.lower() in run.gpu_reported.lower()
    return run.gpu if same else f"{run.gpu_reported} (configured as {run.gpu})"


def differences(run: Run, row: ReferencePoint) -> list[str]:
    """Return how the run differs from the published one in what leaves the verdict standing."""
    texts = []
    if _other_software(run, row):
        ours = [run.software or "not known", run.container or ("no container" if run.source == "run folder" else "")]
        texts.append(f"software: {' in '.join(filter(None, ours))}, published with {row.software} in {row.container}")
    layout = {key: run.layout[key] for key, value in row.layout.items() if run.layout.get(key, value) != value}
    if layout:
        theirs = " ".join(f"{key}{row.layout[key]}" for key in layout)
        texts.append(f"layout: {' '.join(f'{key}{value}' for key, value in layout.items())}, published with {theirs}")
    if run.data is not None and run.data != row.data:
        data = "random tokens (data=mock)" if run.data == "mock" else f"data={run.data}"
        texts.append(f"data: {data}, published with {row.data}")
    environment = run.record.environment
    if environment:
        texts += _unequal("environment", environment, row.environment)
    if run.record.config:
        texts += _unequal("settings", flatten(run.record.config), {key: str(v) for key, v in row.settings.items()})
    return texts


def _other_software(run: Run, row: ReferencePoint) -> bool:
    if run.software == row.software or (run.container and run.container == row.container):
        return False
    if run.source == "log" and run.software in row.recipes:
        return False
    return run.software != row.software and (run.software is not None or run.source == "run folder")


def _unequal(kind: str, ours: dict[str, str], theirs: dict[str, str]) -> list[str]:
    keys = [key for key, value in theirs.items() if ours.get(key) != value]
    values = ", ".join(f"{key}={ours[key]}" if key in ours else f"{key} not set" for key in keys)
    return [f"{kind}: {values}, published with {', '.join(theirs[key] for key in keys)}"] if keys else []


def published(run: Run, references: Sequence[Reference]) -> ReferencePoint | None:
    """Return the row to hold a run against; None where nothing is published for its model, precision and GPUs.

    Of several: one that it is comparable with, of its own software and layout, of its software, of what its program
    stands for, of its layout, of the first table.
    """
    sizes = {name: getattr(run.architecture, name, None) for name in _SIZES}
    rows = [
        row
        for table in references
        for row in table.points
        if (row.precision, row.gpus) == (run.precision, run.gpus)
        and (row.model == run.model or all(row.architecture[name] == size for name, size in sizes.items()))
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
        choice = [f"of {len(references)} tables, the row of {row.reference} is taken"] if len(references) > 1 else []
        verdict = replace(
            verdict,
            must_agree=tuple(must_agree(run, row)),
            differences=tuple(differences(run, row)),
            remarks=(*verdict.remarks, *choice, *row.notes),
        )
    if not final:
        unknown = "global_batch_size or seq_length is not known: name it with global_batch_size=... or seq_length=..."
        reasons = "; ".join(dict.fromkeys(run.why_not_final or unknown for run in runs))
        if any(run.invalid for run in runs):
            return replace(verdict, value=model.INVALID, why=f"no valid run: {reasons}")
        return replace(verdict, value=model.INCOMPLETE, why=f"no finished run: {reasons}")
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
    unknown = [change.key for change in other if not change.after]
    if unknown:
        texts.append(f"not known: {', '.join(unknown)}" + ("; name it with gpu=..." if "gpu" in unknown else ""))
    return "; ".join(texts)


def _judged(verdict: Verdict, point: Point, final: Sequence[Run], row: ReferencePoint, tolerance: float) -> Verdict:
    statistic, measured_s = _measured(final, row)
    ratio = row.step_time_s / measured_s
    value = _level(ratio, tolerance)
    way = "faster" if ratio >= 1 else "slower"
    why = (
        f"{abs(ratio - 1):.1%} {way} than published by the {statistic} ({measured_s:.4g} s, published "
        f"{row.step_time_s:g} s), tolerance {tolerance:.1%}"
    )
    if final[0].source == "log":
        sources = {key: final[0].identified.get(key) for key in ("model", "precision", "gpus", "seq_length")}
        assumed = [key for key, source in sources.items() if source != "command line"]
        why += f"; the log itself does not tell {', '.join([*assumed, 'layout, data and environment'])}"
    if doubts := _doubts(tolerance, point, final, row, value):
        value, why = model.UNDECIDED, f"{'; '.join(doubts)}; {why}"
    return replace(verdict, value=value, why=why, ratio=ratio, statistic=statistic)


def _level(ratio: float, tolerance: float) -> str:
    if ratio < 1 - tolerance:
        return model.FAIL
    return model.FASTER if ratio > 1 + tolerance else model.PASS


def _measured(final: Sequence[Run], row: ReferencePoint) -> tuple[str, float]:
    """Return the reference's own statistic, else the mean of the steps that count, and its value over the repeats."""
    times = [run.times for run in final if run.times is not None]
    if row.statistic == "last step":
        return row.statistic, statistics.fmean(run_times.last_s for run_times in times)
    if match := _MEAN_OF_STEPS.match(row.statistic):
        means = [_mean_between(run.steps, int(match[1]), int(match[2])) for run in final]
        if all(means):
            return row.statistic, statistics.fmean(mean for mean in means if mean)
    return "mean of the steps that count", statistics.fmean(run_times.mean_s for run_times in times)


def _mean_between(steps: Steps, first: int, last: int) -> float | None:
    """Return the mean time of these steps, counted from 1, whatever the log counts from; None where one is missing."""
    base = 1 - min(steps.step[0], 1)
    times = [time for step, time in zip(steps.step, steps.time_s) if first <= step + base <= last and is_time(time)]
    return statistics.fmean(times) if len(times) == last - first + 1 else None


def _doubts(tolerance: float, point: Point, final: Sequence[Run], row: ReferencePoint, value: str) -> list[str]:
    """Return what keeps the point from a plain verdict."""
    assert point.numbers is not None and point.median_s is not None and point.last_s is not None
    mean_s, doubts = point.numbers.step_time_s, []
    levels = {
        name: _level(row.step_time_s / time_s, tolerance)
        for name, time_s in (("mean", mean_s), ("median", point.median_s), ("last step", point.last_s))
    }
    if {*levels.values(), value} != {value}:
        doubts.append(", ".join(f"{verdict} by the {name}" for name, verdict in levels.items()))
    if point.step_time is not None and point.step_time.margin > tolerance * mean_s:
        ends = {
            _level(row.step_time_s / end, tolerance) if end > 0 else model.FASTER for end in point.step_time.interval
        }
        if ends != {value}:
            doubts.append(
                f"the 95% interval of the mean, ± {point.step_time.margin / mean_s:.0%}, exceeds the tolerance"
            )
    if value == model.FAIL:
        return doubts
    if mean_s > (1 + tolerance) * point.median_s:
        doubts.append(f"the mean exceeds the median by {mean_s / point.median_s - 1:.0%}")
    starts = [(times.unsteady_steps, times.steps) for run in final if (times := run.times)]
    if any(run.state == "unknown" for run in final):
        doubts.append("the log does not say how many steps were meant; max_steps=... does")
    left_out = [(_disturbed(run), len(run.steps)) for run in final]
    if many := [pair for pair in left_out if pair[0] > LONGEST_WARM_UP * pair[1]]:
        doubts.append(f"{many[0][0]} of {many[0][1]} steps are left out")
    if slow := [start for start in starts if start[0] > LONGEST_WARM_UP * start[1]]:
        doubts.append(f"the first {slow[0][0]} of {slow[0][1]} steps are slower: no warm-up is so long")
    return doubts


def _disturbed(run: Run) -> int:
    """Return how many steps after the warm-up do not count; but for a batch ramp-up, which is another job."""
    assert run.times is not None
    disturbed = sum(number for reason, number in run.times.excluded.items() if reason != OTHER_BATCH)
    return disturbed + len(run.steps) - run.times.steps
