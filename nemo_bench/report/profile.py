"""Where a training step's time goes: time by kernel class, from a trace of PyTorch's profiler.

    python -m nemo_bench.report.profile TRACE.json.gz ...

prints the table of any such trace, whether `profile=torch` wrote it or somebody else's program.

Each instant of a step counts once, over all streams of the GPU: for the first class (kernel_classes.CLASSES) that is
running at that instant. Communication and copies come last, so they hold only the time that no computation hides; the
sum of their kernels' times stands next to it. An instant in which nothing runs is idle.
"""

from __future__ import annotations

import gzip
import re
import sys
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from nemo_bench.errors import BenchError
from nemo_bench.files import write_json, write_text
from nemo_bench.report.kernel_classes import (
    CLASSES,
    COMMUNICATION,
    MEMORY,
    OPTIMIZER,
    kernel_class,
    short_name,
    term_of,
)

# The names that training/profiling.py gives to a profiled step (its number follows) and to the optimizer's part of it.
STEP_MARK = "nemo_bench step "
OPTIMIZER_MARK = "nemo_bench optimizer"

TOP_KERNELS = 5

_OUR_STEP, _PROFILER_STEP = re.compile(rf"{STEP_MARK}(\d+)$"), re.compile(r"ProfilerStep#(\d+)$")
_OPTIMIZER = re.compile(f"{OPTIMIZER_MARK}$|Optimizer.step#")
# Operations of the model's ends, by their names in Megatron, Transformer Engine and PyTorch.
_HEAD = re.compile(r"LinearWithGradAccumulation|\w*CrossEntropy|aten::embedding|(Embedding|Index)Backward")
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

    rank: int | None  # None if the trace does not name it
    device: str | None  # the GPU's name; None if the trace does not name it
    steps: tuple[int, ...]  # numbers of the profiled steps
    step_ms: float
    classes: tuple[ClassTime, ...]  # those that ran, in the order of kernel_classes.CLASSES
    idle_ms: float  # nothing was running
    communication_ms: float  # some communication was running
    exposed_communication_ms: float  # communication was running, and no computation
    notes: tuple[str, ...]
    # The same instants by the terms of an estimate (kernel_classes.term_of), ms; empty in profiles of earlier versions.
    terms: dict[str, float] = field(default_factory=dict)


def from_dict(content: dict[str, Any]) -> StepProfile:
    """Return the profile that `write` put into a `rank<N>.json`; raise KeyError or TypeError if it is damaged."""
    times = [{**item, "top": tuple(KernelTime(**kernel) for kernel in item["top"])} for item in content["classes"]]
    sequences = {"steps": tuple(content["steps"]), "notes": tuple(content["notes"])}
    return StepProfile(**{**content, **sequences, "classes": tuple(ClassTime(**item) for item in times)})


def write(profile: StepProfile, stem: Path) -> None:
    """Write `<stem>.json` and, for people, `<stem>.txt`."""
    write_json(stem.with_name(stem.name + ".json"), asdict(profile))
    write_text(stem.with_name(stem.name + ".txt"), text(profile))


Event = dict[str, Any]


class _Kernel(NamedTuple):
    name: str
    kind: str  # one of CLASSES
    term: str
    start_us: float
    end_us: float


def measure(path: Path, rank: int | None = None) -> StepProfile:
    """Return the profile of a trace file, plain or gzipped; `rank` None: the one that the trace names.

    Raises:
        BenchError: the file cannot be read, is not a trace, or holds no GPU kernels.
    """
    trace = _read_trace(path)
    events, notes = trace["traceEvents"], []
    busy_us: Counter[int] = Counter()
    for event in events:
        if event.get("cat") in _GPU_WORK:
            busy_us[event["args"].get("device", 0)] += event.get("dur", 0)
    if not busy_us:
        raise BenchError(f"{path}: holds no GPU kernels")
    gpu = busy_us.most_common(1)[0][0]
    if len(busy_us) > 1:
        notes.append(f"the trace holds several GPUs: this is GPU {gpu}, the busiest")
    kernels = _kernels(events, gpu)
    steps: dict[int, tuple[float, float]] = {}
    for mark in (_OUR_STEP, _PROFILER_STEP):
        steps = steps or {int(match[1]): (first, last) for match, first, last in _spans(events, mark)}
    if not steps:
        steps = {0: (min(kernel.start_us for kernel in kernels), max(kernel.end_us for kernel in kernels))}
        notes.append("no steps are marked in the trace: all of it counts as one")
    devices = trace.get("deviceProperties") or []
    return _profile(
        kernels,
        steps,
        rank=(trace.get("distributedInfo") or {}).get("rank") if rank is None else rank,
        device=next((device.get("name") for device in devices if device.get("id") == gpu), None),
        notes=tuple(notes),
    )


def _read_trace(path: Path) -> dict[str, Any]:
    """Return a trace in Chrome's format; of its events those that last, with `name`, `ts` and `args`."""
    import orjson  # not needed where no profile is read

    try:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        # The profiler writes empty, infinite and NaN values, and names of kernels in any encoding.
        trace = orjson.loads(_NO_VALUE.sub(r"\1null", content.decode("utf-8", "replace")))
    except (OSError, EOFError, zlib.error) as error:
        raise BenchError(f"{path}: cannot be read ({error})") from None
    except orjson.JSONDecodeError as error:
        raise BenchError(f"{path}: not a trace of PyTorch's profiler, or cut off ({error})") from None
    if isinstance(trace, list):  # Chrome accepts the list of events alone
        trace = {"traceEvents": trace}
    if not isinstance(trace, dict) or not isinstance(trace.get("traceEvents"), list):
        raise BenchError(f"{path}: not a trace of PyTorch's profiler (it has no list traceEvents)")
    return {**trace, "traceEvents": [{"args": {}, **event} for event in trace["traceEvents"] if _lasts(event)]}


def _lasts(event: Any) -> bool:
    is_span = isinstance(event, dict) and event.get("ph") == "X" and isinstance(event.get("name"), str)
    return is_span and all(isinstance(value, (int, float)) for value in (event.get("ts"), event.get("dur", 0)))


def _kernels(events: Sequence[Event], gpu: int) -> list[_Kernel]:
    """Return the GPU's kernels and copies; what the optimizer launches belongs to it, but for transfers."""
    launched_us: dict[Any, float] = {
        event["args"].get("correlation"): event["ts"] for event in events if event.get("cat") in _LAUNCHES
    }
    optimizer_spans = [(first, last) for _, first, last in _spans(events, _OPTIMIZER)]
    head_spans = [(first, last) for _, first, last in _spans(events, _HEAD, "cpu_op")]
    kernels = []
    for event in events:
        if event.get("cat") in _GPU_WORK and event["args"].get("device", 0) == gpu:
            kind = kernel_class(event["name"])
            start: float = event["ts"]
            launched = launched_us.get(event["args"].get("correlation"), start)
            by_optimizer = any(first <= launched <= last for first, last in optimizer_spans)
            if by_optimizer and kind not in (COMMUNICATION, MEMORY):
                kind = OPTIMIZER
            in_head = any(first <= launched <= last for first, last in head_spans)
            term = term_of(kind, event["name"], event["args"], in_head)
            kernels.append(_Kernel(event["name"], kind, term, start, start + event.get("dur", 0)))
    return kernels


def _spans(
    events: Sequence[Event], names: re.Pattern[str], category: str = "user_annotation"
) -> Iterator[tuple[re.Match[str], float, float]]:
    """Yield where each range that the program, or else PyTorch, named so begins and ends."""
    for event in events:
        if event.get("cat") == category and (match := names.match(event["name"])):
            yield match, event["ts"], event["ts"] + event.get("dur", 0)


def _profile(kernels: Sequence[_Kernel], steps: dict[int, tuple[float, float]], **identity: Any) -> StepProfile:
    total_us: defaultdict[tuple[str, str], float] = defaultdict(float)  # (class, name) -> sum of the kernels' times
    count: Counter[tuple[str, str]] = Counter()
    counted_us, terms_us = dict.fromkeys(CLASSES, 0.0), defaultdict[str, float](float)
    communication_us = 0.0
    for first, last in steps.values():
        edges = []  # where a kernel of a class begins (+1) or ends (-1)
        for name, kind, term, start_us, end_us in kernels:
            if start_us < last and end_us > first:
                begin, end = max(start_us, first), min(end_us, last)
                running_as = CLASSES.index(kind), term
                edges += [(begin, 1, running_as), (end, -1, running_as)]
                total_us[kind, name] += end - begin
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
            KernelTime(short_name(name), kernel_us / us_per_ms, count[kind, name] / len(steps))
            for (name_kind, name), kernel_us in total_us.items()
            if name_kind == kind
        ]
        if kernel_times:
            total_ms = sum(kernel.total_ms for kernel in kernel_times)
            number = sum(kernel.count for kernel in kernel_times)
            top = sorted(kernel_times, key=lambda kernel: -kernel.total_ms)[:TOP_KERNELS]
            ms = time_us / us_per_ms
            class_times.append(ClassTime(kind, ms, ms / step_ms, total_ms, number, tuple(top)))
    return StepProfile(
        **identity,
        steps=tuple(sorted(steps)),
        step_ms=step_ms,
        classes=tuple(class_times),
        idle_ms=step_ms - sum(counted_us.values()) / us_per_ms,
        communication_ms=communication_us / us_per_ms,
        exposed_communication_ms=counted_us[COMMUNICATION] / us_per_ms,
        terms={term: time_us / us_per_ms for term, time_us in terms_us.items()},
    )


def title(profile: StepProfile) -> str:
    """Return what was profiled, in a line."""
    first, last = profile.steps[0], profile.steps[-1]
    rank = "unknown rank" if profile.rank is None else f"rank {profile.rank}"
    steps = f"step {first}" if first == last else f"{len(profile.steps)} steps, {first} to {last}"
    return ", ".join(filter(None, (rank, profile.device, steps)))


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
