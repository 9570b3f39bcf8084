"""Where a training step's time goes: the table of time by kernel class of a profiler's trace.

    python -m nemo_bench.report.profile TRACE.json.gz ...

prints it, of traces that this program wrote (`profile=torch`) or of anybody's PyTorch profiler.

Each instant of a step is counted once, on one GPU over all its streams: it belongs to the first of the classes
(kernel_classes.CLASSES) that runs at that instant, communication and copies being the last, and it is idle where none
does. So communication has in this column only what no computation hides; the sum of its kernels' times stands beside.
A trace without GPU kernels is counted by its CPU operations, by the time that each spends itself.
"""

from __future__ import annotations

import re
import sys
from array import array
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_bench.errors import BenchError
from nemo_bench.files import write_json, write_text
from nemo_bench.report import kernel_classes as classes
from nemo_bench.report.trace import Trace

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Integers = NDArray[np.int64]

# What training/profiling.py calls a profiled step (its number follows), and the optimizer's part of it.
STEP_MARK = "nemo_bench step "
OPTIMIZER_MARK = "nemo_bench optimizer"

GPU, CPU = "GPU kernels", "CPU operations, own time"
TOP = 5

_PROFILER_STEP = re.compile(r"ProfilerStep#(\d+)$")
_TORCHS_OPTIMIZER = "Optimizer.step#"
_DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")


@dataclass(frozen=True)
class KernelTime:
    """One kernel: its shortened `name`, its time a step (`total_ms`), and how often a step it ran (`count`)."""

    name: str
    total_ms: float
    count: float


@dataclass(frozen=True)
class ClassTime:
    """One class of kernels, a step.

    Attributes:
        name: one of kernel_classes.CLASSES.
        ms: of the step's time, each instant counted once; the classes' and the idle time add up to the step.
        share: `ms` of the step, 0 to 1.
        total_ms: sum of its kernels' times, which may run side by side.
        count: how many kernels ran.
        top: those that took the most time, `TOP` at most.
    """

    name: str
    ms: float
    share: float
    total_ms: float
    count: float
    top: tuple[KernelTime, ...]


@dataclass(frozen=True)
class StepProfile:
    """Where the time of the profiled steps of one rank went, as means over these steps.

    Attributes:
        kind: what is counted: "GPU kernels" or "CPU operations, own time".
        rank: its global rank; None where the trace does not tell.
        device: the GPU's name; None where the trace does not tell, and on a CPU.
        steps: numbers of the profiled steps.
        step_ms: length of a step.
        classes: all of kernel_classes.CLASSES that ran, in that order.
        idle_ms: no kernel at all was running.
        communication_ms: some communication was running.
        exposed_communication_ms: communication was running, and no computation.
        notes: what a reader should know.
    """

    kind: str
    rank: int | None
    device: str | None
    steps: tuple[int, ...]
    step_ms: float
    classes: tuple[ClassTime, ...]
    idle_ms: float
    communication_ms: float
    exposed_communication_ms: float
    notes: tuple[str, ...]


def from_dict(content: dict[str, Any]) -> StepProfile:
    """The profile of a `rank<N>.json`.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: it is none.
    """
    times = tuple(
        ClassTime(**{**each, "top": tuple(KernelTime(**kernel) for kernel in each["top"])})
        for each in content["classes"]
    )
    steps, notes = (tuple(content[key]) for key in ("steps", "notes"))
    return StepProfile(**{**content, "classes": times, "steps": steps, "notes": notes})


def write(profile: StepProfile, stem: Path) -> None:
    """Writes `<stem>.json` and, for people, `<stem>.txt`."""
    write_json(stem.with_name(stem.name + ".json"), asdict(profile))
    write_text(stem.with_name(stem.name + ".txt"), text(profile))


# --- reading ------------------------------------------------------------------------------------------------


class _Events:
    """The events of a trace that count, in columns; times in microseconds."""

    def __init__(self, trace: Trace) -> None:
        self.names: dict[str, int] = {}
        self.work = _Rows()  # on GPUs: place is the device, link the launch
        self.operations = _Rows()  # on CPUs: place is the thread
        self.launch_links, self.launch_starts = array("q"), array("d")
        self.steps: dict[int, tuple[float, float]] = {}
        self.profiler_steps: dict[int, tuple[float, float]] = {}
        self.optimizer: list[tuple[float, float]] = []
        threads: dict[tuple[Any, Any], int] = {}
        for event in trace:
            if event.get("ph") != "X":
                continue
            category, name = event.get("cat"), event["name"]
            start = float(event["ts"])
            end = start + float(event.get("dur", 0))
            if category in _DEVICE_WORK:
                about = event["args"]
                self.work.add(self._name(name), start, end, about["device"], about.get("correlation", -1))
            elif category in _LAUNCHES:
                self.launch_links.append(event["args"].get("correlation", -1))
                self.launch_starts.append(start)
            elif category == "user_annotation" and self._mark(name, start, end):
                continue
            elif category == "cpu_op" or (
                category == "user_annotation" and classes.operation_class(name) != classes.OTHER
            ):
                thread = threads.setdefault((event.get("pid"), event.get("tid")), len(threads))
                self.operations.add(self._name(name), start, end, thread, -1)

    def _name(self, name: str) -> int:
        return self.names.setdefault(name, len(self.names))

    def _mark(self, name: str, start: float, end: float) -> bool:
        if name.startswith(STEP_MARK):
            self.steps[int(name.removeprefix(STEP_MARK))] = (start, end)
        elif match := _PROFILER_STEP.match(name):
            self.profiler_steps[int(match[1])] = (start, end)
        elif name == OPTIMIZER_MARK or name.startswith(_TORCHS_OPTIMIZER):
            self.optimizer.append((start, end))
        else:
            return False
        return True


class _Rows:
    def __init__(self) -> None:
        self.name, self.place, self.link = array("q"), array("q"), array("q")
        self.start, self.end = array("d"), array("d")

    def __len__(self) -> int:
        return len(self.name)

    def add(self, name: int, start: float, end: float, place: int, link: int) -> None:
        self.name.append(name)
        self.start.append(start)
        self.end.append(end)
        self.place.append(place)
        self.link.append(link)


# --- counting -----------------------------------------------------------------------------------------------


def measure(path: Path, rank: int | None = None) -> StepProfile:
    """The profile of a trace file, plain or gzipped.

    Args:
        path: the trace.
        rank: whose it is; None: what the trace says.

    Raises:
        BenchError: it cannot be read, is no trace, or holds nothing to count.
    """
    import numpy as np

    trace = Trace(path)
    try:
        events = _Events(trace)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BenchError(
            f"{path}: an event is not as PyTorch's profiler writes it ({type(error).__name__}: {error})"
        ) from None
    notes = [f"{trace.damaged:,} events are no JSON, and left out"] if trace.damaged else []
    if events.work:
        kind, rows, class_of = GPU, events.work, classes.kernel_class
    elif events.operations:
        kind, rows, class_of = CPU, events.operations, classes.operation_class
    else:
        raise BenchError(f"{path}: holds neither GPU kernels nor CPU operations")
    name, place, link = (np.array(column, dtype=np.int64) for column in (rows.name, rows.place, rows.link))
    start, end = np.array(rows.start), np.array(rows.end)
    device = None
    if kind == GPU:
        busy = np.bincount(place, weights=end - start)
        number = int(busy.argmax())
        if (busy > 0).sum() > 1:
            notes.append(f"the trace holds several GPUs: this is GPU {number}, the busiest")
        mine = place == number
        name, start, end, link = name[mine], start[mine], end[mine], link[mine]
        device = _device_name(trace.about, number)
        launched = _launch_times(events, link, start)
    else:
        launched = start
        notes.append("the trace holds no GPU kernels")
    steps = events.steps or events.profiler_steps
    if not steps:
        steps = {0: (float(start.min()), float(end.max()))}
        notes.append("no steps are marked in the trace: all of it counts as one")
    numbers = {each: index for index, each in enumerate(classes.CLASSES)}
    class_of_name = np.array([numbers[class_of(each)] for each in events.names])
    row_class = class_of_name[name]
    computes = ~np.isin(row_class, [numbers[classes.COMMUNICATION], numbers[classes.MEMORY]])
    row_class[computes & _within(launched, events.optimizer)] = numbers[classes.OPTIMIZER]
    spans = sorted(steps.values())
    if kind == GPU:
        part_row, part_start, part_end = np.arange(len(name)), start, end
    else:
        part_row, part_start, part_end = _own_times(place, start, end, spans)

    kernels = len(classes.CLASSES) * len(events.names)
    counted, total = np.zeros(len(classes.CLASSES)), np.zeros(kernels)
    count, busy_us, communication_us = np.zeros(kernels), 0.0, 0.0
    key = row_class * len(events.names) + name
    for first, last in spans:
        count += np.bincount(key[(start >= first) & (start < last)], minlength=kernels)
        inside = (part_start < last) & (part_end > first)
        row = part_row[inside]
        left, right = np.maximum(part_start[inside], first), np.minimum(part_end[inside], last)
        total += np.bincount(key[row], weights=right - left, minlength=kernels)
        covered: tuple[Floats, Floats] = (np.empty(0), np.empty(0))
        reached = 0.0
        for number in range(len(classes.CLASSES)):
            of_class = row_class[row] == number
            own = left[of_class], right[of_class]
            covered = _union(np.concatenate((covered[0], own[0])), np.concatenate((covered[1], own[1])))
            counted[number] += (length := _length(covered)) - reached
            reached = length
            if classes.CLASSES[number] == classes.COMMUNICATION:
                communication_us += _length(_union(*own))
        busy_us += reached
    ms = 1e3 * len(spans)  # microseconds of all steps to milliseconds of one
    span_us = sum(last - first for first, last in spans)
    exposed = counted[numbers[classes.COMMUNICATION]]
    about_rank = (trace.about.get("distributedInfo") or {}).get("rank")
    return StepProfile(
        kind=kind,
        rank=about_rank if rank is None else rank,
        device=device,
        steps=tuple(sorted(steps)),
        step_ms=span_us / ms,
        classes=_class_times(list(events.names), counted / ms, total / ms, count / len(spans), span_us / ms),
        idle_ms=(span_us - busy_us) / ms,
        communication_ms=communication_us / ms,
        exposed_communication_ms=float(exposed) / ms,
        notes=tuple(notes),
    )


def _class_times(names: list[str], ms: Floats, total: Floats, count: Floats, step_ms: float) -> tuple[ClassTime, ...]:
    found = []
    for number, name in enumerate(classes.CLASSES):
        own = slice(number * len(names), (number + 1) * len(names))
        totals, counts = total[own], count[own]
        if not totals.any() and not counts.any():
            continue
        order = (-totals).argsort(kind="stable")[:TOP]
        top = tuple(
            KernelTime(classes.short_name(names[at]), float(totals[at]), float(counts[at]))
            for at in order
            if totals[at] > 0
        )
        found.append(
            ClassTime(
                name=name,
                ms=float(ms[number]),
                share=float(ms[number]) / step_ms,
                total_ms=float(totals.sum()),
                count=float(counts.sum()),
                top=top,
            )
        )
    return tuple(found)


def _device_name(about: dict[str, Any], number: int) -> str | None:
    devices = about.get("deviceProperties") or []
    return next((device.get("name") for device in devices if device.get("id") == number), None)


def _launch_times(events: _Events, link: Integers, start: Floats) -> Floats:
    """When each kernel was launched; where the trace does not tell, when it began."""
    import numpy as np

    links, starts = np.array(events.launch_links, dtype=np.int64), np.array(events.launch_starts)
    if not len(links):
        return start
    order = links.argsort(kind="stable")
    at = np.minimum(np.searchsorted(links[order], link), len(links) - 1)
    known = links[order][at] == link
    return np.where(known, starts[order][at], start)


def _within(moments: Floats, ranges: list[tuple[float, float]]) -> NDArray[np.bool_]:
    import numpy as np

    if not ranges:
        return np.zeros(len(moments), dtype=bool)
    begins, ends = _union(np.array([first for first, _ in ranges]), np.array([last for _, last in ranges]))
    at = np.searchsorted(begins, moments, side="right") - 1
    within: NDArray[np.bool_] = (at >= 0) & (moments <= ends[at])
    return within


def _union(begins: Floats, ends: Floats) -> tuple[Floats, Floats]:
    """The same instants as intervals that ascend and do not touch."""
    import numpy as np

    if not len(begins):
        return begins, ends
    order = begins.argsort(kind="stable")
    begins, ends = begins[order], np.maximum.accumulate(ends[order])
    fresh = np.concatenate(([True], begins[1:] > ends[:-1]))
    return begins[fresh], ends[np.concatenate((fresh[1:], [True]))]


def _length(intervals: tuple[Floats, Floats]) -> float:
    return float((intervals[1] - intervals[0]).sum())


def _own_times(
    thread: Integers, start: Floats, end: Floats, spans: list[tuple[float, float]]
) -> tuple[Integers, Floats, Floats]:
    """The parts of operations in which none that they called was running: number of the operation, begin, end."""
    import numpy as np

    rows, begins, ends = array("q"), array("d"), array("d")
    inside = np.flatnonzero((start < spans[-1][1]) & (end > spans[0][0]))
    order = inside[np.lexsort((-end[inside], start[inside], thread[inside]))]
    running: list[tuple[float, int]] = []  # end and number of an operation, each called by the one before
    at, current = 0.0, None

    def spend(until: float, row: int) -> None:
        nonlocal at
        if until > at:
            rows.append(row)
            begins.append(at)
            ends.append(until)
            at = until

    def leave(moment: float) -> None:
        while running and running[-1][0] <= moment:
            spend(*running.pop())

    for row, begin, finish, own_thread in zip(
        order.tolist(), start[order].tolist(), end[order].tolist(), thread[order].tolist()
    ):
        if own_thread != current:
            leave(float("inf"))
            current, at = own_thread, begin
        leave(begin)
        if running:
            spend(begin, running[-1][1])
        at = max(at, begin)
        running.append((finish, row))
    leave(float("inf"))
    return np.array(rows, dtype=np.int64), np.array(begins), np.array(ends)


# --- showing ------------------------------------------------------------------------------------------------


def title(profile: StepProfile) -> str:
    """What was profiled, in a line."""
    parts = ["the trace" if profile.rank is None else f"rank {profile.rank}", profile.device]
    first, last = profile.steps[0], profile.steps[-1]
    parts.append(f"step {first}" if first == last else f"{len(profile.steps)} steps, {first} to {last}")
    return ", ".join(part for part in parts if part) + f": {profile.kind}"


def communication(profile: StepProfile) -> str | None:
    """How much of the communication computation hides, in words; None where there is none."""
    if not profile.communication_ms:
        return None
    hidden = profile.communication_ms - profile.exposed_communication_ms
    share = profile.exposed_communication_ms / profile.step_ms
    return (
        f"communication: {profile.communication_ms:,.2f} ms a step, {hidden:,.2f} ms of it beside computation; "
        f"exposed {profile.exposed_communication_ms:,.2f} ms, {share:.1%} of the step"
    )


def text(profile: StepProfile) -> str:
    """The table for a terminal."""
    what = "kernels" if profile.kind == GPU else "calls"
    lines = [title(profile), "", f"{'class':<24}{'ms a step':>12}{'of step':>10}{'sum, ms':>12}{what:>12}"]
    for each in profile.classes:
        lines.append(f"{each.name:<24}{each.ms:>12,.3f}{each.share:>10.1%}{each.total_ms:>12,.3f}{each.count:>12,.1f}")
    lines.append(f"{'idle':<24}{profile.idle_ms:>12,.3f}{profile.idle_ms / profile.step_ms:>10.1%}")
    lines.append(f"{'step':<24}{profile.step_ms:>12,.3f}{1:>10.1%}")
    lines += ["", *(line for line in (communication(profile), *profile.notes) if line)]
    lines += ["", f"{'most time (sum, ms a step)':<36}{what}"]
    for each in profile.classes:
        lines.append(each.name)
        lines += [f"  {kernel.total_ms:>12,.3f}{kernel.count:>12,.1f}  {kernel.name}" for kernel in each.top]
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    """Prints the profiles of the traces that are named; the exit status."""
    if not arguments or arguments[0].startswith("-"):
        print(
            "python -m nemo_bench.report.profile TRACE.json[.gz] ...: traces of PyTorch's profiler",
            file=sys.stderr,
        )
        return 2
    try:
        print("\n".join(text(measure(Path(argument))) for argument in arguments), end="")
    except BenchError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
