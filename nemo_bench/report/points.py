"""Repeats gathered into points, points held against published numbers, and the scaling curves they form."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from nemo_bench.report import model
from nemo_bench.report.model import Point, Reference, ReferencePoint, Run, ScalingCurve, Verdict
from nemo_bench.report.numbers import numbers_at, unit_name
from nemo_bench.report.runs import changed_sizes
from nemo_bench.report.statistics import Estimate, estimate_of_repeats, estimate_of_steps, interval

# Beyond these, a run's steps are worth a word beside its verdict.
DRIFT = 0.02
SPREAD = 0.05
SHOWN_FAULTS = 5
SHOWN_DIFFERENCES = 3

_PERCENT = re.compile(r"\d+(?:\.\d+)?%")

# Keys of the configuration that no step time depends on.
_BESIDE_PERFORMANCE = (
    "stage_path",
    "results_version",
    "total_tokens",
    "launch",
    "checkpoint.",
    "cluster.",
    "trainer.max_steps",
    "trainer.seed",
    "trainer.limit_val_batches",
    "data.folder",
    "data.paths",
    "data.tokenizer",
    "gpu.source",
    # what it offers; the container that a run had is cluster.container
    "entrypoint.container",
    "entrypoint.image",
    "entrypoint.version",
)
_STILL_PERFORMANCE = ("cluster.env.", "cluster.container.image", "cluster.srun_args", "cluster.setup")
# What the name of a point says shorter: parallel sizes as one text, the rest by the named values.
PARALLEL = "parallel"
_TOLD_OTHERWISE = (
    "model.global_batch_size",
    "model.tensor_model_parallel_size",
    "model.pipeline_model_parallel_size",
    "model.virtual_pipeline_model_parallel_size",
    "model.context_parallel_size",
    "trainer.num_nodes",
    "trainer.devices",
)
# Keys that follow from a named value, where that is told.
_DETAILS = {
    "data": "data.",
    "gpu": "gpu.",
    "entrypoint": "entrypoint.",
    "container": "cluster.container.image",
    "seq_length": "model.seq_length",
}
# What a scaling curve runs over.
_SCALE = ("trainer.num_nodes", "trainer.devices", "model.global_batch_size")


def flatten(config: Any, prefix: str = "") -> dict[str, str]:
    """A nested configuration as dotted keys with their values as text."""
    if isinstance(config, dict) and config:
        return {
            key: text
            for name, item in config.items()
            for key, text in flatten(item, f"{prefix}.{name}" if prefix else str(name)).items()
        }
    return {prefix: "null" if config is None else str(config)} if prefix else {}


def _performance(run: Run) -> dict[str, str]:
    return {
        key: value
        for key, value in flatten(run.config or {}).items()
        if (key.startswith(_STILL_PERFORMANCE) or not key.startswith(_BESIDE_PERFORMANCE))
    }


def _identity(run: Run) -> dict[str, str]:
    """Everything that makes a run another point than its neighbour."""
    named = {
        "gpu": run.gpu,
        "version": run.version,
        "entrypoint": run.entrypoint,
        "container": run.container,
        "data": run.data,
        "global_batch_size": run.global_batch_size,
        "seq_length": run.seq_length,
    }
    return {**{key: str(value) for key, value in named.items()}, **_performance(run)}


@dataclass(frozen=True)
class Group:
    """The runs of one point."""

    name: str
    runs: tuple[Run, ...]

    @property
    def final(self) -> tuple[Run, ...]:
        return tuple(run for run in self.runs if run.numbers is not None)

    @property
    def alike(self) -> tuple[str | None, str | None]:
        """What runs have in common whose noise is alike: model and device."""
        return self.runs[0].model, self.runs[0].gpu

    @property
    def one(self) -> Run:
        """A run that stands for all, a finished one where there is one."""
        return (self.final or self.runs)[0]


def gather(runs: Sequence[Run]) -> list[Group]:
    """The runs that are known well enough, by point; in order of model, precision and number of GPUs."""
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        if run.model is not None and run.precision is not None and run.gpus is not None:
            groups.setdefault((run.model, run.precision, run.gpus, *sorted(_identity(run).items())), []).append(run)
    ordered = sorted(groups.items(), key=lambda item: (str(item[0][0]), str(item[0][1]), item[0][2]))
    names = _names([members[0] for _, members in ordered])
    return [Group(name, tuple(members)) for name, (_, members) in zip(names, ordered)]


def _names(runs: Sequence[Run]) -> list[str]:
    """`70b bf16 64gpu`, and where that is not unique, what tells the points apart.

    Said of a point is what most others of that name do not share; where no value is the most common, it is said of all.
    """
    short = [f"{run.model} {run.precision} {run.gpus}gpu" for run in runs]
    names = []
    for run, name in zip(runs, short):
        twins = [_told(other) for other, its in zip(runs, short) if its == name]
        sizes_alike = [_told(other) for other in runs if (other.model, other.gpus) == (run.model, run.gpus)]
        told = {}
        for key, value in _told(run).items():
            others = sizes_alike if key == PARALLEL else twins  # bf16 TP2 and fp8 TP2 beside bf16 CP2
            values = [other[key] for other in others if key in other]
            if values.count(value) <= len(values) / 2:
                told[key] = value
        # A 70b of 4 layers is none, and its name says so.
        told = {f"model.{key}": str(value) for key, value in changed_sizes(run).items()} | told
        texts = _texts({key: value for key, value in told.items() if not _said_already(key, told)})
        texts[SHOWN_DIFFERENCES:] = ["..."] * (len(texts) > SHOWN_DIFFERENCES)
        names.append(f"{name} ({', '.join(texts)})" if texts else name)
    counted: dict[str, int] = {}
    for i, name in enumerate(names):
        counted[name] = counted.get(name, 0) + 1
        names[i] = name if counted[name] == 1 else f"{name} #{counted[name]}"
    return names


def _told(run: Run) -> dict[str, str]:
    """What makes a run another point than its neighbour, with parallel sizes as one."""
    told = {}
    if run.layout:
        sizes = (f"{key}{run.layout[key]}" for key in ("TP", "PP", "VP", "CP", "DP") if run.layout.get(key, 1) > 1)
        told[PARALLEL] = " ".join(sizes) or "one GPU"
    if run.nodes is not None:
        told["nodes"] = str(run.nodes)
    return told | {key: value for key, value in _identity(run).items() if key not in _TOLD_OTHERWISE}


def _said_already(key: str, told: dict[str, str]) -> bool:
    """Whether another key that is told says the same, as the GPU's name says what its memory is."""
    return any(name in told and key.startswith(details) for name, details in _DETAILS.items())


def _texts(told: dict[str, str]) -> list[str]:
    ends = [key.rpartition(".")[2] for key in told]
    texts = []
    for (key, value), end in zip(told.items(), ends):
        if key == PARALLEL:
            texts.append(value)
        elif key == "global_batch_size":
            texts.append(f"GBS {value}")
        else:
            shown = value.lower() if value in ("True", "False") else value
            texts.append(f"{end if ends.count(end) == 1 else key}={shown}")
    return texts


def estimate(group: Group) -> Estimate | None:
    """The step time of a point with its error: over the repeats, or over the steps of the one run."""
    final = group.final
    medians = [run.times.median_s for run in final if run.times is not None]
    return estimate_of_repeats(medians) or (estimate_of_steps(counted_times(final[0])) if final else None)


def counted_times(run: Run) -> list[float]:
    """The step times that count, in seconds."""
    return [time for time, why in zip(run.steps.time_s, run.steps.excluded) if why is None and time is not None]


def make_point(group: Group, reference: Reference | None, tolerance: float) -> Point:
    """The point with its numbers, held against its published number if there is one."""
    run, final = group.one, group.final
    medians = [each.times.median_s for each in final if each.times is not None]
    found = estimate(group)
    method = "repeats" if len(final) > 1 else "batches of steps"
    published = _published(run, reference)
    numbers = _numbers(final, statistics.fmean(medians)) if medians else None
    point = Point(
        name=group.name,
        model=str(run.model),
        precision=str(run.precision),
        gpus=run.gpus or 0,
        gpu=run.gpu,
        nodes=run.nodes,
        version=run.version,
        entrypoint=run.entrypoint,
        global_batch_size=run.global_batch_size,
        seq_length=run.seq_length,
        layout=run.layout,
        data=run.data,
        runs=tuple(each.name for each in group.runs),
        final_runs=tuple(each.name for each in final),
        numbers=numbers,
        step_time_interval=interval(found, method),
        reference=published,
        verdict=Verdict(model.NO_REFERENCE, None, None, tolerance, "there is no published number for it", ()),
    )
    if reference is None or published is None:
        return point
    return replace(point, verdict=_judge(point, group, reference, published, tolerance))


def _numbers(final: Sequence[Run], step_time_s: float) -> model.Numbers | None:
    run, first = final[0], final[0].numbers
    if first is None or run.seq_length is None or run.global_batch_size is None or run.gpus is None:
        return None
    peaks = [each.numbers.peak_tflops for each in final if each.numbers is not None and each.numbers.peak_tflops]
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


# --- verdicts -----------------------------------------------------------------------------------------------


def _published(run: Run, reference: Reference | None) -> ReferencePoint | None:
    wanted = (run.model, run.precision, run.gpus)
    points = reference.points if reference else ()
    return next((each for each in points if (each.model, each.precision, each.gpus) == wanted), None)


def _judge(point: Point, group: Group, reference: Reference, published: ReferencePoint, tolerance: float) -> Verdict:
    run = group.one
    differs = _other_work(run, reference, published)
    if differs:
        return Verdict(model.NOT_COMPARABLE, None, None, tolerance, f"other work: {'; '.join(differs)}", ())
    if point.numbers is None:
        why = "; ".join(
            dict.fromkeys(each.why_not_final or "its batch or sequence is not known" for each in group.runs)
        )
        return Verdict(model.INCOMPLETE, None, None, tolerance, f"no finished run: {why}", ())
    base = published.tokens_per_s_from_step_time
    ratio = point.numbers.tokens_per_s / base
    ratio_last = statistics.fmean(each.numbers_last.tokens_per_s for each in group.final if each.numbers_last) / base
    value = _value(ratio, tolerance)
    why = f"{abs(ratio - 1):.1%} {'faster' if ratio >= 1 else 'slower'} than published, tolerance {tolerance:.1%}"
    reasons = list(_reasons(group, reference, published))
    if _value(ratio_last, tolerance) != value:
        reasons.append(
            f"by the last step alone, as the recipe reads it: {_value(ratio_last, tolerance)} "
            f"({abs(ratio_last - 1):.1%} {'faster' if ratio_last >= 1 else 'slower'})"
        )
    edge = point.step_time_interval
    if edge is not None and _value(ratio * point.numbers.step_time_s / edge.high, tolerance) != value:
        reasons.append("the slow end of its confidence interval would be judged otherwise")
    return Verdict(value, ratio, ratio_last, tolerance, why, (*reasons, *published.notes))


def _value(ratio: float, tolerance: float) -> str:
    if ratio < 1 - tolerance:
        return model.FAIL
    return model.FASTER if ratio > 1 + tolerance else model.PASS


def _other_work(run: Run, reference: Reference, published: ReferencePoint) -> list[str]:
    """What makes a step of the run another amount of work for each sequence."""
    found = []
    if run.seq_length is not None and run.seq_length != published.seq_length:
        found.append(f"seq_length={run.seq_length}, published {published.seq_length}")
    sizes = reference.architecture.get(published.model, {})
    for key, value in (vars(run.architecture) if run.architecture else {}).items():
        if key in sizes and sizes[key] != value:
            found.append(f"{key}={value}, published {sizes[key]}")
    return found


def _reasons(group: Group, reference: Reference, published: ReferencePoint) -> list[str]:
    """What the record shows that may explain a difference."""
    run = group.one
    found = []
    if run.container is not None and run.container != reference.container:
        found.append(f"container: {run.container}, published with {reference.container}")
    elif run.container is None and run.source == "run folder":
        found.append(f"no container: bare on the machine, published with {reference.container}")
    if run.version is not None and run.version != reference.version:
        found.append(f"software: {run.version}, published with {reference.version}")
    if run.gpu is not None and run.gpu != published.gpu:
        found.append(f"GPU: {run.gpu}, published on {published.gpu}")
    if run.gpu and run.gpu_reported and run.gpu.lower() not in run.gpu_reported.lower():
        found.append(f"configured as {run.gpu}, and the driver calls it {run.gpu_reported}")
    if run.global_batch_size is not None and run.global_batch_size != published.global_batch_size:
        found.append(f"global batch size: {run.global_batch_size}, published with {published.global_batch_size}")
    layout = {key: value for key, value in run.layout.items() if reference.layout.get(key, value) != value}
    if layout:
        theirs = " ".join(f"{key}{reference.layout[key]}" for key in layout)
        found.append(f"layout: {' '.join(f'{key}{value}' for key, value in layout.items())}, published with {theirs}")
    if run.data is not None and run.data != reference.data:
        what = "random tokens (data=mock)" if run.data == "mock" else f"data={run.data}"
        found.append(f"data: {what}, published with {reference.data}")
    return found + _reasons_of_all(group.final)


def _reasons_of_all(runs: Sequence[Run]) -> list[str]:
    """What the records of repeats show, each reason once: with the range of its percentages, and in how many runs."""
    said: dict[str, list[tuple[Run, str]]] = {}
    for run in runs:
        for text in _reasons_of(run):
            said.setdefault(_PERCENT.sub("%", text), []).append((run, text))
    return [_merged(found, len(runs)) for found in said.values()]


def _merged(found: Sequence[tuple[Run, str]], runs: int) -> str:
    text = found[0][1]
    columns = zip(*(_PERCENT.findall(each) for _, each in found))
    ends = [(min(values, key=_percent), max(values, key=_percent)) for values in columns]
    each_end = iter(low if low == high else f"{low} to {high}" for low, high in ends)
    text = _PERCENT.sub(lambda _: next(each_end), text)
    if runs == 1:
        return text
    where = f"all {runs}" if len(found) == runs else f"{len(found)} of {runs}"
    return f"{text} (in {where} runs)"


def _percent(text: str) -> float:
    return float(text.rstrip("%"))


def _reasons_of(run: Run) -> list[str]:
    found = []
    times = run.times
    if times is not None:
        pauses = [f"{number} after a {reason}" for reason, number in times.excluded.items() if reason != "restart"]
        if pauses:
            found.append(f"disturbed steps, left out: {', '.join(pauses)}")
        if times.excluded.get("restart"):
            found.append("the run was restarted")
        if abs(times.drift) > DRIFT:
            way = "slower" if times.drift > 0 else "faster"
            found.append(f"steps became {abs(times.drift):.1%} {way} during the run")
        if times.spread_s > SPREAD * times.median_s:
            found.append(f"steps spread by {times.spread_s / times.median_s:.0%} of their median")
    slow = [rank for rank in run.ranks if rank.straggler]
    for rank in slow[:SHOWN_FAULTS]:
        by = "" if rank.slower is None else f", {rank.slower:.0%} slower than the others"
        found.append(f"straggling {unit_name(run)}: rank {rank.rank} ({rank.measure}{by})")
    if len(slow) > SHOWN_FAULTS:
        found.append(f"and {len(slow) - SHOWN_FAULTS} more stragglers")
    return found + list(throttling(run))


def throttling(run: Run) -> list[str]:
    """What the driver said of clocks held back: where it was asked during the steps, else as node.json has it.

    The power cap is no fault: at full load it is what ends the clocks' rise. It is shown elsewhere, not blamed.
    """
    faults = [
        (max(shares.values()), each, shares)
        for each in run.devices
        if (shares := {reason: share for reason, share in each.throttled.items() if reason != "sw_power_cap"})
    ]
    faults.sort(key=lambda fault: (-fault[0], fault[1].rank))
    found = []
    for _, each, shares in faults[:SHOWN_FAULTS]:
        told = ", ".join(f"{reason.replace('_', ' ')} in {share:.0%} of its steps" for reason, share in shares.items())
        found.append(f"clocks of rank {each.rank}'s GPU{f' on {each.host}' if each.host else ''} held back: {told}")
    if len(faults) > SHOWN_FAULTS:
        found.append(f"and of {len(faults) - SHOWN_FAULTS} more ranks' GPUs")
    for i, gpu in enumerate(() if run.devices else run.hardware.get("gpus") or ()):
        held = [
            key.rpartition(".")[2].replace("_", " ")
            for key, value in gpu.items()
            if key.startswith(("clocks_event_reasons.", "clocks_throttle_reasons.")) and value == "Active"
        ]
        if held:
            found.append(f"clocks of GPU {i} held back: {', '.join(held)}")
    return found


def overall(points: Sequence[Point]) -> str:
    """The verdict of a whole report."""
    values = {point.verdict.value for point in points}
    if model.FAIL in values:
        return model.FAIL
    if model.INCOMPLETE in values:
        return model.INCOMPLETE
    return model.PASS if values & {model.PASS, model.FASTER} else model.NO_REFERENCE


# --- scaling ------------------------------------------------------------------------------------------------


def scaling(groups: Sequence[Group], points: Sequence[Point], reference: Reference | None) -> list[ScalingCurve]:
    """Curves of points that differ in nothing but their size, and beside them the published ones of the same work.

    One point is no curve, unless there is a published one to hold it against.
    """
    curves: dict[tuple[Any, ...], list[dict[int, Point]]] = {}
    for group, point in zip(groups, points):
        if point.numbers is None:
            continue
        same = {key: value for key, value in _identity(group.one).items() if key not in (*_SCALE, "global_batch_size")}
        alike = curves.setdefault((point.model, point.precision, *sorted(same.items())), [{}])
        if point.gpus in alike[-1]:
            alike.append({})
        alike[-1][point.gpus] = point
    runs = {point.name: group.one for group, point in zip(groups, points)}
    found: list[ScalingCurve] = []
    beside: dict[tuple[str, str], list[ReferencePoint]] = {}
    for curve in (each for alike in curves.values() for each in alike):
        one = next(iter(curve.values()))
        published = _published_of(runs[one.name], reference)
        if published:
            beside[one.model, one.precision] = published
        elif len(curve) < 2:
            continue
        told = " ".join(text for text in (one.model, one.precision, one.gpu, one.version) if text)
        rates = {gpus: point.numbers.tokens_per_s for gpus, point in curve.items() if point.numbers}
        found.append(_curve(told, one.model, one.precision, one.gpu, False, rates))
    for (name, precision), published in sorted(beside.items()):
        label = f"{name} {precision} {published[0].gpu} published ({published[0].reference})"
        rates = {each.gpus: each.tokens_per_s_from_step_time for each in published}
        found.append(_curve(label, name, precision, published[0].gpu, True, rates))
    return found


def _published_of(run: Run, reference: Reference | None) -> list[ReferencePoint]:
    """The published points of the run's model and number format, where a step of them is the same work."""
    if reference is None:
        return []
    alike = [each for each in reference.points if (each.model, each.precision) == (run.model, run.precision)]
    return [each for each in alike if not _other_work(run, reference, each)]


def _curve(
    label: str, name: str, precision: str, gpu: str | None, published: bool, rates: dict[int, float]
) -> ScalingCurve:
    gpus = tuple(sorted(rates))
    tokens = tuple(rates[each] for each in gpus)
    first = tokens[0] / gpus[0]
    return ScalingCurve(
        label, name, precision, gpu, published, gpus, tokens, tuple(t / g / first for t, g in zip(tokens, gpus))
    )
