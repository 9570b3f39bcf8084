"""Two sets of runs beside each other: what changed, and whether the difference is larger than the noise."""

from __future__ import annotations

import re
from collections.abc import Sequence

from nemo_bench.report import model
from nemo_bench.report.model import Change, Comparison, Point, Run, flatten
from nemo_bench.report.points import Group
from nemo_bench.report.statistics import ratio_of

KINDS = ("configuration", "packages", "environment", "hardware")

# What a log without a configuration tells of it
_OF_A_LOG = ("global_batch_size", "seq_length")
# Another one in every job, and without a word on speed.
_VOLATILE = re.compile(
    r"^(MASTER_ADDR|MASTER_PORT|RANK|LOCAL_RANK|NODE_RANK|STAGE_PATH|SLURM_(?!CPU|GPU|MEM|NTASKS|NNODES|TRES).*|PMIX?_.*)$"
)


def compare(groups: Sequence[Group], baseline: Sequence[Group], tolerance: float) -> tuple[list[Comparison], list[str]]:
    """Return each point with the baseline's of the same model, precision and number of GPUs; and what has none."""
    comparisons, unmatched = [], []
    for group in groups:
        point = group.point
        size = (point.model, point.precision, point.gpus)
        candidates = [old for old in baseline if (old.point.model, old.point.precision, old.point.gpus) == size]
        if not candidates:
            unmatched.append(f"{point.name}: the baseline has no such point")
            continue
        old = max(candidates, key=lambda candidate: _likeness(point, candidate.point))
        comparisons.append(_compare(group, old, tolerance))
    return comparisons, unmatched


def _likeness(point: Point, other: Point) -> int:
    keys = ("gpu", "software", "entrypoint", "data", "global_batch_size", "seq_length", "layout", "nodes")
    same = [key for key in keys if getattr(point, key) == getattr(other, key)]
    return len(same) + (other.numbers is not None)


def _compare(group: Group, old: Group, tolerance: float) -> Comparison:
    ratio, interval = None, None
    verdict, why = model.UNDECIDED, "one of the two has no finished run"
    if group.point.numbers is not None and old.point.numbers is not None:
        ratio = group.point.numbers.tokens_per_s / old.point.numbers.tokens_per_s
        why = "too few steps to know the noise"
        new_time, old_time = group.point.step_time, old.point.step_time
        if new_time is not None and old_time is not None:
            # Of step times; throughput is its inverse, at each point's own batch.
            low_s, high_s = ratio_of(new_time, old_time).interval
            work = ratio * new_time.value / old_time.value
            low, high = interval = work / high_s, work / low_s if low_s > 0 else float("inf")
            verdict = model.SLOWER if high < 1 else model.QUICKER if low > 1 else model.NO_DIFFERENCE
            counts = [len(side.point.final_runs) for side in (group, old)]
            noise = f"noise from repeats ({counts[0]} runs, baseline {counts[1]})"
            if min(counts) == 1:
                noise = "noise from the steps of a single run: repeat the runs to know how runs differ"
            why = f"throughput {ratio - 1:+.1%}, 95% interval {low - 1:+.1%} to {high - 1:+.1%}; {noise}"
    before, after = recorded(old.representative), recorded(group.representative)
    return Comparison(
        point=group.point.name,
        baseline=old.point.name,
        ratio=ratio,
        interval=interval,
        verdict=verdict,
        regression=verdict == model.SLOWER and ratio is not None and ratio < 1 - tolerance,
        why=why,
        **{kind: _changes(before[kind], after[kind]) for kind in KINDS},
    )


def recorded(run: Run) -> dict[str, dict[str, str]]:
    """Return what the record tells of a run, by kind (`KINDS`), as text; of a bare log, its version at most.

    Variables that are other ones in every job (a port, the job's id) are left out: they are no difference.
    """
    return {
        "configuration": flatten(run.record.config or {key: getattr(run, key) for key in _OF_A_LOG}),
        "packages": _software(run),
        "environment": {key: value for key, value in run.record.environment.items() if not _VOLATILE.match(key)},
        "hardware": _hardware(run),
    }


def _changes(before: dict[str, str], after: dict[str, str]) -> tuple[Change, ...]:
    keys = sorted({*before, *after})
    return tuple(Change(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key))


def _software(run: Run) -> dict[str, str]:
    names = {"version": run.version, "entrypoint": run.entrypoint, "container": run.container}
    if git := run.record.git:
        names["nemo_bench (git)"] = f"{git.get('revision')}{', modified' if git.get('modified') else ''}"
    return run.record.packages | {key: value for key, value in names.items() if value is not None}


def _hardware(run: Run) -> dict[str, str]:
    hardware = flatten({key: value for key, value in run.record.hardware.items() if key != "gpus"})
    if gpus := run.record.hardware.get("gpus"):
        hardware["gpus"] = f"{len(gpus)} x {gpus[0].get('name')}"
        hardware |= {f"gpu.{key}": str(value) for key, value in gpus[0].items() if key != "name"}
    return hardware
