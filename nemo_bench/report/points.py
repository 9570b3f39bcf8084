"""Repeats gathered into points, and the scaling curves that points form."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from nemo_bench.report import verdict
from nemo_bench.report.model import BESIDE_PERFORMANCE, Numbers, Point, Run, ScalingCurve, flatten
from nemo_bench.report.numbers import numbers_at
from nemo_bench.report.references import Reference, ReferencePoint
from nemo_bench.report.statistics import Mean, mean_of_repeats

_IDENTITY = ("gpu", "gpu_reported", "software", "entrypoint", "container", "data", "global_batch_size", "seq_length")
# What a scaling curve runs over.
_SCALE = ("trainer.num_nodes", "trainer.devices", "model.global_batch_size", "global_batch_size")


def _identity(run: Run) -> dict[str, str]:
    """Return everything that makes a run another point than its neighbour."""
    config = flatten(run.record.config or {})
    performance = {key: value for key, value in config.items() if not BESIDE_PERFORMANCE.match(key)}
    return {**{key: str(getattr(run, key)) for key in _IDENTITY}, **performance}


@dataclass(frozen=True)
class Group:
    """The runs of one point."""

    name: str
    runs: tuple[Run, ...]

    @property
    def final(self) -> tuple[Run, ...]:
        """The runs with numbers."""
        return tuple(run for run in self.runs if run.numbers is not None)

    @property
    def kind(self) -> tuple[str | None, str | None]:
        """What runs have in common whose noise is alike: model and device."""
        return self.runs[0].model, self.runs[0].gpu

    @property
    def representative(self) -> Run:
        """A run that stands for all, a finished one where there is one."""
        return (self.final or self.runs)[0]

    def means_s(self) -> list[float]:
        """Return the mean step time of each finished run."""
        return [run.times.mean_s for run in self.final if run.times is not None]

    def step_time(self) -> Mean | None:
        """Return the point's step time with its error: over the repeats, or over the steps of the one run."""
        times = self.final[0].times if self.final else None
        return mean_of_repeats(self.means_s()) or (times.mean if times else None)


def gather(runs: Sequence[Run]) -> list[Group]:
    """Return the runs that are known well enough, by point; in order of model, precision and number of GPUs."""
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        if run.model is not None and run.precision is not None and run.gpus is not None:
            groups.setdefault((run.model, run.precision, run.gpus, *sorted(_identity(run).items())), []).append(run)
    ordered = sorted(groups.items(), key=lambda item: (str(item[0][0]), str(item[0][1]), item[0][2]))
    names, taken = [], Counter[str]()
    for _, members in ordered:
        name = members[0].point
        taken[name] += 1
        names.append(name if taken[name] == 1 else f"{name} #{taken[name]}")
    return [Group(name, tuple(members)) for name, (_, members) in zip(names, ordered)]


def make_point(group: Group, references: Sequence[Reference], tolerance: float) -> Point:
    """Return the point with its numbers, judged by its published number if there is one."""
    run, final = group.representative, group.final
    times = [repeat.times for repeat in final if repeat.times is not None]
    point = Point(
        name=group.name,
        model=str(run.model),
        precision=str(run.precision),
        gpus=run.gpus or 0,
        gpu=run.gpu,
        nodes=run.nodes,
        version=run.version,
        software=run.software,
        entrypoint=run.entrypoint,
        global_batch_size=run.global_batch_size,
        seq_length=run.seq_length,
        layout=run.layout,
        data=run.data,
        runs=tuple(repeat.name for repeat in group.runs),
        final_runs=tuple(repeat.name for repeat in final),
        numbers=_numbers(final, statistics.fmean(group.means_s())) if times else None,
        step_time=group.step_time(),
        median_s=statistics.fmean(statistic.median_s for statistic in times) if times else None,
        last_s=statistics.fmean(statistic.last_s for statistic in times) if times else None,
        reference=verdict.published(run, references),
    )
    return replace(point, verdict=verdict.judge(point, group.runs, references, tolerance))


def _numbers(final: Sequence[Run], step_time_s: float) -> Numbers | None:
    run, first = final[0], final[0].numbers
    if first is None or run.seq_length is None or run.global_batch_size is None or run.gpus is None:
        return None
    peaks = [run.numbers.peak_tflops for run in final if run.numbers is not None and run.numbers.peak_tflops]
    source = first.peak_source
    if len(set(peaks)) > 1 and source:
        source += f"; mean of {len(peaks)} runs"
    return numbers_at(
        step_time_s,
        seq_length=run.seq_length,
        global_batch_size=run.global_batch_size,
        gpus=run.gpus,
        sizes=run.architecture,
        peak_tflops=statistics.fmean(peaks) if peaks else None,
        peak_source=source,
        total_tokens=first.total_tokens,
    )


def scaling(groups: Sequence[Group], points: Sequence[Point], references: Sequence[Reference]) -> list[ScalingCurve]:
    """Return curves of points that differ in nothing but their size, and the published ones of the same work.

    One point is no curve, unless there is a published one to hold it against.
    """
    families: dict[tuple[Any, ...], list[dict[int, Point]]] = {}
    for group, point in zip(groups, points):
        if point.numbers is None:
            continue
        same = {key: value for key, value in _identity(group.representative).items() if key not in _SCALE}
        curves = families.setdefault((point.model, point.precision, *sorted(same.items())), [{}])
        if point.gpus in curves[-1]:
            curves.append({})
        curves[-1][point.gpus] = point
    runs = {point.name: group.representative for group, point in zip(groups, points)}
    drawn: list[ScalingCurve] = []
    published: dict[tuple[str, str, str], list[ReferencePoint]] = {}
    for curve in (curve for family in families.values() for curve in family):
        first = next(iter(curve.values()))
        rows = _same_work(runs[first.name], references)
        for row in rows:
            rows_of_curve = published.setdefault((row.model, row.precision, row.reference), [])
            rows_of_curve += [row] * (row not in rows_of_curve)
        if not rows and len(curve) < 2:
            continue
        label = " ".join(text for text in (first.model, first.precision, first.gpu, first.software) if text)
        rates = {gpus: point.numbers.tokens_per_s for gpus, point in curve.items() if point.numbers}
        drawn.append(_curve(label, first.model, first.precision, first.gpu, False, rates))
    for (model, precision, reference), rows in sorted(published.items()):
        label = f"{model} {precision} {rows[0].gpu} published ({reference})"
        rates = {row.gpus: row.tokens_per_s_from_step_time for row in rows}
        drawn.append(_curve(label, model, precision, rows[0].gpu, True, rates))
    return drawn


def _same_work(run: Run, references: Sequence[Reference]) -> list[ReferencePoint]:
    """Return the published points of which a step is the same work a sequence, on whatever GPUs."""
    rows = [row for table in references for row in table.points]
    rows = [row for row in rows if (row.model, row.precision) == (run.model, run.precision)]
    size = ("gpu", "gpus", "global_batch_size")
    return [
        row
        for row in rows
        if all(value.before == value.after for value in verdict.must_agree(run, row) if value.key not in size)
    ]


def _curve(
    label: str, model: str, precision: str, gpu: str | None, published: bool, rates: dict[int, float]
) -> ScalingCurve:
    gpus = tuple(sorted(rates))
    tokens = tuple(rates[number] for number in gpus)
    first = tokens[0] / gpus[0]
    efficiency = tuple(rate / number / first for rate, number in zip(tokens, gpus))
    return ScalingCurve(label, model, precision, gpu, published, gpus, tokens, efficiency)
