"""The steps of a run in the order of their numbers, put together from lines in the order they were written.

A process that was restarted does some steps again, a progress bar draws a step twice, and several ranks may write into
one log. What is kept is each step once, with what disturbed it.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import NamedTuple

# More than any benchmark has; of a longer run the latest steps are kept.
MAX_STEPS = 200_000

VALIDATION, CHECKPOINT, PROFILE = "validation", "checkpoint", "profile"


class Row(NamedTuple):
    """One step, as a line tells it; None for what it does not tell."""

    step: int
    time_s: float
    loss: float | None
    grad_norm: float | None


class StepSeries:
    """The steps of one rank, ascending: what is known of each so far."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.times: list[float] = []
        self.losses: list[float | None] = []
        self.norms: list[float | None] = []
        self.paused: dict[int, str] = {}
        self.restarts: list[int] = []
        self.repeated = self.several = self.dropped = 0
        self.pending: str | None = None  # happened since the last step
        self.profiling = False

    @property
    def last_step(self) -> int:
        """Number of the last step; -1 before there is one."""
        return self.steps[-1] if self.steps else -1

    def add(self, row: Row, *, redrawn: bool = False) -> None:
        """Takes in one step.

        Args:
            row: the step.
            redrawn: it is of a progress bar, which one process draws: where its step is there already, perhaps with the
                values of the step before, these count.
        """
        last = self.last_step
        if redrawn and row.step == last:
            self._cut(slice(len(self.steps) - 1, None))
        else:
            beside = row.step == last or (self.several and row.step == last - 1)
            if beside and self._same_step(row):
                return
            if row.step <= last:
                self.restart(row.step)
            self._begin(row.step)
        self.steps.append(row.step)
        self.times.append(row.time_s)
        self.losses.append(row.loss)
        self.norms.append(row.grad_norm)
        self._bound()

    def extend(
        self,
        steps: Sequence[int],
        times: Sequence[float],
        losses: Sequence[float | None],
        norms: Sequence[float | None],
    ) -> None:
        """Appends steps, one at least, that ascend, of which none is paused but perhaps the first."""
        self._begin(steps[0])
        self.steps.extend(steps)
        self.times.extend(times)
        self.losses.extend(losses)
        self.norms.extend(norms)
        self._bound()

    def forget(self) -> None:
        """Leaves out all steps so far: so many follow that none of them would be kept."""
        self.dropped += len(self.steps)
        self._cut(slice(None))
        self.paused.clear()
        self.restarts.clear()

    def _begin(self, step: int) -> None:
        """Marks a step with what happened since the one before."""
        if self.pending is not None and self.steps:
            self.paused[step] = self.pending
        if self.profiling:
            self.paused[step] = PROFILE
        self.pending = None

    def _same_step(self, row: Row) -> bool:
        """Takes in a step that is there already: a progress bar drawn again, or another rank's line of it."""
        index = len(self.steps) - 1 - (self.steps[-1] - row.step)
        if index < 0 or self.steps[index] != row.step:
            return False
        if self.times[index] != row.time_s:
            self.several += 1
            self.times[index] = max(self.times[index], row.time_s)  # the slowest rank ends the step
        return True

    def restart(self, step: int) -> None:
        """A process begins with `step`: what was recorded of it and of later ones does not count."""
        keep = bisect.bisect_left(self.steps, step)
        self.repeated += len(self.steps) - keep
        self._cut(slice(keep, None))
        while self.paused and next(reversed(self.paused)) >= step:  # in ascending order, as the steps came
            self.paused.popitem()
        while self.restarts and self.restarts[-1] >= step:
            self.restarts.pop()
        self.restarts.append(step)
        self.pending, self.profiling = None, False

    def _cut(self, part: slice) -> None:
        del self.steps[part], self.times[part], self.losses[part], self.norms[part]

    def _bound(self) -> None:
        surplus = len(self.steps) - MAX_STEPS
        if surplus > MAX_STEPS // 10:  # in portions: moving the rest down costs
            self._cut(slice(surplus))
            self.dropped += surplus
            first = self.steps[0]
            self.paused = {at: reason for at, reason in self.paused.items() if at >= first}
            self.restarts = [at for at in self.restarts if at > first]
