"""Where a training step's time goes: time by kernel class, from the trace that `profile=torch` leaves.

Each instant of a step counts once, over all streams of the GPU: for the first class (kernel_classes.CLASSES) that is
running at that instant. Communication and copies come last, so they hold only the time that no computation hides; the
sum of their kernels' times stands next to it. An instant in which nothing runs is idle.
"""

from __future__ import annotations

import gzip
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from nemo_bench.record.folder import typed
from nemo_bench.report import kernel_classes
from nemo_bench.report.kernel_classes import CLASSES, COMMUNICATION

# The names that training/profiling.py gives to a profiled step (its number follows) and to the optimizer's part of it.
STEP_MARK = "nemo_bench step "
OPTIMIZER_MARK = "nemo_bench optimizer"

TOP_KERNELS = 5

# Operations of the model's ends, by their names in Megatron, Transformer Engine and PyTorch.
_HEAD = r"LinearWithGradAccumulation|\w*CrossEntropy|aten::embedding|(Embedding|Index)Backward"
_NO_VALUE = re.compile(r'(":\s*)(?:-?(?:nan|inf))?(?=\s*[,}])')
_GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")


@dataclass(frozen=True)
class KernelTime:
    """One kernel: its shortened name, its time a step, and how often it ran in a step."""

    name: str
    total_ms: float
    count: float


@dataclass(frozen=True)
class ClassTime:
    """One class of kernels in a step."""

    name: str  # one of kernel_classes.CLASSES
    ms: float  # each instant counted once: the classes and the idle time add up to the step
    share: float  # ms divided by the step's time
    total_ms: float  # sum of the kernels' times; kernels may run side by side
    count: float  # kernels
    top: tuple[KernelTime, ...]  # the kernels that take the most time


@dataclass(frozen=True)
class StepProfile:
    """Where the time of one rank's profiled steps went: means over these steps."""

    rank: int
    device: str | None  # the GPU's name; None if the trace does not name it
    steps: tuple[int, ...]  # numbers of the profiled steps
    step_ms: float
    classes: tuple[ClassTime, ...]  # those that ran, in the order of kernel_classes.CLASSES
    idle_ms: float  # nothing was running
    communication_ms: float  # some communication was running
    exposed_communication_ms: float  # communication was running, and no computation
    # The same instants by the terms of an estimate (kernel_classes.term_of), ms; empty in profiles of earlier versions.
    terms: dict[str, float] = field(default_factory=dict)


def from_dict(content: dict[str, Any]) -> StepProfile:
    """Return the profile in a `rank<N>.json`, of this version or an earlier one; raise ValueError if it is damaged."""
    if content["step_ms"] <= 0:
        raise ValueError(f"step_ms={content['step_ms']} is no time of a step")
    tops = [tuple(typed(KernelTime, kernel) for kernel in item["top"]) for item in content["classes"]]
    classes = tuple(typed(ClassTime, {**item, "top": top}) for item, top in zip(content["classes"], tops))
    return typed(StepProfile, {**content, "steps": tuple(content["steps"]), "classes": classes})


Event = dict[str, Any]
Span = tuple[float, float]  # where it begins and ends, in microseconds


class _Kernel(NamedTuple):
    name: str
    kind: str  # one of CLASSES
    term: str
    start_us: float
    end_us: float


def measure(path: Path, rank: int) -> StepProfile:
    """Return the profile of a rank's trace, plain or gzipped; raise ValueError if it has no GPU kernels or no steps."""
    import orjson  # not needed where no profile is read

    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    # The profiler writes empty, infinite and NaN values, and names of kernels in any encoding.
    trace = orjson.loads(_NO_VALUE.sub(r"\1null", content.decode("utf-8", "replace")))
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    steps = {int(name.removeprefix(STEP_MARK)): span for name, span in _spans(events, STEP_MARK + r"\d+$")}
    kernels = [*_kernels(events)]
    if not kernels or not steps:
        raise ValueError(f"{path}: holds no GPU kernels, or no step is marked")
    gpu = next(event["args"].get("device", 0) for event in events if event.get("cat") in _GPU_WORK)
    devices = trace.get("deviceProperties") or ()
    name = next((device.get("name") for device in devices if device.get("id") == gpu), None)
    return _profile(kernels, steps, rank, name)


def _kernels(events: Sequence[Event]) -> Iterator[_Kernel]:
    """Yield the GPU's kernels and copies; what the optimizer launches belongs to it, but for transfers."""
    launched_us = {event["args"].get("correlation"): event["ts"] for event in events if event.get("cat") in _LAUNCHES}
    optimizer = [span for _, span in _spans(events, OPTIMIZER_MARK)]
    head = [span for _, span in _spans(events, _HEAD, "cpu_op")]
    for event in events:
        if event.get("cat") in _GPU_WORK:
            kind, start = kernel_classes.kernel_class(event["name"]), float(event["ts"])
            launched = float(launched_us.get(event["args"].get("correlation"), start))
            in_optimizer, in_head = (any(a <= launched <= b for a, b in spans) for spans in (optimizer, head))
            if in_optimizer and kind not in (COMMUNICATION, kernel_classes.MEMORY):
                kind = kernel_classes.OPTIMIZER
            term = kernel_classes.term_of(kind, event["name"], event["args"], in_head)
            yield _Kernel(event["name"], kind, term, start, start + event["dur"])


def _spans(events: Sequence[Event], names: str, category: str = "user_annotation") -> Iterator[tuple[str, Span]]:
    """Yield the names, and the ranges, of what the program, or else PyTorch, named so."""
    for event in events:
        if event.get("cat") == category and re.match(names, event["name"]):
            yield event["name"], (event["ts"], event["ts"] + event["dur"])


def _profile(kernels: Sequence[_Kernel], steps: dict[int, Span], rank: int, device: str | None) -> StepProfile:
    total_us = {kind: defaultdict[str, float](float) for kind in CLASSES}  # name -> sum of the kernels' times
    count = Counter[tuple[str, str]]()
    counted_us, terms_us = dict.fromkeys(CLASSES, 0.0), defaultdict[str, float](float)
    communication_us = 0.0
    for first, last in steps.values():
        edges = []  # where a kernel of a class begins (+1) or ends (-1)
        for name, kind, term, start_us, end_us in kernels:
            if start_us < last and end_us > first:
                begin, end = max(start_us, first), min(end_us, last)
                running_as = CLASSES.index(kind), term
                edges += [(begin, 1, running_as), (end, -1, running_as)]
                total_us[kind][name] += end - begin
                count[kind, name] += start_us >= first
        running: Counter[tuple[int, str]] = Counter()
        for (moment, change, running_as), (following, _, _) in pairwise(sorted(edges)):
            running[running_as] += change
            if classes := sorted(key for key, number in running.items() if number):
                counted_us[CLASSES[classes[0][0]]] += following - moment
                terms_us[classes[0][1]] += following - moment
                communicates = any(CLASSES[kind] == COMMUNICATION for kind, _ in classes)
                communication_us += (following - moment) * communicates
    us_per_ms = 1e3 * len(steps)  # microseconds of all steps to milliseconds of one
    step_ms = sum(last - first for first, last in steps.values()) / us_per_ms
    class_times = []
    for kind, time_us in counted_us.items():
        kernel_times = [
            KernelTime(kernel_classes.short_name(name), kernel_us / us_per_ms, count[kind, name] / len(steps))
            for name, kernel_us in total_us[kind].items()
        ]
        if kernel_times:
            total_ms = sum(kernel.total_ms for kernel in kernel_times)
            number = sum(kernel.count for kernel in kernel_times)
            top = sorted(kernel_times, key=lambda kernel: -kernel.total_ms)[:TOP_KERNELS]
            ms = time_us / us_per_ms
            class_times.append(ClassTime(kind, ms, ms / step_ms, total_ms, number, tuple(top)))
    return StepProfile(
        rank,
        device,
        steps=tuple(sorted(steps)),
        step_ms=step_ms,
        classes=tuple(class_times),
        idle_ms=step_ms - sum(counted_us.values()) / us_per_ms,
        communication_ms=communication_us / us_per_ms,
        exposed_communication_ms=counted_us[COMMUNICATION] / us_per_ms,
        terms={term: time_us / us_per_ms for term, time_us in terms_us.items()},
    )
