"""Training steps out of anybody's NeMo log, streamed: memory is bounded by the steps kept, not by the bytes read.

Read are the lines that carry `train_step_timing`:

* the progress bar of NeMo 1 (24.09), which overwrites its line with carriage returns::

      Epoch 0: : 100%|...| 100/100 [20:15<00:00, reduced_train_loss=6.370, global_step=99.00, consumed_samples=12800.0,
      train_step_timing in s=11.20]

  which shows three digits; at the end all times are listed with two decimals, `train_step_timing in s: [11.31, ...]`;

* NeMo 2's line a step::

      Training epoch 0, iteration 49/49 | lr: 0.0003 | global_batch_size: 8 | global_step: 49 |
      reduced_train_loss: 2.63 | train_step_timing in s: 0.3569 | consumed_samples: 400

and beside them what tells of validation, checkpoints, profiling and stragglers. Everything else is passed over.

A log is read in blocks. Lines of one program look alike, so a pattern made from the last line that was taken apart
(`_Template`) finds all steps of a block at once; a block in which anything else goes on is taken apart line by line.
Blocks of nothing but steps wait before that: of a run with more steps than are kept, the first are only counted.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from nemo_bench.report.series import CHECKPOINT, MAX_STEPS, PROFILE, VALIDATION, Row, StepSeries

BLOCK_BYTES = 1 << 18  # stays in a core's cache
TAIL_BYTES = 1 << 20
# 100 MiB: of lines of usual length, as many as there are steps to keep.
MAX_WAITING_BLOCKS = 400
# A "line" longer than this is no text: only its end is looked at.
MAX_LINE_BYTES = 1 << 16
MAX_STEP_NUMBER = 10**9
MAX_RANKS = 1 << 14
# So few steps are quicker taken apart one by one.
FEW_STEPS = 32

MARKER = "train_step_timing"
_MARK = MARKER.encode()
_MEMORY = ("max_memory_allocated", "peak_memory_usage")  # bytes
_TIMING = f"{MARKER} in s"

# What tells of something beside the steps; searched for in every block that is not all steps.
_SIGNS = (b"Validation", b"heckpoint", b"nsys profiling", b"STRAGGLER DETECTION")

_ESCAPE = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\^_])")
_START = re.compile(r"Training epoch \d+, iteration (\d{1,12})/(\d{1,12})|Epoch \d+: *:?")
_BAR = re.compile(r"\| *(\d{1,12})/(\d{1,12}) \[")
_LABEL = re.compile(r"\s*(?:(\d{1,6}):|\[?rank[ :]?(\d{1,6})\]?:|\[default(\d{1,6})\]:)\s*$")
_NUMBER = r"[+-]?(?:\d+\.?\d*(?:[eE][+-]?\d+)?|nan|inf)"
_FIELD = re.compile(rf"([A-Za-z]\w*(?: in s)?) *[:=] *({_NUMBER})(?=[\s,|\]]|$)")
_ALL_TIMES = re.compile(rf"{_TIMING}: \[({_NUMBER}(?:, {_NUMBER})*)\]")
_EXPONENT = re.compile(rb"[0-9]e[+-]?[0-9]")
_STRAGGLER = re.compile(r"StragglerId\(rank=(\d{1,6})\b")
_REACHED = re.compile(r"`?Trainer\.fit`? stopped: `?max_steps=(\d{1,12})`? reached")
_ENDING = re.compile(
    r"^.*(?:CANCELLED|DUE TO|Killed|OutOfMemory|[A-Za-z]Error\b|srun: error|Segmentation fault).*$", re.M
)


@dataclass(frozen=True)
class Log:
    """What a log says of a run.

    Attributes:
        size_bytes: how much was read.
        step, time_s, loss, grad_norm: columns, in order of `step`; None where a value is not in the log.
        paused: step number -> what went on just before it ("validation", "checkpoint") or during it ("profile").
        restarts: step numbers with which a restarted process began.
        repeated: steps that were done again after a restart; the later ones count.
        several: values of a step beside another, in a log of several ranks without labels; the largest counts.
        dropped: earliest steps that were left out, there being more than `series.MAX_STEPS`.
        unreadable: lines with `train_step_timing` that were cut off, garbled, or name no step; of the steps kept.
        iteration, iterations: the last progress shown, as printed: 100 and 100, or 49 and 49.
        bar: whether that is a progress bar's, which counts finished steps; NeMo 2 counts from 0, to one less.
        from_zero: whether the steps count from 0, as far as the samples consumed tell.
        max_steps: steps that the trainer said it had reached, at the end.
        global_batch_size: printed, or the samples consumed in one step.
        peak_memory_gib: largest allocation printed.
        rank_times_s: median step time of each labelled rank, where there are several.
        stragglers: ranks that NVIDIA's straggler detection warned of.
        last_error: the last line near the end that tells of an error or a cancelled job.
    """

    size_bytes: int
    step: tuple[int, ...]
    time_s: tuple[float, ...]
    loss: tuple[float | None, ...]
    grad_norm: tuple[float | None, ...]
    paused: dict[int, str]
    restarts: tuple[int, ...]
    repeated: int
    several: int
    dropped: int
    unreadable: int
    iteration: int | None
    iterations: int | None
    bar: bool
    from_zero: bool
    max_steps: int | None
    global_batch_size: int | None
    peak_memory_gib: float | None
    rank_times_s: dict[int, float]
    stragglers: tuple[int, ...]
    last_error: str | None


def read_log(path: Path) -> Log:
    """Everything that `path` says of a run; a log without steps gives empty columns.

    Raises:
        OSError: the file cannot be read.
    """
    reader = _Reader()
    with _no_garbage_collection(), open(path, "rb", buffering=0) as file:
        size = _stream(file, reader)
        file.seek(max(0, size - TAIL_BYTES))
        tail = file.read().decode("utf-8", errors="replace")
    return reader.finish(size, tail)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Millions of short strings make no cycles, and looking for some takes a fifth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _stream(file: BinaryIO, reader: _Reader) -> int:
    size, rest = 0, b""
    while block := file.read(BLOCK_BYTES):
        size += len(block)
        block = rest + block
        end = max(block.rfind(b"\n"), block.rfind(b"\r", block.rfind(b"\n") + 1)) + 1
        if end:
            reader.block(block[:end])
        rest = block[end:][-MAX_LINE_BYTES:]
    reader.unterminated(rest)
    return size


class _Template:
    """A pattern for lines like one that was taken apart."""

    _WANTED = ("global_step", _TIMING, "reduced_train_loss", "grad_norm", *_MEMORY)

    def __init__(self, line: str, start: int, rank: int | None, *, exponents: bool) -> None:
        self.rank = rank
        # Only what float() reads; that there may be an exponent takes a sixth of the time.
        number = r"([0-9]+\.?[0-9]*(?:e[+-]?[0-9]+)?)" if exponents else r"([0-9]+\.?[0-9]*)"
        keyword = "Training epoch " if line.startswith("Training", start) else "Epoch "
        # What each step's line begins with: a line of another rank, or with another one's in front, does not.
        self.begin = (line[:start] + keyword).encode("latin-1")
        self.order: list[str] = []
        fields = [field for field in _FIELD.finditer(line, start) if field[1] in self._WANTED]
        pattern, at = "", fields[0].start() if fields else 0
        for field in _FIELD.finditer(line, at):
            if len(self.order) == len(fields):
                break
            pattern += re.escape(line[at : field.start(2)])
            if field[1] == "global_step":
                pattern += r"([0-9]{1,12})\.?0*"
            elif field[1] in self._WANTED:
                pattern += number
            else:
                pattern += r"[^ ,|\]\n]*"
            if field[1] in self._WANTED:
                self.order.append(field[1])
            at = field.end(2)
        self.pattern = re.compile((pattern + re.escape(line[at : at + 1] or "\n")).encode("latin-1"))
        self.tells_memory = not {*_MEMORY}.isdisjoint(self.order)
        self.usable = len(set(self.order)) == len(self.order) and {*self._WANTED[:2]} <= {*self.order}

    def same_as(self, other: _Template) -> bool:
        return (self.begin, self.pattern) == (other.begin, other.pattern)

    def step(self, line: bytes) -> int | None:
        """The number of the line's step; None where the line is another."""
        match = self.pattern.search(line)
        return int(match[1 + self.order.index("global_step")]) if match else None

    def numbers(self, found: list[tuple[bytes, ...]]) -> list[int]:
        """The number of each step that was found."""
        at = self.order.index("global_step")
        return [int(values[at]) for values in found]

    def texts(self, name: str, columns: list[tuple[bytes, ...]]) -> tuple[bytes, ...]:
        """The values of a field, one a line; empty where the lines do not have it."""
        return columns[self.order.index(name)] if name in self.order else ()


class _Reader:
    def __init__(self) -> None:
        self.series: dict[int | None, StepSeries] = {}  # by rank; None: lines without a label
        self.template: _Template | None = None
        self.unreadable = 0
        self.all_times: list[float] = []  # as NeMo 1 lists them at the end
        self.progress: tuple[int, int] | None = None
        self.bar = False
        self.bar_offset: int | None = None  # 1: a bar counts finished steps, and shows step 99 at 100/100
        self.from_zero = True
        self.batch: int | None = None
        self.consumed: tuple[int, int] | None = None  # step, samples
        self.memory_bytes = 0.0
        self.stragglers: set[int] = set()
        # Blocks of nothing but steps, not taken apart yet, each with the number of its last step.
        self.waiting: deque[tuple[bytes, int]] = deque()
        self.waiting_from = -1  # the step before those

    def block(self, data: bytes) -> None:
        """Reads complete lines."""
        text = data.replace(b"\r", b"\n")
        if not self._put_off(text):
            self._catch_up()
            self._lines(text)
        elif len(self.waiting) > MAX_WAITING_BLOCKS:
            self._catch_up()

    def unterminated(self, data: bytes) -> None:
        """Reads what stands after the last line's end: a line that was cut off, or is being written."""
        self._catch_up()
        # A number at the very end may lack its last digits.
        self._line(data, cut_off=True)

    def _put_off(self, text: bytes) -> bool:
        """Lets a block of nothing but the next steps wait, and leaves out the first of those that are too many.

        Most blocks of a long run never have to be taken apart: lines and the number of the last step tell how many
        steps there are. Whether a line in a block that is left out was garbled, nobody asks.
        """
        template = self.template
        series = self.series.get(template.rank) if template is not None else None
        if template is None or series is None or series.profiling or template.tells_memory:
            return False
        if not (self.waiting or series.steps) or not text.startswith(template.begin):
            return False
        lines = text.count(b"\n")
        if lines != text.count(_MARK) or lines != text.count(b"\n" + template.begin) + 1:
            return False
        last = template.step(text[text.rfind(b"\n", 0, -1) + 1 :])
        if last is None:
            return False
        if not self.waiting:
            self.waiting_from = series.last_step
        steps = last - (self.waiting[-1][1] if self.waiting else self.waiting_from)
        # A progress bar is drawn once or twice a step.
        if not any(abs(lines - draws * steps) < draws for draws in (1, 2)):
            return False
        self.waiting.append((text, last))
        if last - self.waiting_from > MAX_STEPS + MAX_STEPS // 10:
            series.forget()
            while last - self.waiting[0][1] >= MAX_STEPS:
                _, left_out = self.waiting.popleft()
                series.dropped += left_out - self.waiting_from
                self.waiting_from = left_out
            text, last = self.waiting[0]
            begin = text.find(b"\n") + 1
            if template.step(text[:begin]) == self.waiting_from:  # drawn again
                self.waiting[0] = text[begin:], last
        return True

    def _catch_up(self) -> None:
        """Takes apart what waits."""
        while self.waiting:
            self._lines(self.waiting.popleft()[0])

    def _lines(self, text: bytes) -> None:
        if self._all_alike(text):
            return
        marks = text.count(_MARK)
        if marks and self._learn(text) and self._all_alike(text):
            return
        if marks > FEW_STEPS:
            # Something else goes on between the steps, or a line is garbled: the rest may still be alike.
            middle = text.find(b"\n", len(text) // 2) + 1
            if 0 < middle < len(text):
                self._lines(text[:middle])
                self._lines(text[middle:])
                return
        self._one_by_one(text)

    def _all_alike(self, text: bytes) -> bool:
        """Takes the steps of a block by the template; False, with nothing taken, where they do not all fit it."""
        template = self.template
        if template is None:
            return False
        found = template.pattern.findall(text)
        if not found:
            return False
        begun = text.count(b"\n" + template.begin) + text.startswith(template.begin)
        if len(found) != begun:
            return False
        if len(found) != text.count(b"\n") and (
            text.count(_MARK) != len(found) or any(sign in text for sign in _SIGNS)
        ):
            return False
        series = self.series.setdefault(template.rank, StepSeries())
        numbers = template.numbers(found)
        if not _ascending(numbers):
            # A progress bar is drawn twice a step: with the values of the step before, and with its own.
            found = [values for values, _ in itertools.groupby(found)]
            numbers = template.numbers(found)
        if series.profiling or not _ascending(numbers) or numbers[-1] > MAX_STEP_NUMBER:
            return False
        columns = list(zip(*found))
        times, losses, norms = (
            list(map(float, texts)) if (texts := template.texts(name, columns)) else [None] * len(numbers)
            for name in (_TIMING, "reduced_train_loss", "grad_norm")
        )
        # The last line is left to be taken apart: progress and samples are in it, too.
        new = slice(0, -1)
        if numbers[0] <= series.last_step:
            if (numbers[0], times[0], losses[0]) != (series.last_step, series.times[-1], series.losses[-1]):
                return False
            new = slice(1, -1)  # drawn again
        if numbers[new]:
            series.extend(numbers[new], times[new], losses[new], norms[new])  # type: ignore[arg-type]  # it has a time
        memory = {text for name in _MEMORY for text in template.texts(name, columns)}
        self.memory_bytes = max(self.memory_bytes, *(_whole(text.decode()) or 0 for text in memory), 0)
        last = text.rfind(_MARK)
        self._line(text[text.rfind(b"\n", 0, last) + 1 : text.find(b"\n", last)])
        return True

    def _learn(self, text: bytes) -> bool:
        """Makes the template anew from the last line with a step; False where that is no plain one."""
        at = text.rfind(_MARK)
        line = text[text.rfind(b"\n", 0, at) + 1 : text.find(b"\n", at)].decode("latin-1")
        starts = list(_START.finditer(line))
        if len(starts) != 1 or line.count(MARKER) != 1 or "\x1b" in line:
            return False
        begin = starts[0].start()
        rank = _rank(line[:begin])
        if line[:begin].strip() and rank is None:
            return False
        template = _Template(line, begin, rank, exponents=_EXPONENT.search(text) is not None)
        if not template.usable or (self.template is not None and template.same_as(self.template)):
            return False
        self.template = template
        return True

    def _one_by_one(self, text: bytes) -> None:
        ends = set()
        for sign in (_MARK, *_SIGNS):
            at = text.find(sign)
            while at >= 0:
                end = text.find(b"\n", at)
                ends.add(end)
                at = text.find(sign, end)
        for end in sorted(ends):
            self._line(text[text.rfind(b"\n", 0, end) + 1 : end][-MAX_LINE_BYTES:])

    def _line(self, data: bytes, *, cut_off: bool = False) -> None:
        line = data.decode("latin-1")  # every byte a character: nothing that is looked for lies beyond ASCII
        if "\x1b" in line:
            line = _ESCAPE.sub("", line)
        if MARKER in line:
            self._steps(line, cut_off)
            return
        pending = None
        if "nsys profiling" in line:
            for series in self.series.values():
                series.profiling = "Start" in line
            pending = PROFILE if "End" in line else None
        elif "STRAGGLER DETECTION" in line:
            self.stragglers.update(int(rank) for rank in _STRAGGLER.findall(line))
        elif "Validation" in line:
            pending = VALIDATION
        elif "heckpoint" in line:
            pending = CHECKPOINT
        if pending is not None:
            for series in self.series.values():
                series.pending = pending

    def _steps(self, line: str, cut_off: bool) -> None:
        """Reads a line with at least one step; ranks that share a file may put several into it."""
        if f"{_TIMING}: [" in line:
            listed = _ALL_TIMES.search(line)
            self.all_times = [float(text) for text in listed[1].split(",")] if listed else []
            return
        starts = list(_START.finditer(line))
        edges = [start.start() for start in starts] or [0]
        for i, (begin, end) in enumerate(zip(edges, [*edges[1:], len(line)])):
            part = line[begin:end]
            if _TIMING in part:
                rank = _rank(line[:begin]) if i == 0 else None
                self._step(part, starts[i] if starts else None, rank, cut_off and i == len(edges) - 1)

    def _step(self, part: str, start: re.Match[str] | None, rank: int | None, cut_off: bool) -> None:
        found = list(_FIELD.finditer(part))
        if cut_off and found and found[-1].end() == len(part):
            del found[-1]
        fields: dict[str, str] = {}
        for field in found:
            fields.setdefault(field[1], field[2])  # what follows the first may be another line's rest
        try:
            time_s = float(fields[_TIMING])
            progress, step = self._number(part, start, fields.get("global_step"))
        except (KeyError, ValueError):
            self.unreadable += part.count(_TIMING)
            return
        self.unreadable += part.count(_TIMING) - 1
        if rank not in self.series and len(self.series) > MAX_RANKS:
            return
        series = self.series.setdefault(rank, StepSeries())
        loss, norm = (float(fields[name]) if name in fields else None for name in ("reduced_train_loss", "grad_norm"))
        series.add(Row(step, time_s, loss, norm), redrawn=self.bar)
        if progress is not None and step == series.last_step:  # not another rank's, which is a step behind
            self.progress = progress
        self._note(step, fields)

    def _number(self, part: str, start: re.Match[str] | None, logged: str | None) -> tuple[tuple[int, int] | None, int]:
        """Progress as shown (done, total), and the step's number.

        Raises:
            ValueError: the line tells no number that could be one.
        """
        bar = _BAR.search(part)
        self.bar = bar is not None
        progress = None
        if bar:
            progress = int(bar[1]), int(bar[2])
        elif start is not None and start[1] is not None:
            progress = int(start[1]), int(start[2])
        step: float
        if logged is not None and not _rounded(logged):
            step = float(logged)
        elif progress is not None:
            # A bar prints large numbers with three digits (2e+3), and its own count in full.
            step = progress[0] - ((1 if self.bar_offset is None else self.bar_offset) if bar else 0)
        else:
            raise ValueError(logged)
        if not (0 <= step <= MAX_STEP_NUMBER) or step != int(step):
            raise ValueError(logged)
        if bar:
            # The smaller one: it is drawn ahead, too, with the values of the step before.
            offset = int(bar[1]) - int(step)
            self.bar_offset = offset if self.bar_offset is None else min(self.bar_offset, offset)
        return progress, int(step)

    def _note(self, step: int, fields: dict[str, str]) -> None:
        """Keeps what stands beside the step: batch size, memory."""
        for name in _MEMORY:
            self.memory_bytes = max(self.memory_bytes, _whole(fields.get(name)) or 0)
        printed = _whole(fields.get("global_batch_size"))
        self.batch = printed or self.batch
        samples = _whole(fields.get("consumed_samples"))
        if samples is None:
            return
        if printed is None and self.consumed is not None and step > self.consumed[0]:
            size, rest = divmod(samples - self.consumed[1], step - self.consumed[0])
            self.batch = size if size > 0 and not rest else self.batch
        elif self.batch is None and samples % (step + 1) == 0:
            self.batch = samples // (step + 1) or None
        self.consumed = step, samples
        if self.batch:
            self.from_zero = samples != step * self.batch

    def finish(self, size_bytes: int, tail: str) -> Log:
        """What was found, with what the end of the log says."""
        ranks = sorted(rank for rank in self.series if rank is not None)
        # The lowest rank's, or those without a label; not the odd line that lost its label.
        order = [None, *ranks] if None in self.series else ranks
        series = max((self.series[rank] for rank in order), key=lambda each: len(each.steps), default=StepSeries())
        reached = _REACHED.findall(tail)
        errors = _ENDING.findall(tail)
        return Log(
            size_bytes=size_bytes,
            step=tuple(series.steps),
            time_s=tuple(_finer(series.times, self.all_times)),
            loss=tuple(series.losses),
            grad_norm=tuple(series.norms),
            paused=series.paused,
            restarts=tuple(series.restarts),
            repeated=series.repeated,
            several=series.several,
            dropped=series.dropped,
            unreadable=self.unreadable,
            iteration=self.progress[0] if self.progress else None,
            iterations=self.progress[1] if self.progress else None,
            bar=self.bar,
            from_zero=self.from_zero,
            max_steps=int(reached[-1]) if reached else None,
            global_batch_size=self.batch,
            peak_memory_gib=self.memory_bytes / 2**30 if self.memory_bytes else None,
            rank_times_s={rank: _median(self.series[rank].times) for rank in ranks} if len(ranks) > 1 else {},
            stragglers=tuple(sorted(self.stragglers)),
            last_error=_ESCAPE.sub("", errors[-1]).strip()[:300] if errors else None,
        )


def _ascending(numbers: list[int]) -> bool:
    """Whether each is as much more than the one before."""
    stride = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    return stride > 0 and numbers == list(range(numbers[0], numbers[0] + stride * len(numbers), stride))


def _finer(shown: list[float], listed: list[float]) -> list[float]:
    """A bar's times, three digits each, with the two decimals of NeMo 1's list where those say more.

    The list must be of the same steps: as many, and equal as far as the bar shows them.
    """
    if len(listed) != len(shown) or any(abs(a - b) > 0.006 + 0.006 * b for a, b in zip(listed, shown)):
        return shown
    return [fine if coarse >= 10 else coarse for coarse, fine in zip(shown, listed)]


def _rounded(text: str) -> bool:
    """Whether a number was printed with the digits that count only: 2e+3."""
    return "e" in text.lower()


def _whole(text: str | None) -> int | None:
    """A whole number that was printed in full; None for another, or a rounded one (1.28e+6)."""
    if text is None or _rounded(text) or len(text) > 18:
        return None
    value = float(text)
    return int(value) if math.isfinite(value) and value >= 0 and value == int(value) else None


def _rank(label: str) -> int | None:
    """The rank that a line's first characters name ("3: ", "[rank3]: ")."""
    match = _LABEL.match(label)
    return int(next(group for group in match.groups() if group)) if match else None


def _median(times: Iterable[float]) -> float:
    """Of the times that are numbers; NaN where there is none."""
    usable = sorted(time for time in times if math.isfinite(time) and time > 0)
    middle = len(usable) // 2
    if not usable:
        return math.nan
    return usable[middle] if len(usable) % 2 else (usable[middle - 1] + usable[middle]) / 2
