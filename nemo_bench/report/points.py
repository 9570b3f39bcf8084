"""Repeats gathered into points, and the scaling curves that points form."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nemo_bench.estimate.step import Estimate
from nemo_bench.report import attribution, verdict
from nemo_bench.report.model import BESIDE_PERFORMANCE, Numbers, Point, Run, ScalingCurve, flatten
from nemo_bench.report.numbers import numbers_at
from nemo_bench.report.references import Reference, ReferencePoint
from nemo_bench.report.statistics import mean_of_repeats

_IDENTITY = ("gpu", "gpu_reported", "software", "entrypoint", "container", "data", "global_batch_size", "seq_length")
_OF_ITS_RUN = (
    *("model", "precision", "gpus", "gpu", "nodes", "software", "entrypoint"),
    *("global_batch_size", "seq_length", "layout", "data"),
)
# What a scaling curve runs over.
_SCALE = ("trainer.num_nodes", "trainer.devices", "model.global_batch_size", "global_batch_size")


def _identity(run: Run) -> dict[str, str]:
    """Return everything that makes a run another point than its neighbour."""
    config = flatten(run.record.config or {})
    performance = {key: value for key, value in config.items() if not BESIDE_PERFORMANCE.match(key)}
    return {**{key: str(getattr(run, key)) for key in _IDENTITY}, **performance}


@dataclass(frozen=True)
class Group:
    """A point, with the run that stands for it."""

    point: Point
    representative: Run  # stands for all: a finished one where there is one
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
        representative = (final or members)[0]
        point = _point(name if taken[name] == 1 else f"{name} #{taken[name]}", members, final, representative)
        point = replace(point, reference=verdict.published(representative, references))
        estimate = attribution.estimate_of_run(representative)
        point = replace(point, estimate_s=estimate.step_time_s if estimate else None)
        point = replace(point, verdict=verdict.judge(point, members, references, tolerance))
        yield Group(point, representative, estimate)


def _point(name: str, runs: Sequence[Run], final: Sequence[Run], run: Run) -> Point:
    names: dict[str, Any] = {
        "name": name,
        "runs": tuple(repeat.name for repeat in runs),
        "final_runs": tuple(repeat.name for repeat in final),
        **{field: getattr(run, field) for field in _OF_ITS_RUN},
    }
    times = [repeat.times for repeat in final if repeat.times is not None]
    if not times:
        return Point(**names)
    means_s = [statistic.mean_s for statistic in times]
    return Point(
        **names,
        numbers=_numbers(final, statistics.fmean(means_s)),
        step_time=mean_of_repeats(means_s) or times[0].mean,
        median_s=statistics.fmean(statistic.median_s for statistic in times),
        last_s=statistics.fmean(statistic.last_s for statistic in times),
    )


def _numbers(final: Sequence[Run], step_time_s: float) -> Numbers | None:
    """Return the numbers at the runs' mean step time, and at the mean of their peaks where those were measured."""
    numbers = [run.numbers for run in final if run.numbers is not None]
    peaks = [each.peak_tflops for each in numbers if each.peak_tflops]
    source = numbers[0].peak_source
    if len(set(peaks)) > 1:
        source = f"{source}; mean of {len(peaks)} runs"
    peak = statistics.fmean(peaks) if peaks else None
    return numbers_at(step_time_s, final[0], peak, source, numbers[0].total_tokens)


def scaling(groups: Sequence[Group], references: Sequence[Reference]) -> Iterator[ScalingCurve]:
    """Yield curves of points that differ in nothing but their size, then the tables that these are judged by.

    One point is no curve, unless there is a published one to hold it against.
    """
    curves: dict[tuple[Any, ...], dict[int, Point]] = {}
    for group in groups:
        if group.point.numbers is not None:
            same = {key: value for key, value in _identity(group.representative).items() if key not in _SCALE}
            size = (group.point.model, group.point.precision, *sorted(same.items()))
            curves.setdefault(size, {}).setdefault(group.point.gpus, group.point)
    judged_by: dict[tuple[str, str, str], None] = {}
    for points in curves.values():
        point = next(iter(points.values()))
        if point.reference is not None and point.verdict.ratio is not None:
            judged_by[point.reference.model, point.precision, point.reference.reference] = None
        elif len(points) == 1:
            continue
        label = " ".join(text for text in (point.model, point.precision, point.gpu, point.software) if text)
        rates = {gpus: point.numbers.tokens_per_s for gpus, point in points.items() if point.numbers}
        yield _curve(label, point, rates, published=False)
    for model, precision, name in judged_by:
        rows = [row for table in references if table.name == name for row in table.points]
        rows = [row for row in rows if (row.model, row.precision) == (model, precision)]
        rates = {row.gpus: row.tokens_per_s_from_step_time for row in rows}
        yield _curve(f"{model} {precision} {rows[0].gpu} published ({name})", rows[0], rates, published=True)


def _curve(label: str, first: Point | ReferencePoint, rates: dict[int, float], *, published: bool) -> ScalingCurve:
    gpus = tuple(sorted(rates))
    tokens = tuple(rates[number] for number in gpus)
    alone = tokens[0] / gpus[0]
    efficiency = tuple(rate / number / alone for rate, number in zip(tokens, gpus))
    return ScalingCurve(label, first.model, first.precision, first.gpu, published, gpus, tokens, efficiency)
