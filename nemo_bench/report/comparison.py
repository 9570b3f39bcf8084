"""Two sets of runs beside each other: what changed, and whether the difference is larger than the noise."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence

from nemo_bench.report import model
from nemo_bench.report.model import Change, Comparison, Point, Run, flatten
from nemo_bench.report.points import Group
from nemo_bench.report.statistics import Mean, ratio_of

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
    """Return each point with the baseline's of the same model, precision and number of GPUs; and what has none."""
    comparisons, unmatched = [], []
    everything = [*groups, *baseline_groups]
    for group, point in zip(groups, points):
        candidates = [
            (old_group, old)
            for old_group, old in zip(baseline_groups, baseline_points)
            if (old.model, old.precision, old.gpus) == (point.model, point.precision, point.gpus)
        ]
        if not candidates:
            unmatched.append(f"{point.name}: the baseline has no such point")
            continue
        old_group, old = max(candidates, key=lambda pair: _likeness(point, pair[1]))
        noise = _noise([other for other in everything if other.kind == group.kind])
        comparisons.append(_compare(group, point, old_group, old, noise, tolerance))
    return comparisons, unmatched


def _likeness(point: Point, other: Point) -> int:
    keys = ("gpu", "software", "entrypoint", "data", "global_batch_size", "seq_length", "layout", "nodes")
    same = [key for key in keys if getattr(point, key) == getattr(other, key)]
    return len(same) + (other.numbers is not None)


def _compare(
    group: Group, point: Point, old_group: Group, old: Point, noise: Mean | None, tolerance: float
) -> Comparison:
    ratio, interval = None, None
    verdict, why = model.UNDECIDED, "one of the two has no finished run"
    if point.numbers is not None and old.numbers is not None:
        ratio, why = point.numbers.tokens_per_s / old.numbers.tokens_per_s, "too few steps to know the noise"
        new_time, old_time = _step_time(group, noise), _step_time(old_group, noise)
        if new_time is not None and old_time is not None:
            # Of step times; throughput is its inverse, at each point's own batch.
            low_s, high_s = ratio_of(new_time, old_time).interval
            work = ratio * new_time.value / old_time.value
            low, high = interval = work / high_s, work / low_s if low_s > 0 else float("inf")
            verdict = model.SLOWER if high < 1 else model.QUICKER if low > 1 else model.NO_DIFFERENCE
            if noise is None:
                source = "noise from the steps of one run each: repeat the runs to know how runs differ"
            else:
                repeats = "repeats" if len(group.final) > 1 or len(old_group.final) > 1 else "repeats of other points"
                source = f"noise from {repeats} ({_runs(len(group.final))}, baseline {len(old_group.final)})"
            why = f"throughput {ratio - 1:+.1%}, 95% interval {low - 1:+.1%} to {high - 1:+.1%}; {source}"
    before, after = recorded(old_group.representative), recorded(group.representative)
    return Comparison(
        point=point.name,
        baseline=old.name,
        ratio=ratio,
        interval=interval,
        verdict=verdict,
        regression=verdict == model.SLOWER and ratio is not None and ratio < 1 - tolerance,
        why=why,
        **{kind: _changes(before[kind], after[kind]) for kind in KINDS},
    )


def _runs(number: int) -> str:
    return "1 run" if number == 1 else f"{number} runs"


def recorded(run: Run) -> dict[str, dict[str, str]]:
    """Return what the record tells of a run, by kind (`KINDS`), as text; of a bare log, its version at most.

    Variables that are other ones in every job (a port, the job's id) are left out: they are no difference.
    """
    return {
        "configuration": flatten(run.record.config or {}),
        "packages": _software(run),
        "environment": {key: value for key, value in run.record.environment.items() if not _VOLATILE.match(key)},
        "hardware": _hardware(run),
    }


def _noise(groups: Sequence[Group]) -> Mean | None:
    """Return how the runs of a point differ, relative to their mean, pooled over repeated points, if there are any."""
    repeated = [means for group in groups if len(means := group.means_s()) > 1]
    freedom = sum(len(means) - 1 for means in repeated)
    if not freedom:
        return None
    squares = sum((mean / statistics.fmean(means) - 1) ** 2 for means in repeated for mean in means)
    return Mean(1.0, (squares / freedom) ** 0.5, freedom)


def _step_time(group: Group, noise: Mean | None) -> Mean | None:
    """Return the point's step time, with the error that `noise` gives it; a single run's own steps know less."""
    if noise is None:
        return group.step_time()
    mean = statistics.fmean(group.means_s())
    error = mean * noise.standard_error / len(group.final) ** 0.5
    return Mean(mean, error, noise.degrees_of_freedom)


def _changes(before: dict[str, str], after: dict[str, str]) -> tuple[Change, ...]:
    keys = sorted({*before, *after})
    return tuple(Change(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key))


def _software(run: Run) -> dict[str, str]:
    packages = dict(run.record.packages)
    for key, value in (("version", run.version), ("entrypoint", run.entrypoint), ("container", run.container)):
        if value is not None:
            packages[key] = value
    if git := run.record.git:
        modified = ", modified" if git.get("modified") else ""
        packages["nemo_bench (git)"] = f"{git.get('revision')}{modified}"
    return packages


def _hardware(run: Run) -> dict[str, str]:
    hardware = flatten({key: value for key, value in run.record.hardware.items() if key != "gpus"})
    gpus = run.record.hardware.get("gpus") or []
    if gpus:
        hardware["gpus"] = f"{len(gpus)} x {gpus[0].get('name')}"
        hardware |= {f"gpu.{key}": str(value) for key, value in gpus[0].items() if key != "name"}
    return hardware
