"""Training steps out of anybody's training log (log_formats.py), line by line."""

from __future__ import annotations

import gzip
import re
import statistics
import zlib
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from nemo_bench.report import log_formats as formats
from nemo_bench.report.log_formats import MEGATRON, NEMO, Format
from nemo_bench.report.statistics import OTHER_BATCH, PROFILE, Steps, is_time

# A line of more characters is no text, and is read in parts.
_LONGEST_LINE = 1 << 16
_HEAD_LINES, _TAIL_LINES = 20_000, 2_000
# Numbers that count only where they are printed in full: a bar rounds large ones (1.28e+6).
_WHOLE = {"batch", "samples", "memory_bytes"}
_is_whole = re.compile(r"\+?[0-9]{1,15}(\.0*)?").fullmatch


@dataclass
class Log:
    """What a log says of a run."""

    steps: Steps = field(default_factory=Steps)
    repeated: int = 0  # steps that were done again after a restart; the later ones count
    several: int = 0  # values of a step beside another, in a log of several ranks without labels; the largest counts
    unreadable: int = 0  # lines of steps that were cut off, garbled, or name no step
    unreadable_end: bool = False  # the last of them follow the last step
    done: int | None = None  # steps finished, counted from the first of the run
    total: int | None = None  # steps meant, as far as the progress tells
    reached: bool = False  # the trainer said that it had come to the end
    max_steps: int | None = None  # of how many steps, if it said so
    global_batch_size: int | None = None  # printed, or the samples consumed in one step
    samples_a_step: int | None = None  # by which consumed_samples grow, where that is not the printed batch
    peak_memory_gib: float | None = None  # largest allocation printed
    rates: dict[str, float] = field(default_factory=dict)  # tokens_per_s_per_gpu, tflops_per_gpu: median as printed
    rank_times_s: dict[int, float] = field(default_factory=dict)  # median of each labelled rank, of several
    sockets: bool = False  # NCCL takes TCP sockets between nodes
    last_error: str | None = None  # the last line after the steps that tells of an error or a cancelled job
    framework: str | None = None  # of a log without steps, where another program's is recognised
    program: str | None = None  # that wrote the steps, where their form tells it
    printed: dict[str, str] = field(default_factory=dict)  # what it prints of the run: "num_layers", "gpu", ...


def read_log(path: Path) -> Log:
    """Return everything that `path`, plain or gzipped, says of a run; raise OSError if it cannot be read."""
    reader = _Reader()
    with open(path, "rb") as file:
        opener = gzip.open if file.read(2) == b"\x1f\x8b" else open
    # Carriage returns end lines, too.
    with opener(path, "rt", encoding="utf-8", errors="replace") as text:
        try:
            for line in iter(partial(text.readline, _LONGEST_LINE), ""):
                reader.line(line)
        except (EOFError, zlib.error):  # compressed data that ends early, or is damaged
            reader.log.unreadable_end = True
    return reader.finish()


class _Rank:
    """The steps of one rank, each once: a restart does some again, a bar draws some twice, ranks may share a log."""

    def __init__(self) -> None:
        self.steps = Steps()
        self.texts: dict[int, dict[str, str]] = {}  # step -> all numbers of its line, as printed
        self.repeated = self.several = 0
        self.disturbance: str | None = None  # since the last step
        self.profiling = False

    def add(self, step: int, time_s: float, loss: float | None, norm: float | None, redrawn: bool = False) -> None:
        """Take in one step; `redrawn` by a bar, which may have shown the values of the step before."""
        steps = self.steps
        if step <= (last := steps.last):
            if redrawn and step == last:
                steps.time_s[-1], steps.loss[-1], steps.grad_norm[-1] = time_s, loss, norm
                return
            index = step - last - 1
            if (step == last or (self.several and step == last - 1)) and steps.step[index:][:1] == [step]:
                # Another rank's: the slowest rank ends the step.
                self.several += steps.time_s[index] != time_s
                steps.time_s[index] = max(steps.time_s[index], time_s)
                return
            self.repeated += steps.restart(step)
            self.disturbance, self.profiling = None, False
        why = PROFILE if self.profiling else self.disturbance if steps.step else None
        self.disturbance = None
        steps.append(step, time_s, loss, norm, why)

    def column(self, name: str) -> dict[int, float]:
        """Return the values of that name by their steps."""
        printed = {step: texts[name] for step, texts in self.texts.items() if name in texts}
        return {step: float(text) for step, text in printed.items() if name not in _WHOLE or _is_whole(text)}

    def growth(self) -> dict[int, int]:
        """Return by how many samples each step grew what was consumed."""
        consumed, sizes = self.column("samples"), {}
        if 0 in consumed or len(consumed) == 1:  # of a log that begins later, the first step does not tell
            consumed[-1] = 0
        for before, step in pairwise(sorted(consumed)):
            size, rest = divmod(consumed[step] - consumed[before], step - before)
            if size > 0 and not rest:
                sizes[step] = int(size)
        return sizes


class _Reader:
    def __init__(self) -> None:
        self.ranks = defaultdict[tuple[int, int] | None, _Rank](_Rank)  # by (node, rank); None: lines without a label
        self.log = Log()
        self.listed: list[float] = []  # step times as NeMo 1 lists them at the end
        self.bridge: list[tuple[float, float]] = []  # step time, TFLOP/s: Bridge's second line of a step
        self.bar_offset = 1  # a bar shows step 99 at 100/100, and in a second epoch begins anew
        self.head: list[str] = []  # lines about the run: of many ranks, late, and by a buffer even after a step
        self.tail = deque[str](maxlen=_TAIL_LINES)  # lines after the last step

    def line(self, line: str) -> None:
        """Take in a line; without its end, it is cut off, and a number there may lack its last digits."""
        if "\x1b" in line:
            line = formats.ESCAPE.sub("", line)
        if NEMO.mark in line:
            self._steps(NEMO, line)
        elif MEGATRON.mark in line:
            self._steps(MEGATRON, line)
        else:
            self.tail.append(line)
            for sign in formats.SIGNS:
                if sign in line:
                    self._sign(line)
                    return

    def _sign(self, line: str) -> None:
        """Note what a line tells beside the steps."""
        if match := formats.BRIDGE_STEP.search(line):
            self.bridge.append((float(match[1]), float(match[2])))
            self.tail.clear()
            return
        if len(self.head) < _HEAD_LINES and any(sign in line for sign in formats.ABOUT):
            self.head.append(line)
        self.log.sockets |= "Using network Socket" in line
        for reason, pattern in formats.DISTURBANCES.items():
            for rank in self.ranks.values() if pattern.search(line) else ():
                rank.disturbance = reason
                rank.profiling = "Start" in line if reason == PROFILE else rank.profiling

    def _steps(self, kind: Format, line: str) -> None:
        """Read a line with at least one step; ranks that share a file may put several into it."""
        line = line if line.endswith("\n") else line.rstrip("0123456789.eE+-")
        if match := formats.ALL_TIMES.search(line):
            self.listed = [float(text) for text in match[1].split(",")]
            return
        before, *steps = kind.start.split(line)  # of each step its iteration, of how many, and the rest
        match = formats.LABEL.match(before) if steps else None
        label = (int(match["node"] or 0), int(match[2] or match[3] or match[4])) if match else None
        parts: Iterator[Any] = iter(steps or (None, None, line))
        for done, total, part in zip(parts, parts, parts):
            if kind.mark in part:
                read = self._step(kind, done, total, part, self.ranks[label])
                self.log.unreadable += not read
                if read or steps:  # else it is a word about step times, such as a summary's
                    self.log.unreadable_end = not read
            label = None
        self.tail.clear()
        self.tail.append(line[line.rfind(kind.mark) :])  # a bar's line may go on with an error

    def _step(self, kind: Format, done: str | None, total: str | None, part: str, rank: _Rank) -> bool:
        """Take in the step of this part of a line; return False where it is cut off, or has no number."""
        # What follows the first value of a name may be another line's rest.
        texts = {kind.names[name]: text for name, text in reversed(kind.field.findall(part))}
        bar = formats.BAR.search(part) if kind is NEMO and not done else None
        if bar:
            done, total = bar[1] or bar[3], bar[2]
        # A bar prints large numbers with three digits (2e+3), and its own count in full.
        if _is_whole(logged := texts.get("step", "")):
            number = int(float(logged))
        else:
            number = int(done) - (self.bar_offset if bar else 0) if done else -1
        if not 0 <= number < 10**9 or "time" not in texts:
            return False
        if bar and done:
            # The smaller one: it is drawn ahead, too, with the values of the step before.
            self.bar_offset = min(self.bar_offset, int(done) - number)
        elif done:  # NeMo 1's bars name no iteration
            self.log.program = "Megatron-LM" if kind is MEGATRON else "NeMo 2"
        if done:
            # NeMo 2 counts from 0, to one less.
            self.log.total = int(total) + (kind is NEMO and not bar) if total and total != "?" else None
        rank.texts[number] = texts
        time_s, loss, norm = float(texts["time"]) / kind.times_in_a_second, texts.get("loss"), texts.get("grad_norm")
        if kind is MEGATRON and (float(texts.get("skipped", 0)) or float(texts.get("nan_steps", 0))):
            norm = "nan"  # which is why Megatron-LM skips a step
        rank.add(number, time_s, loss and float(loss), norm and float(norm), redrawn=bar is not None)
        return True

    def finish(self) -> Log:
        """Return what was read, with what the beginning and the end of the log say."""
        log = self.log
        labels = sorted(label for label in self.ranks if label is not None)
        # The lowest rank's, or those without a label; not the odd line that lost its label.
        order = [None, *labels] if None in self.ranks else labels
        rank = max((self.ranks[label] for label in order), key=lambda rank: len(rank.steps), default=_Rank())
        if not rank.steps:
            for i, time_s in enumerate(self.listed or [time for time, _ in self.bridge]):
                rank.add(i, time_s, None, None)
            log.reached = bool(self.listed)
        elif len(labels) > 1:
            self._compare(rank, labels)
        log.steps, log.repeated, log.several = rank.steps, rank.repeated, rank.several
        self._read_batch(rank)
        rates = {name: rank.column(name).values() for name in ("tokens_per_s_per_gpu", "tflops_per_gpu")}
        log.rates = {name: statistics.median(printed) for name, printed in rates.items() if printed}
        if any(tflops for _, tflops in self.bridge):
            log.rates.setdefault("tflops_per_gpu", statistics.median(tflops for _, tflops in self.bridge))
        memory = [size for rank in self.ranks.values() for size in rank.column("memory_bytes").values()]
        log.peak_memory_gib = max(memory) / 2**30 if memory else None
        if log.steps:
            log.done = log.steps.last + (log.program != "Megatron-LM")  # which counts from 1
            log.total = log.total if log.done <= (log.total or 0) else None  # a second epoch counts anew
        log.program = "Megatron-Bridge" if self.bridge else log.program
        self._read_head()
        self._read_tail()
        return log

    def _compare(self, rank: _Rank, labels: Sequence[tuple[int, int]]) -> None:
        """Note the labelled ranks' times, and take the longest of each step: the slowest rank ends it."""
        ranks_a_node, steps = 1 + max(number for _, number in labels), rank.steps
        others = {node * ranks_a_node + number: self.ranks[node, number].steps for node, number in labels}
        for number, other in others.items():
            if times := [time for time in other.time_s if is_time(time)]:
                self.log.rank_times_s[number] = statistics.median(times)
        for by_step in [dict(zip(other.step, other.time_s)) for other in others.values()]:
            steps.time_s = [max(time, by_step.get(step, time)) for step, time in zip(steps.step, steps.time_s)]

    def _read_batch(self, rank: _Rank) -> None:
        """Note the batch size of the run's later half, and leave out the steps of another (a batch ramp-up)."""
        steps, growth = rank.steps, rank.growth()
        printed = {step: int(size) for step, size in rank.column("batch").items() if size}
        batches = growth | printed
        if sizes := [batches[step] for step in steps.step if step in batches]:
            usual = self.log.global_batch_size = _usual(sizes)
            for i, step in enumerate(steps.step):
                if batches.get(step, usual) != usual:
                    steps.excluded[i] = OTHER_BATCH
            if printed and growth and _usual([*growth.values()]) != usual:
                self.log.samples_a_step = _usual([*growth.values()])

    def _read_head(self) -> None:
        """Note what the program says of the run."""
        head, printed = "".join(self.head), self.log.printed
        printed |= dict(formats.ARGUMENT.findall(head))
        if processes := formats.PROCESSES.search(head):
            printed["world_size"] = processes[1]
        if gpus := formats.GPU.findall(head):
            printed["gpu"] = ", ".join(dict.fromkeys(gpus))

    def _read_tail(self) -> None:
        """Note how the log ends."""
        log, tail = self.log, "".join(self.tail)
        for match in formats.REACHED.finditer(tail):
            log.reached = True
            log.max_steps = int(match[2]) if match[1] == "steps" else log.max_steps
        if errors := formats.ERROR.findall(tail):
            log.last_error = errors[-1].strip()[:300]
        if not log.steps:
            log.framework = next((name for name, form in formats.OTHER_FRAMEWORKS.items() if form.search(tail)), None)


def _usual(sizes: list[int]) -> int:
    """Return the most frequent of the later half, the last of several."""
    return statistics.mode(reversed(sizes[len(sizes) // 2 :]))
