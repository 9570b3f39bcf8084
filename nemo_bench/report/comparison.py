"""Two sets of runs beside each other: what changed, and whether the difference is larger than the noise."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields

from nemo_bench.report import model
from nemo_bench.report.model import Change, Comparison, Identity, Run, flatten
from nemo_bench.report.points import Group
from nemo_bench.report.statistics import ratio_of

# Another one in every job, and without a word on speed.
_VOLATILE = re.compile(
    r"^(MASTER_ADDR|MASTER_PORT|RANK|LOCAL_RANK|NODE_RANK|STAGE_PATH|SLURM_(?!CPU|GPU|MEM|NTASKS|NNODES|TRES).*|PMIX?_.*)$"
)


def nearest(group: Group, baseline: Sequence[Group]) -> Group | None:
    """Return the baseline's point of the same model, precision and number of GPUs that is most like this one."""

    def agreeing(old: Group) -> set[str]:
        return {key.name for key in fields(Identity) if getattr(old.point, key.name) == getattr(group.point, key.name)}

    candidates = [old for old in baseline if {"model", "precision", "gpus"} <= agreeing(old)]
    return max(candidates, key=lambda old: len(agreeing(old)) + (old.point.numbers is not None), default=None)


def compare(group: Group, old_group: Group, tolerance: float) -> Comparison:
    """Return a point beside the baseline's: the ratio of throughputs with its interval, and what changed."""
    point, old = group.point, old_group.point
    ratio, interval = None, None
    verdict, why = model.UNDECIDED, "one of the two has no finished run"
    if point.numbers is not None and old.numbers is not None:
        ratio = point.numbers.tokens_per_s / old.numbers.tokens_per_s
        why = "too few steps to know the noise"
        if point.step_time is not None and old.step_time is not None:
            # Of step times; throughput is its inverse, at each point's own batch.
            low_s, high_s = ratio_of(point.step_time, old.step_time).interval
            work = ratio * point.step_time.value / old.step_time.value
            low, high = interval = work / high_s, work / low_s if low_s > 0 else float("inf")
            verdict = model.SLOWER if high < 1 else model.FASTER if low > 1 else model.NO_DIFFERENCE
            counts = len(point.final_runs), len(old.final_runs)
            noise = f"noise from repeats ({counts[0]} runs, baseline {counts[1]})"
            if min(counts) == 1:
                noise = "noise from the steps of a single run: repeat the runs to know how runs differ"
            why = f"throughput {ratio - 1:+.1%}, 95% interval {low - 1:+.1%} to {high - 1:+.1%}; {noise}"
    regression = verdict == model.SLOWER and ratio is not None and ratio < 1 - tolerance
    before, after = recorded(old_group.run), recorded(group.run)
    changes = {kind: _changes(before[kind], after[kind]) for kind in after}
    return Comparison(point.name, old.name, ratio, interval, verdict, regression, why, changes)


def recorded(run: Run) -> dict[str, dict[str, str]]:
    """Return what the record tells of a run, by kind, as text; of a bare log, its sizes and version at most.

    Variables that are other ones in every job (a port, the job's id) are left out: they are no difference.
    """
    record = run.record
    sizes = {"global_batch_size": run.global_batch_size, "seq_length": run.seq_length}
    software = {"version": run.version, "entrypoint": run.entrypoint, "container": run.container}
    if git := record.git:
        software["nemo_bench (git)"] = f"{git.get('revision')}{', modified' if git.get('modified') else ''}"
    hardware = {key: value for key, value in record.hardware.items() if key != "gpus"}
    if gpus := record.hardware.get("gpus"):
        hardware |= {"gpus": len(gpus), "gpu": gpus[0]}
    return {
        "configuration": flatten(record.config or sizes),
        "packages": record.packages | {key: value for key, value in software.items() if value is not None},
        "environment": {key: value for key, value in record.environment.items() if not _VOLATILE.match(key)},
        "hardware": flatten(hardware),
    }


def _changes(before: dict[str, str], after: dict[str, str]) -> tuple[Change, ...]:
    keys = sorted({*before, *after})
    return tuple(Change(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key))
