"""The steps of a run, which of them count, and statistics of their times with intervals."""

from __future__ import annotations

import bisect
import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

# Fewer steps than this after the warm-up give no number that could be defended.
MIN_STEADY_STEPS = 5
# A larger share of the steps is no warm-up: it is a run that became faster.
LONGEST_WARM_UP = 0.2

WARM_UP, RESTART, NO_TIME = "warm-up", "restart", "no time"
VALIDATION, CHECKPOINT, PROFILE, OTHER_BATCH = "validation", "checkpoint", "profile", "other batch size"

# Student's t, 97.5% quantile, for 1 to 30 degrees of freedom.
_T = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)


@dataclass
class Steps:
    """The training steps of a run, in columns of equal length, ascending by `step`."""

    step: list[int] = field(default_factory=list)  # the optimizer step's number as it was logged (NeMo counts from 0)
    time_s: list[float] = field(default_factory=list)  # train_step_timing
    loss: list[float | None] = field(default_factory=list)  # reduced_train_loss
    grad_norm: list[float | None] = field(default_factory=list)  # global, before clipping
    # Why a step is left out of the statistics: None (it counts), or one of the words above.
    excluded: list[str | None] = field(default_factory=list)
    restarts: list[int] = field(default_factory=list)  # step numbers with which a restarted process began

    @property
    def last(self) -> int:
        return self.step[-1] if self.step else -1

    def __len__(self) -> int:
        return len(self.step)

    def append(
        self, step: int, time_s: float, loss: float | None, grad_norm: float | None, excluded: str | None = None
    ) -> None:
        self.step.append(step)
        self.time_s.append(time_s)
        self.loss.append(loss)
        self.grad_norm.append(grad_norm)
        self.excluded.append(excluded)

    def restart(self, step: int) -> int:
        """Forget this step and later ones, which a restarted process does again; return how many there were."""
        length, removed = bisect.bisect_left(self.step, step), len(self.step)
        for column in (self.step, self.time_s, self.loss, self.grad_norm, self.excluded):
            del column[length:]
        self.restarts = [*(start for start in self.restarts if start < step), step]
        return removed - length


@dataclass(frozen=True)
class Mean:
    """A mean with its standard error, and the degrees of freedom of that."""

    value: float
    standard_error: float
    degrees_of_freedom: int

    @property
    def margin(self) -> float:
        """Half the width of the 95% interval, at most 4% too wide beyond 30 degrees of freedom."""
        return _T[min(self.degrees_of_freedom, len(_T)) - 1] * self.standard_error

    @property
    def interval(self) -> tuple[float, float]:
        return self.value - self.margin, self.value + self.margin


@dataclass(frozen=True)
class StepTimes:
    """Step times of one run in seconds; all but `last_s` are of the steps that count."""

    last_s: float  # of the last step, which the recipe reads
    median_s: float
    mean_s: float
    p5_s: float  # quantiles, interpolated between neighbours
    p95_s: float
    steps: int  # that have a time
    warmup_steps: int  # leading ones left out
    unsteady_steps: int  # leading ones slower than the rest; as many as warmup_steps, unless too many for a warm-up
    excluded: dict[str, int]  # others left out: reason -> number of steps
    mean: Mean | None  # with its error, by batches of steps; None of a single step

    @property
    def counted(self) -> int:
        """Steps behind the mean."""
        return self.steps - self.warmup_steps - sum(self.excluded.values())

    @property
    def description(self) -> str:
        """What the mean is of: "48 steps after 1 of warm-up, without 1 (checkpoint)"."""
        text = f"{self.counted} step{'' if self.counted == 1 else 's'} after {self.warmup_steps} of warm-up"
        if self.excluded:
            text += ", without " + " and ".join(f"{number} ({reason})" for reason, number in self.excluded.items())
        return text


def is_time(time_s: float) -> bool:
    """Return whether a step can have taken so long: thirty years are a damaged line's."""
    return 0 < time_s < 1e9


def _limit(times: Sequence[float]) -> float:
    """Return the longest time that is no warm-up: the second half's median, and three spreads (at least 2%) more."""
    half = times[len(times) // 2 :]
    usual = statistics.median(half)
    spread = 1.4826 * statistics.median(abs(time - usual) for time in half)
    return usual + max(3 * spread, 0.02 * usual)


def _mark(steps: Steps) -> int:
    """Mark the steps without a time, the warm-up, and the first steps after each restart; return `unsteady_steps`.

    The warm-up are the leading steps before the first within `_limit`, at most a fifth of all; so too after a restart.
    """
    for i, time in enumerate(steps.time_s):
        if not is_time(time):
            steps.excluded[i] = NO_TIME
    order = [i for i, why in enumerate(steps.excluded) if why is None]
    if not order:
        return 0
    limit = _limit([steps.time_s[i] for i in order])
    numbers = [steps.step[i] for i in order]
    begins = sorted({0, *(bisect.bisect_left(numbers, step) for step in steps.restarts)})
    unsteady = 0
    for begin, end in itertools.pairwise([*begins, len(order)]):
        session = order[begin:end]
        half = len(session) // 2
        slow = next((n for n, i in enumerate(session[:half]) if steps.time_s[i] <= limit), half)
        if not begin:
            unsteady = slow
        for i in session[: min(slow, max(1, int(len(session) * LONGEST_WARM_UP)))]:
            steps.excluded[i] = RESTART if begin else WARM_UP
    return unsteady


def step_times(steps: Steps) -> StepTimes | None:
    """Mark in `excluded` which steps do not count, beside those marked; return statistics of the others, if any."""
    unsteady_steps = _mark(steps)
    timed = [(time, why) for time, why in zip(steps.time_s, steps.excluded) if why != NO_TIME]
    counted = [time for time, why in timed if why is None]
    if not counted:
        return None
    twentieths = statistics.quantiles(counted, n=20, method="inclusive") if len(counted) > 1 else counted
    reasons = [why for _, why in timed if why]
    return StepTimes(
        last_s=[time for time, why in timed if why != OTHER_BATCH][-1],
        median_s=statistics.median(counted),
        mean_s=statistics.fmean(counted),
        p5_s=twentieths[0],
        p95_s=twentieths[-1],
        steps=len(timed),
        warmup_steps=reasons.count(WARM_UP),
        unsteady_steps=unsteady_steps,
        excluded={why: reasons.count(why) for why in sorted({*reasons} - {WARM_UP})},
        mean=mean_of_steps(counted),
    )


def mean_of_steps(counted: Sequence[float]) -> Mean | None:
    """Return the mean of one run's steps with its error; None of a single step.

    Steps depend on each other (garbage collection, clocks, neighbours on the network): an interval that took them as
    independent would be too narrow. The observations of Student's t are the means of about sqrt(n) batches of about
    sqrt(n) consecutive steps; of fewer than 9 steps, the steps.
    """
    length = math.isqrt(len(counted) - 1) + 1 if len(counted) >= 9 else 1
    rest = len(counted) % length  # the earliest steps are spared, being the nearest to the warm-up
    of_batches = mean_of_repeats([statistics.fmean(counted[i : i + length]) for i in range(rest, len(counted), length)])
    return of_batches and replace(of_batches, value=statistics.fmean(counted))


def mean_of_repeats(means: Sequence[float]) -> Mean | None:
    """Return the mean over repeated runs with its error, which holds what changes from run to run; None of one run."""
    if len(means) < 2:
        return None
    return Mean(statistics.fmean(means), statistics.stdev(means) / math.sqrt(len(means)), len(means) - 1)


def ratio_of(new: Mean, old: Mean) -> Mean:
    """Return new / old with Welch's error, from the relative errors of both."""
    variances = (new.standard_error / new.value) ** 2, (old.standard_error / old.value) ** 2
    total = sum(variances)
    ratio = new.value / old.value
    if total == 0:
        return Mean(ratio, 0.0, 1)
    freedom = total**2 / (variances[0] ** 2 / new.degrees_of_freedom + variances[1] ** 2 / old.degrees_of_freedom)
    return Mean(ratio, ratio * math.sqrt(total), max(1, math.floor(freedom)))
