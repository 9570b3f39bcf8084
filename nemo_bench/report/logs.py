"""Training steps out of anybody's training log (log_formats.py), line by line.

This module needs the standard library only: it runs inside nemo:24.09, with Python 3.10.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import math
import re
import statistics
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_bench.report import log_formats as formats
from nemo_bench.report.log_formats import MEGATRON, NEMO, Format
from nemo_bench.report.statistics import CHECKPOINT, OTHER_BATCH, PROFILE, VALIDATION, Steps, is_time

BLOCK_BYTES = 1 << 18  # stays in a core's cache
_TAIL_BYTES = 1 << 20
# A "line" longer than this is no text: only its end is looked at.
_MAX_LINE_BYTES = 1 << 16
MAX_STEP_NUMBER = 10**9
_COMPRESSED: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}


@dataclass
class Log:
    """What a log says of a run."""

    steps: Steps = field(default_factory=Steps)
    repeated: int = 0  # steps that were done again after a restart; the later ones count
    several: int = 0  # values of a step beside another, in a log of several ranks without labels; the largest counts
    unreadable: int = 0  # lines of steps that were cut off, garbled, or name no step
    unreadable_end: bool = False  # the last of them follow the last step
    done: int | None = None  # steps finished, as far as the progress tells
    total: int | None = None  # steps meant, as far as the progress tells
    reached: bool = False  # the trainer said that it had come to the end
    max_steps: int | None = None  # of how many steps, if it said so
    global_batch_size: int | None = None  # printed, or the samples consumed in one step
    peak_memory_gib: float | None = None  # largest allocation printed
    rates: dict[str, float] = field(default_factory=dict)  # tokens_per_s_per_gpu, tflops_per_gpu: median as printed
    rank_times_s: dict[int, float] = field(default_factory=dict)  # median of each labelled rank, of several
    stragglers: list[int] = field(default_factory=list)  # ranks that NVIDIA's straggler detection warned of
    sockets: bool = False  # NCCL takes TCP sockets between nodes
    last_error: str | None = None  # the last line near the end that tells of an error or a cancelled job
    ends_in_error: bool = False  # that line follows the last step
    framework: str | None = None  # of a log without steps, where another program's is recognised
    program: str | None = None  # that wrote the steps, where their form tells it
    printed: dict[str, str] = field(default_factory=dict)  # what it prints of the run: "gpus", "num_layers", "gpu", ...
    samples_a_step: int | None = None  # by which consumed_samples grow, where that is not the printed batch
    highest_rank: int | None = None  # by the labels


def read_log(path: Path) -> Log:
    """Return everything that `path` says of a run; a log without steps gives empty columns.

    Raises:
        OSError: the file cannot be read.
    """
    reader, rest, head, tail, cut_off = _Reader(), b"", b"", b"", False
    with open(path, "rb") as file:
        start = file.read(5)
    openers = [opener for magic, opener in _COMPRESSED.items() if start.startswith(magic)]
    with (openers or [open])[0](path, "rb") as file:
        try:
            while block := file.read1(BLOCK_BYTES):  # what is there of compressed data that ends early
                head = head if len(head) > _TAIL_BYTES else head + block
                tail = (tail + block)[-_TAIL_BYTES:]
                block = (rest + block).replace(b"\r", b"\n")
                end = block.rfind(b"\n") + 1
                for line in _marked(block[:end], reader.marks):
                    reader.line(line)
                rest = block[end:][-_MAX_LINE_BYTES:]
        except (EOFError, zlib.error, lzma.LZMAError):  # compressed data that ends early, or is damaged
            cut_off = True
    # A number at the very end may lack its last digits.
    reader.line(rest, cut_off=True)
    log = reader.finish(*(text.decode("utf-8", errors="replace") for text in (head, tail)))
    log.unreadable_end |= cut_off
    return log


class _Rank:
    """The steps of one rank, each once: a restart does some again, a bar draws some twice, ranks may share a log."""

    def __init__(self) -> None:
        self.steps = Steps()
        self.repeated = self.several = 0
        self.disturbance: str | None = None  # since the last step
        self.profiling = False
        self.samples: tuple[int, int] | None = None  # the last step, and the samples consumed with it
        self.batches: dict[int, int] = {}  # step -> its global batch size
        self.rates: dict[str, list[float]] = {}
        self.growth: list[int] = []  # of the samples consumed, a step, where a batch is printed too

    def add(self, step: int, time_s: float, fields: dict[str, str], *, redrawn: bool = False) -> None:
        """Take in one step; `redrawn` by a bar, which may have shown the values of the step before."""
        self._note(step, fields)
        steps = self.steps
        loss, norm = (float(fields[name]) if name in fields else None for name in ("loss", "grad_norm"))
        if redrawn and step == steps.last:
            steps.time_s[-1], steps.loss[-1], steps.grad_norm[-1] = time_s, loss, norm
            return
        index = len(steps) - 1 - (steps.last - step)
        if (step == steps.last or (self.several and step == steps.last - 1)) and steps.step[index] == step:
            # Another rank's: the slowest rank ends the step.
            self.several += steps.time_s[index] != time_s
            steps.time_s[index] = max(steps.time_s[index], time_s)
            return
        if step <= steps.last:
            self.repeated += steps.restart(step)
            self.disturbance, self.profiling = None, False
        why = PROFILE if self.profiling else self.disturbance if steps.step else None
        self.disturbance = None
        steps.append(step, time_s, loss, norm, why)

    def _note(self, step: int, fields: dict[str, str]) -> None:
        batch, samples = _whole(fields.get("batch")), _whole(fields.get("samples"))
        if samples is not None:
            before, consumed = self.samples or (-1, 0)
            # Of a log that begins later, or counts from 1, the first step does not tell.
            if before < step and (self.samples or not step):
                size, rest = divmod(samples - consumed, step - before)
                if size > 0 and not rest:
                    self.growth += [size] if batch else []
                    batch = batch or size
            self.samples = step, samples
        if batch:
            self.batches[step] = batch
        for name in ("tokens_per_s_per_gpu", "tflops_per_gpu"):
            if name in fields:
                self.rates.setdefault(name, []).append(float(fields[name]))

    def mark_other_batches(self) -> int | None:
        """Return the batch size of the run's later half, and leave out the steps of another (a batch ramp-up)."""
        sizes = [self.batches[step] for step in self.steps.step if step in self.batches]
        if not sizes:
            step, samples = self.samples or (0, 0)
            return samples // (step + 1) if samples and samples % (step + 1) == 0 else None
        usual = statistics.mode(reversed(sizes[len(sizes) // 2 :]))
        for i, step in enumerate(self.steps.step):
            if self.batches.get(step, usual) != usual:
                self.steps.excluded[i] = OTHER_BATCH
        return usual

    def wait_for(self, others: Iterable[_Rank]) -> None:
        """Take the longest time of each step: the slowest rank ends it."""
        for other in others:
            times = dict(zip(other.steps.step, other.steps.time_s))
            self.steps.time_s = [
                max(time, times.get(step, time)) for step, time in zip(self.steps.step, self.steps.time_s)
            ]

    def median_s(self) -> float:
        return statistics.median([time for time in self.steps.time_s if is_time(time)] or [math.nan])


class _Reader:
    def __init__(self) -> None:
        self.ranks = defaultdict[tuple[int, int] | None, _Rank](_Rank)  # by (node, rank); None: lines without a label
        self.log = Log()
        self.listed: list[float] = []  # as NeMo 1 lists them at the end
        self.bridge: list[tuple[float, float]] = []  # step time, TFLOP/s: Bridge's second line of a step
        self.progress: tuple[int, int | None] | None = None
        self.counts_done = False  # the progress counts finished steps; NeMo 2 counts from 0, to one less
        self.bar_offset: int | None = None  # 1: a bar counts finished steps, and shows step 99 at 100/100
        self.memory_bytes = 0
        self.kind: Format | None = None  # a log is of one program
        self.marks = [*(kind.mark for kind in formats.FORMATS), formats.BRIDGE, *formats.SIGNS]

    def line(self, data: bytes, *, cut_off: bool = False) -> None:
        """Take in a line that has a mark."""
        line = data.decode("latin-1")  # every byte a character: nothing that is looked for lies beyond ASCII
        if "\x1b" in line:
            line = formats.ESCAPE.sub("", line)
        for kind in formats.FORMATS:
            if kind.mark in data:
                self._steps(kind, line, cut_off)
                return
        if match := formats.BRIDGE_STEP.search(line):
            self.bridge.append((float(match[1]), float(match[2])))
        elif "STRAGGLER DETECTION" in line:
            self.log.stragglers += [int(rank) for rank in formats.STRAGGLER.findall(line)]
        elif "Using network Socket" in line:
            self.log.sockets = True
        else:
            profile = "nsys profiling" in line
            validation = "Validation" in line or "validation loss at" in line
            reason = VALIDATION if validation else CHECKPOINT if formats.CHECKPOINT_SAVED.search(line) else None
            for rank in self.ranks.values():
                if profile:
                    rank.profiling = "Start" in line
                    rank.disturbance = PROFILE if "End" in line else rank.disturbance
                elif reason:
                    rank.disturbance = reason

    def _steps(self, kind: Format, line: str, cut_off: bool) -> None:
        """Read a line with at least one step; ranks that share a file may put several into it."""
        if "timing in s: [" in line:
            match = formats.ALL_TIMES.search(line)
            self.listed = [float(text) for text in match[1].split(",")] if match else []
            return
        starts = list(kind.start.finditer(line))
        edges = [start.start() for start in starts] or [0]
        match = formats.LABEL.match(line[: edges[0]]) if edges[0] else None
        label = (int(match["node"] or 0), int(match[2] or match[3] or match[4])) if match else None
        mark = kind.mark.decode()
        for i, (begin, end) in enumerate(zip(edges, [*edges[1:], len(line)])):
            part = line[begin:end]
            marks = part.count(mark)
            if marks:
                last = cut_off and i == len(edges) - 1
                read = self._step(kind, part, starts[i] if starts else None, None if i else label, last)
                self.log.unreadable += marks - read
                if read or starts:  # else it is a word about step times, such as a summary's
                    self.log.unreadable_end = not read

    def _step(
        self, kind: Format, part: str, start: re.Match[str] | None, label: tuple[int, int] | None, cut_off: bool
    ) -> bool:
        """Take in the step of this part of a line; return False where it is cut off or garbled."""
        matches = kind.field.findall(part)
        if cut_off and matches and part.endswith(matches[-1][1]):
            del matches[-1]
        # What follows the first value of a name may be another line's rest.
        fields = {kind.names[name]: value for name, value in reversed(matches)}
        bar = formats.BAR.search(part) if kind is NEMO and not (start and start[1]) else None
        step = self._number(kind, start, bar, fields.get("step")) if "time" in fields else None
        if step is None:
            return False
        if any(_whole(fields.get(name)) for name in ("skipped", "nan_steps")):
            fields["grad_norm"] = "nan"  # which is why Megatron-LM skips a step
        rank = self.ranks[label]
        rank.add(step, float(fields["time"]) / kind.times_in_a_second, fields, redrawn=bar is not None)
        self.memory_bytes = max(self.memory_bytes, _whole(fields.get("memory_bytes")) or 0)
        if self.kind is None:
            self.kind = kind
            self.log.program = "Megatron-LM" if kind is MEGATRON else "NeMo 2" if start and start[1] else None
            self.marks = [kind.mark, *formats.SIGNS, *([formats.BRIDGE] if kind is MEGATRON else [])]
        return True

    def _number(
        self, kind: Format, start: re.Match[str] | None, bar: re.Match[str] | None, logged: str | None
    ) -> int | None:
        """Return the step's number, and keep the progress; None where the line tells no number that could be one."""
        progress: tuple[int, int | None] | None = None
        if bar:
            progress = int(bar[1] or bar[3]), int(bar[2]) if bar[2] and bar[2] != "?" else None
        elif start is not None and start[1]:
            progress = int(start[1]), int(start[2])
        if logged is not None and "e" not in logged.lower():
            number = float(logged)
        elif progress is not None:
            # A bar prints large numbers with three digits (2e+3), and its own count in full.
            number = progress[0] - ((1 if self.bar_offset is None else self.bar_offset) if bar else 0)
        else:
            return None
        if not (0 <= number <= MAX_STEP_NUMBER) or number != int(number):
            return None
        if bar and progress:
            # The smaller one: it is drawn ahead, too, with the values of the step before.
            offset = progress[0] - int(number)
            self.bar_offset = offset if self.bar_offset is None else min(self.bar_offset, offset)
        self.counts_done = bool(bar) or kind.counts_done
        self.progress = progress
        return int(number)

    def finish(self, head: str, tail: str) -> Log:
        """Return what was read, with what the beginning and the end of the log say."""
        log = self.log
        labels = sorted(label for label in self.ranks if label is not None)
        # The lowest rank's, or those without a label; not the odd line that lost its label.
        order = [None, *labels] if None in self.ranks else labels
        rank = max((self.ranks[label] for label in order), key=lambda rank: len(rank.steps), default=_Rank())
        if not rank.steps:
            for i, time_s in enumerate(self.listed or [time for time, _ in self.bridge]):
                rank.add(i, time_s, {})
            log.reached = bool(self.listed)
        elif len(labels) > 1:
            ranks_a_node = 1 + max(number for _, number in labels)
            log.rank_times_s = {
                node * ranks_a_node + number: self.ranks[node, number].median_s() for node, number in labels
            }
            log.highest_rank = max(log.rank_times_s)
            rank.wait_for(self.ranks[label] for label in labels)
        log.steps, log.repeated, log.several = rank.steps, rank.repeated, rank.several
        log.global_batch_size = rank.mark_other_batches()
        if rank.growth:
            usual = statistics.mode(reversed(rank.growth[len(rank.growth) // 2 :]))
            log.samples_a_step = usual if usual != log.global_batch_size else None
        log.rates = {name: statistics.median(values) for name, values in rank.rates.items()}
        if self.bridge and any(tflops for _, tflops in self.bridge):
            log.rates.setdefault("tflops_per_gpu", statistics.median(tflops for _, tflops in self.bridge))
        log.peak_memory_gib = self.memory_bytes / 2**30 if self.memory_bytes else None
        log.stragglers = sorted({*log.stragglers})
        self._read_progress(rank)
        self._read_head(head)
        # NeMo 1's list of all steps is none of them.
        self._read_end(formats.ALL_TIMES.sub("", tail))
        return log

    def _read_head(self, head: str) -> None:
        """Note what the program says of the run."""
        if self.bridge:
            self.log.program = "Megatron-Bridge"
        self.log.printed = dict(formats.ARGUMENT.findall(head))
        if processes := formats.PROCESSES.search(head):
            self.log.printed["world_size"] = processes[1]
        if gpus := formats.GPU.findall(head):
            self.log.printed["gpu"] = ", ".join(dict.fromkeys(gpus))

    def _read_progress(self, rank: _Rank) -> None:
        """Note how far the run came."""
        log = self.log
        if not self.progress or not rank.steps:
            return
        log.done, log.total = self.progress
        if not self.counts_done:
            samples, batch = rank.samples, log.global_batch_size
            from_zero = samples is None or not batch or samples[1] != samples[0] * batch
            log.done, log.total = rank.steps.last + from_zero, (log.total or 0) + from_zero
        if log.total is not None and rank.steps.last > log.total:  # a second epoch, which counts from 0 again
            log.done, log.total = rank.steps.last + 1, None

    def _read_end(self, tail: str) -> None:
        """Note how the log ends."""
        log = self.log
        last_step = max(tail.rfind(mark.decode()) for mark in (NEMO.mark, MEGATRON.mark, formats.BRIDGE))
        for match in formats.REACHED.finditer(
            tail, max(last_step, 0)
        ):  # an earlier run in the same file may have ended
            log.reached = True
            log.max_steps = int(match[2]) if match[1] == "steps" else log.max_steps
        errors = list(formats.ERROR.finditer(tail))
        if errors:
            log.last_error = formats.ESCAPE.sub("", errors[-1][0]).strip()[:300]
            log.ends_in_error = errors[-1].start() > last_step
        if not log.steps:
            log.framework = next((name for name, form in formats.OTHER_FRAMEWORKS.items() if form.search(tail)), None)


def _marked(block: bytes, marks: Sequence[bytes]) -> Iterator[bytes]:
    """Yield the lines that have a mark of a step or a sign of something beside the steps."""
    ends = set()
    for mark in marks:
        at = block.find(mark)
        while at >= 0:
            end = block.find(b"\n", at)
            ends.add(end)
            at = block.find(mark, end)
    for end in sorted(ends):
        yield block[block.rfind(b"\n", 0, end) + 1 : end][-_MAX_LINE_BYTES:]


def _whole(text: str | None) -> int | None:
    """Return a whole number that was printed in full; None for another, or a rounded one (1.28e+6)."""
    if text is None or "e" in text.lower() or len(text) > 18:
        return None
    value = float(text)
    return int(value) if math.isfinite(value) and value >= 0 and value == int(value) else None
