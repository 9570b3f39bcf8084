"""Repeats gathered into points, and the scaling curves that points form."""

from __future__ import annotations

import contextlib
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_bench.config import typed
from nemo_bench.errors import BenchError
from nemo_bench.estimate.step import Estimate, estimate_of
from nemo_bench.report import verdict
from nemo_bench.report.model import BESIDE_PERFORMANCE, Identity, Point, Run, ScalingCurve, flatten
from nemo_bench.report.references import Reference
from nemo_bench.report.statistics import mean_of_repeats

_IDENTITY = ("gpu", "gpu_reported", "software", "entrypoint", "container", "data", "global_batch_size", "seq_length")


def _identity(run: Run) -> dict[str, str]:
    """Return everything that makes a run another point than its neighbour."""
    config = flatten(run.record.config or {})
    performance = {key: value for key, value in config.items() if not BESIDE_PERFORMANCE.match(key)}
    return {**{key: str(getattr(run, key)) for key in _IDENTITY}, **performance}


@dataclass(frozen=True)
class Group:
    """A point with its runs."""

    point: Point
    run: Run  # stands for all: a finished one where there is one
    final: tuple[Run, ...]
    estimate: Estimate | None  # None: no rates of its GPU, or no configuration recorded


def gather(runs: Sequence[Run], references: Sequence[Reference], tolerance: float) -> Iterator[Group]:
    """Yield the runs that are known well enough, by point; in order of model, precision and number of GPUs."""
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        if run.identity_known:
            groups.setdefault((run.model, run.precision, run.gpus, *sorted(_identity(run).items())), []).append(run)
    taken = Counter[str]()
    for _, members in sorted(groups.items(), key=lambda item: item[0][:3]):
        name = members[0].point
        taken[name] += 1
        final = [run for run in members if run.numbers is not None]
        run = (final or members)[0]
        estimate = _estimate(run)
        point = Point(
            name=name if taken[name] == 1 else f"{name} #{taken[name]}",
            runs=tuple(member.name for member in members),
            final_runs=tuple(member.name for member in final),
            reference=verdict.published(run, references),
            estimate_s=estimate.step_time_s if estimate else None,
            **{field.name: getattr(run, field.name) for field in fields(Identity)},
            **_results(final),
        )
        point = replace(point, verdict=verdict.judge(point, members, references, tolerance))
        yield Group(point, run, tuple(final), estimate)


def _estimate(run: Run) -> Estimate | None:
    """Return what a run should take; None where its GPU's rates or its configuration are not known."""
    with contextlib.suppress(BenchError, OmegaConfBaseException):
        if run.record.config is not None and run.numbers is not None:
            return estimate_of(typed(OmegaConf.create(run.record.config)))
    return None


def _results(final: Sequence[Run]) -> dict[str, Any]:
    """Return a point's fields that come from its final runs."""
    times = [run.times for run in final if run.times is not None]
    if not times:
        return {}
    means_s, numbers = [run_times.mean_s for run_times in times], final[0].numbers
    return {
        "numbers": numbers and numbers.at(statistics.fmean(means_s)),
        "step_time": mean_of_repeats(means_s) or times[0].mean,
        "median_s": statistics.fmean(run_times.median_s for run_times in times),
        "last_s": statistics.fmean(run_times.last_s for run_times in times),
    }


def scaling(points: Sequence[Point]) -> Iterator[ScalingCurve]:
    """Yield curves of points that differ in nothing but their size, and what was published for them."""
    curves: dict[tuple[Any, ...], dict[int, float]] = {}
    for point in points:
        if not point.numbers or not point.gpus:
            continue
        chosen = re.sub(r" \d+gpu| GBS\d+", "", point.name)
        label = " ".join(filter(None, (chosen, point.gpu, point.software)))
        others = point.seq_length, point.data, point.entrypoint
        curves.setdefault((point.model, label, others, False), {})[point.gpus] = point.numbers.tokens_per_s
        if point.reference and point.verdict.ratio is not None:
            published = curves.setdefault((point.model, f"{label}, published", others, True), {})
            published[point.gpus] = point.reference.tokens_per_s_from_step_time
    for (model, label, _, is_published), tokens_per_s in curves.items():
        if len(tokens_per_s) > 1:
            gpus, rates = zip(*sorted(tokens_per_s.items()))
            efficiency = tuple(rate / number / (rates[0] / gpus[0]) for number, rate in zip(gpus, rates))
            yield ScalingCurve(label, model, is_published, gpus, rates, efficiency)
