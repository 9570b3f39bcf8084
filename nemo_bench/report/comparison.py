"""Two sets of runs beside each other: what changed, and whether the difference is larger than the noise."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence

from nemo_bench.report import model
from nemo_bench.report.model import Change, Comparison, Point, Run
from nemo_bench.report.points import Group, estimate, flatten
from nemo_bench.report.statistics import Estimate, ratio_interval

KINDS = ("configuration", "packages", "environment", "hardware")

# Another one in every job, and without a word on speed.
_VOLATILE = re.compile(
    r"^(MASTER_ADDR|MASTER_PORT|RANK|LOCAL_RANK|NODE_RANK|STAGE_PATH|SLURM_(?!CPU|GPU|MEM|NTASKS|NNODES|TRES).*|PMIX?_.*)$"
)


def compare(
    groups: Sequence[Group],
    points: Sequence[Point],
    baseline_groups: Sequence[Group],
    baseline_points: Sequence[Point],
    tolerance: float,
) -> tuple[list[Comparison], list[str]]:
    """Each point with the baseline's of the same model, precision and number of GPUs; and what found no counterpart."""
    comparisons, unmatched = [], []
    everything = [*groups, *baseline_groups]
    baseline = list(zip(baseline_groups, baseline_points))
    for group, point in zip(groups, points):
        alike = [
            (other, its)
            for other, its in baseline
            if (its.model, its.precision, its.gpus) == (point.model, point.precision, point.gpus)
        ]
        if not alike:
            unmatched.append(f"{point.name}: the baseline has no such point")
            continue
        other, its = max(alike, key=lambda pair: _likeness(point, pair[1]))
        comparisons.append(_compare(group, point, other, its, everything, tolerance))
    return comparisons, unmatched


def _likeness(point: Point, other: Point) -> int:
    keys = ("gpu", "version", "entrypoint", "data", "global_batch_size", "seq_length", "layout", "nodes")
    same = [key for key in keys if getattr(point, key) == getattr(other, key)]
    return len(same) + (other.numbers is not None)


def _compare(
    group: Group, point: Point, other: Group, its: Point, everything: Sequence[Group], tolerance: float
) -> Comparison:
    new, old = group.one, other.one
    ratio, low, high = None, None, None
    if point.numbers is None or its.numbers is None:
        verdict, why = model.UNDECIDED, "one of the two has no finished run"
    else:
        ratio = point.numbers.tokens_per_s / its.numbers.tokens_per_s
        verdict, why = model.UNDECIDED, "too few steps to know the noise"
        noise = _noise([each for each in everything if each.alike == group.alike])
        new_time, old_time = _estimate(group, noise), _estimate(other, noise)
        if new_time is not None and old_time is not None:
            # Of step times; throughput is its inverse, at each point's own batch.
            times_low, times_high = ratio_interval(new_time, old_time)
            work = ratio * new_time.value / old_time.value
            low, high = work / times_high, work / times_low if times_low > 0 else float("inf")
            verdict = model.SLOWER if high < 1 else model.QUICKER if low > 1 else model.NO_DIFFERENCE
            if noise is None:
                source = "noise from the steps of one run each: repeat the runs to know how runs differ"
            else:
                repeats = "repeats" if len(group.final) > 1 or len(other.final) > 1 else "repeats of other points"
                source = f"noise from {repeats} ({_runs(len(group.final))}, baseline {len(other.final)})"
            why = f"throughput {ratio - 1:+.1%}, 95% interval {low - 1:+.1%} to {high - 1:+.1%}; {source}"
    before, after = recorded(old), recorded(new)
    return Comparison(
        point=point.name,
        baseline=its.name,
        ratio=ratio,
        low=low,
        high=high,
        verdict=verdict,
        regression=verdict == model.SLOWER and ratio is not None and ratio < 1 - tolerance,
        why=why,
        **{kind: _changes(before[kind], after[kind]) for kind in KINDS},
    )


def _runs(number: int) -> str:
    return "1 run" if number == 1 else f"{number} runs"


def recorded(run: Run) -> dict[str, dict[str, str]]:
    """What the record tells of a run, by kind (`KINDS`), as text; of a bare log, its version at most.

    Variables that are other ones in every job (a port, the job's id) are left out: they are no difference.
    """
    return {
        "configuration": flatten(run.config or {}),
        "packages": _software(run),
        "environment": {key: value for key, value in run.environment.items() if not _VOLATILE.match(key)},
        "hardware": _hardware(run),
    }


def _noise(groups: Sequence[Group]) -> Estimate | None:
    """How the runs of a point differ, relative to their mean, pooled over the repeated points; None: none was."""
    repeated = [[run.times.median_s for run in group.final if run.times is not None] for group in groups]
    repeated = [medians for medians in repeated if len(medians) > 1]
    freedom = sum(len(medians) - 1 for medians in repeated)
    if not freedom:
        return None
    squares = sum((median / statistics.fmean(each) - 1) ** 2 for each in repeated for median in each)
    return Estimate(1.0, (squares / freedom) ** 0.5, freedom)


def _estimate(group: Group, noise: Estimate | None) -> Estimate | None:
    """The point's step time, with the error that `noise` gives it; a single run's own steps know less."""
    if noise is None:
        return estimate(group)
    medians = [run.times.median_s for run in group.final if run.times is not None]
    mean = statistics.fmean(medians)
    return Estimate(mean, mean * noise.error / len(medians) ** 0.5, noise.freedom)


def _changes(before: dict[str, str], after: dict[str, str]) -> tuple[Change, ...]:
    keys = sorted({*before, *after})
    return tuple(Change(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key))


def _software(run: Run) -> dict[str, str]:
    found = dict(run.packages)
    for key, value in (("version", run.version), ("entrypoint", run.entrypoint), ("container", run.container)):
        if value is not None:
            found[key] = value
    if run.git:
        modified = ", modified" if run.git.get("modified") else ""
        found["nemo_bench (git)"] = f"{run.git.get('revision')}{modified}"
    return found


def _hardware(run: Run) -> dict[str, str]:
    found = flatten({key: value for key, value in run.hardware.items() if key != "gpus"})
    gpus = run.hardware.get("gpus") or []
    if gpus:
        found["gpus"] = f"{len(gpus)} x {gpus[0].get('name')}"
        found |= {f"gpu.{key}": str(value) for key, value in gpus[0].items() if key != "name"}
    return found
