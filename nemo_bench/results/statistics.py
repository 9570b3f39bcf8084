"""Statistics of step times that leave the warm-up out, and say what they left out."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# Fewer steps than this after the warm-up give no number that could be defended.
MIN_STEADY_STEPS = 5


@dataclass(frozen=True)
class StepTimes:
    """Step times of one run in seconds; `median_s` and `spread_s` are over the steps after the warm-up."""

    last_s: float  # what the recipe reads
    median_s: float
    spread_s: float  # median absolute deviation, scaled to a normal distribution's standard deviation
    steps: int
    warmup_steps: int

    @property
    def enough(self) -> bool:
        return self.steps - self.warmup_steps >= MIN_STEADY_STEPS


def _spread(times: Sequence[float]) -> float:
    middle = statistics.median(times)
    return 1.4826 * statistics.median(abs(t - middle) for t in times)


def warmup_steps(times: Sequence[float]) -> int:
    """Leading steps that are slower than the run becomes, at most half of it.

    The second half of the run shows what is usual: the warm-up ends at the first step within three spreads (and
    never less than 2%) of its median.
    """
    half = times[len(times) // 2 :]
    usual = statistics.median(half)
    limit = usual + max(3 * _spread(half), 0.02 * usual)
    return next((i for i, t in enumerate(times[: len(times) // 2]) if t <= limit), len(times) // 2)


def step_times(times: Sequence[float]) -> StepTimes:
    """Statistics of a run's step times (seconds, in order).

    Raises:
        ValueError: no step times at all.
    """
    if not times:
        raise ValueError("no step times")
    warmup = warmup_steps(times)
    steady = times[warmup:]
    return StepTimes(
        last_s=times[-1],
        median_s=statistics.median(steady),
        spread_s=_spread(steady),
        steps=len(times),
        warmup_steps=warmup,
    )
