"""Where a training step's time goes: time by kernel class, from a trace of PyTorch's profiler.

    python -m nemo_bench.report.profile TRACE.json.gz ...

prints the table of any such trace, whether `profile=torch` wrote it or somebody else's program.

Each instant of a step counts once, over all streams of the GPU: for the first class (kernel_classes.CLASSES) that is
running at that instant. Communication and copies come last, so they hold only the time that no computation hides; the
sum of their kernels' times stands next to it. An instant in which nothing runs is idle.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_bench.errors import BenchError
from nemo_bench.files import write_json, write_text
from nemo_bench.report import kernel_classes as classes
from nemo_bench.report.trace import Trace, read_trace

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Integers = NDArray[np.int64]

# The names that training/profiling.py gives to a profiled step (its number follows) and to the optimizer's part of it.
STEP_MARK = "nemo_bench step "
OPTIMIZER_MARK = "nemo_bench optimizer"

TOP_KERNELS = 5

_OUR_STEP, _PROFILER_STEP = re.compile(rf"{STEP_MARK}(\d+)$"), re.compile(r"ProfilerStep#(\d+)$")
_OPTIMIZER = re.compile(f"{OPTIMIZER_MARK}$|Optimizer.step#")
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

    rank: int | None  # None if the trace does not name it
    device: str | None  # the GPU's name; None if the trace does not name it
    steps: tuple[int, ...]  # numbers of the profiled steps
    step_ms: float
    classes: tuple[ClassTime, ...]  # those that ran, in the order of kernel_classes.CLASSES
    idle_ms: float  # nothing was running
    communication_ms: float  # some communication was running
    exposed_communication_ms: float  # communication was running, and no computation
    notes: tuple[str, ...]


def from_dict(content: dict[str, Any]) -> StepProfile:
    """Return the profile that `write` put into a `rank<N>.json`.

    Raises:
        KeyError, TypeError: the content is damaged.
    """
    times = (
        ClassTime(**{**item, "top": tuple(KernelTime(**kernel) for kernel in item["top"])})
        for item in content["classes"]
    )
    sequences = {"classes": tuple(times), "steps": tuple(content["steps"]), "notes": tuple(content["notes"])}
    return StepProfile(**{**content, **sequences})


def write(profile: StepProfile, stem: Path) -> None:
    """Write `<stem>.json` and, for people, `<stem>.txt`."""
    write_json(stem.with_name(stem.name + ".json"), asdict(profile))
    write_text(stem.with_name(stem.name + ".txt"), text(profile))


# --- reading ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Kernels:
    """The kernels and copies of one GPU, in columns of equal length; times in microseconds."""

    names: list[str]  # distinct names
    name: Integers  # index into `names`
    kernel_class: Integers  # index into kernel_classes.CLASSES
    start: Floats
    end: Floats


def measure(path: Path, rank: int | None = None) -> StepProfile:
    """Return the profile of a trace file, plain or gzipped.

    Args:
        path: the trace.
        rank: the rank that wrote it; None: the one that the trace names.

    Raises:
        BenchError: the file cannot be read, is not a trace, or holds no GPU kernels.
    """
    trace = read_trace(path)
    notes = [f"{trace.unreadable:,} events are not JSON and were left out"] if trace.unreadable else []
    work = [event for event in trace.events if event.get("cat") in _GPU_WORK]
    if not work:
        raise BenchError(f"{path}: holds no GPU kernels")
    busy_us: Counter[int] = Counter()
    for event in work:
        busy_us[event["args"].get("device", 0)] += event.get("dur", 0)
    gpu = busy_us.most_common(1)[0][0]
    if len(busy_us) > 1:
        notes.append(f"the trace holds several GPUs: this is GPU {gpu}, the busiest")
    kernels = _kernels(trace, gpu)
    steps: dict[int, tuple[float, float]] = {}
    for mark in (_OUR_STEP, _PROFILER_STEP):
        steps = steps or {int(match[1]): (first, last) for match, first, last in _spans(trace, mark)}
    if not steps:
        steps = {0: (float(kernels.start.min()), float(kernels.end.max()))}
        notes.append("no steps are marked in the trace: all of it counts as one")
    devices = trace.header.get("deviceProperties") or []
    return _profile(
        kernels,
        steps,
        rank=(trace.header.get("distributedInfo") or {}).get("rank") if rank is None else rank,
        device=next((device.get("name") for device in devices if device.get("id") == gpu), None),
        notes=tuple(notes),
    )


def _kernels(trace: Trace, gpu: int) -> _Kernels:
    import numpy as np

    work = [event for event in trace.events if event.get("cat") in _GPU_WORK and event["args"].get("device", 0) == gpu]
    start = np.array([event["ts"] for event in work], dtype=np.float64)
    end = start + np.array([event.get("dur", 0) for event in work], dtype=np.float64)
    number_of_name: dict[str, int] = {}
    name = np.array([number_of_name.setdefault(event["name"], len(number_of_name)) for event in work])
    class_of_name = np.array([classes.CLASSES.index(classes.kernel_class(text)) for text in number_of_name])
    kernel_class = class_of_name[name]
    # What the optimizer launches belongs to it, but for communication and copies.
    launches = {
        event["args"].get("correlation"): event["ts"] for event in trace.events if event.get("cat") in _LAUNCHES
    }
    launched = np.array([launches.get(event["args"].get("correlation"), event["ts"]) for event in work])
    by_optimizer = _within(launched, [(first, last) for _, first, last in _spans(trace, _OPTIMIZER)])
    transfers = [classes.CLASSES.index(kind) for kind in (classes.COMMUNICATION, classes.MEMORY)]
    kernel_class[by_optimizer & ~np.isin(kernel_class, transfers)] = classes.CLASSES.index(classes.OPTIMIZER)
    return _Kernels(list(number_of_name), name, kernel_class, start, end)


def _spans(trace: Trace, names: re.Pattern[str]) -> Iterator[tuple[re.Match[str], float, float]]:
    """Yield where each range that the program named so begins and ends."""
    for event in trace.events:
        if event.get("cat") == "user_annotation" and (match := names.match(event["name"])):
            yield match, event["ts"], event["ts"] + event.get("dur", 0)


# --- counting -----------------------------------------------------------------------------------------------


def _profile(
    kernels: _Kernels,
    steps: dict[int, tuple[float, float]],
    *,
    rank: int | None,
    device: str | None,
    notes: tuple[str, ...],
) -> StepProfile:
    import numpy as np

    cells = (len(classes.CLASSES), len(kernels.names))
    key = kernels.kernel_class * cells[1] + kernels.name
    counted_us, communication_us = np.zeros(cells[0]), 0.0
    total_us, count = np.zeros(cells[0] * cells[1]), np.zeros(cells[0] * cells[1])
    for first, last in steps.values():
        count += np.bincount(key[(kernels.start >= first) & (kernels.start < last)], minlength=len(count))
        inside = np.flatnonzero((kernels.start < last) & (kernels.end > first))
        begin, end = np.maximum(kernels.start[inside], first), np.minimum(kernels.end[inside], last)
        total_us += np.bincount(key[inside], weights=end - begin, minlength=len(count))
        covered, covered_us = (np.empty(0), np.empty(0)), 0.0
        for number, name in enumerate(classes.CLASSES):
            own = kernels.kernel_class[inside] == number
            covered = _union(np.append(covered[0], begin[own]), np.append(covered[1], end[own]))
            counted_us[number] += _length(covered) - covered_us
            covered_us = _length(covered)
            if name == classes.COMMUNICATION:
                communication_us += _length(_union(begin[own], end[own]))
    us_per_ms = 1e3 * len(steps)  # microseconds of all steps to milliseconds of one
    step_ms = sum(last - first for first, last in steps.values()) / us_per_ms
    counted_ms = counted_us / us_per_ms
    return StepProfile(
        rank=rank,
        device=device,
        steps=tuple(sorted(steps)),
        step_ms=step_ms,
        classes=_class_times(
            kernels.names, counted_ms, total_us.reshape(cells) / us_per_ms, count.reshape(cells) / len(steps), step_ms
        ),
        idle_ms=step_ms - float(counted_ms.sum()),
        communication_ms=communication_us / us_per_ms,
        exposed_communication_ms=float(counted_ms[classes.CLASSES.index(classes.COMMUNICATION)]),
        notes=notes,
    )


def _class_times(
    names: list[str], counted_ms: Floats, total_ms: Floats, count: Floats, step_ms: float
) -> tuple[ClassTime, ...]:
    """Return the classes that ran, from their times and those of their kernels (a row a class, a column a name)."""
    times = []
    for number, name in enumerate(classes.CLASSES):
        if not total_ms[number].any() and not count[number].any():
            continue
        top = tuple(
            KernelTime(classes.short_name(names[at]), float(total_ms[number, at]), float(count[number, at]))
            for at in (-total_ms[number]).argsort(kind="stable")[:TOP_KERNELS]
            if total_ms[number, at] > 0
        )
        ms, total, kernels = float(counted_ms[number]), float(total_ms[number].sum()), float(count[number].sum())
        times.append(ClassTime(name, ms, ms / step_ms, total, kernels, top))
    return tuple(times)


def _within(moments: Floats, spans: Sequence[tuple[float, float]]) -> NDArray[np.bool_]:
    """Return which moments lie in one of the spans."""
    import numpy as np

    within = np.zeros(len(moments), dtype=bool)
    for first, last in spans:
        within |= (moments >= first) & (moments <= last)
    return within


def _union(begins: Floats, ends: Floats) -> tuple[Floats, Floats]:
    """Return the same instants as ascending intervals that do not touch."""
    import numpy as np

    if not len(begins):
        return begins, ends
    order = begins.argsort(kind="stable")
    begins, ends = begins[order], np.maximum.accumulate(ends[order])
    apart = begins[1:] > ends[:-1]
    return begins[np.append(True, apart)], ends[np.append(apart, True)]


def _length(intervals: tuple[Floats, Floats]) -> float:
    return float((intervals[1] - intervals[0]).sum())


# --- showing ------------------------------------------------------------------------------------------------


def title(profile: StepProfile) -> str:
    """Return what was profiled, in a line."""
    first, last = profile.steps[0], profile.steps[-1]
    parts = (
        "unknown rank" if profile.rank is None else f"rank {profile.rank}",
        profile.device,
        f"step {first}" if first == last else f"{len(profile.steps)} steps, {first} to {last}",
    )
    return ", ".join(part for part in parts if part)


def communication(profile: StepProfile) -> str | None:
    """Return how much of the communication is hidden by computation, in words; None if there is none."""
    if not profile.communication_ms:
        return None
    hidden = profile.communication_ms - profile.exposed_communication_ms
    share = profile.exposed_communication_ms / profile.step_ms
    return (
        f"communication: {profile.communication_ms:,.2f} ms a step, {hidden:,.2f} ms of it hidden by computation; "
        f"exposed {profile.exposed_communication_ms:,.2f} ms, {share:.1%} of the step"
    )


def text(profile: StepProfile) -> str:
    """Return the profile as a table for a terminal."""
    lines = [title(profile), "", f"{'class':<24}{'ms a step':>12}{'of step':>10}{'sum, ms':>12}{'kernels':>12}"]
    for item in profile.classes:
        lines.append(f"{item.name:<24}{item.ms:>12,.3f}{item.share:>10.1%}{item.total_ms:>12,.3f}{item.count:>12,.1f}")
    lines.append(f"{'idle':<24}{profile.idle_ms:>12,.3f}{profile.idle_ms / profile.step_ms:>10.1%}")
    lines.append(f"{'step':<24}{profile.step_ms:>12,.3f}{1:>10.1%}")
    lines += ["", *(line for line in (communication(profile), *profile.notes) if line)]
    lines += ["", f"{'most time (sum, ms a step)':<36}kernels"]
    for item in profile.classes:
        lines.append(item.name)
        lines += [f"  {kernel.total_ms:>12,.3f}{kernel.count:>12,.1f}  {kernel.name}" for kernel in item.top]
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    """Print the profiles of the traces; return the exit status."""
    if not arguments or arguments[0].startswith("-"):
        print("python -m nemo_bench.report.profile TRACE.json[.gz] ...: traces of PyTorch's profiler", file=sys.stderr)
        return 2
    try:
        print("\n".join(text(measure(Path(argument))) for argument in arguments), end="")
    except BenchError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
