"""The steps of a run, which of them count, and statistics of their times that say how sure they are.

Step times of one run are not independent of each other: garbage collection, clocks and neighbours on the network last
for more than a step. An interval that treated them as independent would be too narrow. So the interval of one run's
mean comes from *batches*: its steps are cut into about sqrt(n) consecutive batches of about sqrt(n) steps, the mean of
each is one observation, and Student's t with one degree of freedom less than there are batches gives the interval.
What is correlated over a few steps then falls within a batch. What changes from run to run (other nodes, other days)
is in no single run: only repeats show it, and where there are repeats, the interval is over their means.
"""

from __future__ import annotations

import bisect
import itertools
import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

# Fewer steps than this after the warm-up give no number that could be defended.
MIN_STEADY_STEPS = 5
# Fewer than three batches of three steps say nothing about noise.
MIN_BATCHED_STEPS = 9
CONFIDENCE = 0.95
# A larger share of the steps is no warm-up: it is a run that became faster.
LONGEST_WARM_UP = 0.2

WARM_UP, RESTART, NO_TIME = "warm-up", "restart", "no time"
VALIDATION, CHECKPOINT, PROFILE, OTHER_BATCH = "validation", "checkpoint", "profile", "other batch size"
# No step takes thirty years: a damaged line does.
_LONGEST_S = 1e9

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

    def __len__(self) -> int:
        return len(self.step)

    def append(
        self, step: int, time_s: float, loss: float | None, grad_norm: float | None, excluded: str | None = None
    ) -> None:
        """Add a step."""
        self.step.append(step)
        self.time_s.append(time_s)
        self.loss.append(loss)
        self.grad_norm.append(grad_norm)
        self.excluded.append(excluded)

    def cut_from(self, step: int) -> int:
        """Forget this step and all later ones, which a restarted process does again; return how many there were."""
        length = bisect.bisect_left(self.step, step)
        removed = len(self.step) - length
        for column in (self.step, self.time_s, self.loss, self.grad_norm, self.excluded):
            del column[length:]  # type: ignore[attr-defined]  # each is a list
        return removed

    def counted_s(self) -> list[float]:
        """Return the step times that count."""
        return [time for time, why in zip(self.time_s, self.excluded) if why is None]


@dataclass(frozen=True)
class Mean:
    """A mean with its standard error, and the degrees of freedom of that."""

    value: float
    standard_error: float
    degrees_of_freedom: int

    @property
    def margin(self) -> float:
        """Half the width of the 95% confidence interval."""
        return t_quantile(self.degrees_of_freedom) * self.standard_error

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% confidence interval."""
        return self.value - self.margin, self.value + self.margin


@dataclass(frozen=True)
class StepTimes:
    """Step times of one run in seconds; all but `last_s` are of the steps that count."""

    last_s: float  # of the last step, which the recipe reads
    median_s: float
    mean_s: float
    p5_s: float  # quantiles, interpolated between neighbours
    p95_s: float
    min_s: float
    max_s: float
    steps: int  # that have a time
    warmup_steps: int  # leading ones left out
    unsteady_steps: int  # leading ones slower than the rest; as many as warmup_steps, unless too many for a warm-up
    excluded: dict[str, int]  # others left out: reason -> number of steps
    drift: float  # median of the second half over that of the first, less 1: 0.02 is a run that became 2% slower
    mean: Mean | None  # with its error, by batches of steps; None with fewer than 9 steps

    @property
    def counted(self) -> int:
        """Steps behind the mean."""
        return self.steps - self.warmup_steps - sum(self.excluded.values())

    @property
    def spread(self) -> float:
        """From the 5% to the 95% quantile, over the median."""
        return (self.p95_s - self.p5_s) / self.median_s


def t_quantile(freedom: int) -> float:
    """Return the 97.5% quantile of Student's t: half the width of a 95% interval, in standard errors."""
    if freedom <= len(_T):
        return _T[freedom - 1]
    z = statistics.NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
    # Cornish and Fisher's expansion: within 1e-5 from 30 degrees on.
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def is_time(time_s: float | None) -> bool:
    """Return whether a step can have taken so long."""
    return time_s is not None and 0 < time_s < _LONGEST_S


def _leading(times: Sequence[float], limit: float) -> int:
    """Return how many leading times are over the limit, at most half of them."""
    return next((i for i, time in enumerate(times[: len(times) // 2]) if time <= limit), len(times) // 2)


def _limit(times: Sequence[float]) -> float:
    """Return the longest time that is no warm-up: the second half's median, and three spreads (at least 2%) more."""
    half = times[len(times) // 2 :]
    usual = statistics.median(half)
    spread = 1.4826 * statistics.median(abs(time - usual) for time in half)
    return usual + max(3 * spread, 0.02 * usual)


def exclude(steps: Steps, restarts: Collection[int] = ()) -> int:
    """Mark the steps without a time, the warm-up, and the first steps after each restart; return `unsteady_steps`.

    The second half of the run shows what is usual. The warm-up are the leading steps before the first that is within
    three spreads (and never less than 2%) of its median, at most a fifth of all; after each restart the same is done.

    Args:
        steps: their `excluded` says already what disturbed them (a validation, a checkpoint, a profile).
        restarts: numbers of the steps that a restarted process began with.
    """
    for i, time in enumerate(steps.time_s):
        if not is_time(time):
            steps.excluded[i] = NO_TIME
    order = [i for i, why in enumerate(steps.excluded) if why is None]
    if not order:
        return 0
    limit = _limit([steps.time_s[i] for i in order])
    numbers = [steps.step[i] for i in order]
    begins = sorted({0, *(bisect.bisect_left(numbers, step) for step in restarts)})
    unsteady = 0
    for begin, end in itertools.pairwise([*begins, len(order)]):
        session = order[begin:end]
        slow = _leading([steps.time_s[i] for i in session], limit)
        if not begin:
            unsteady = slow
        for i in session[: min(slow, max(1, int(len(session) * LONGEST_WARM_UP)))]:
            steps.excluded[i] = RESTART if begin else WARM_UP
    return unsteady


def step_times(steps: Steps, unsteady_steps: int = 0) -> StepTimes | None:
    """Return the statistics of a run's step times, with what `exclude` marked; None where no step counts."""
    timed = [time for time, why in zip(steps.time_s, steps.excluded) if why != NO_TIME]
    counted = steps.counted_s()
    if not counted:
        return None
    reasons = [why for why in steps.excluded if why not in (None, NO_TIME)]
    half = len(counted) // 2
    return StepTimes(
        last_s=timed[-1],
        median_s=statistics.median(counted),
        mean_s=statistics.fmean(counted),
        p5_s=quantile(counted, 0.05),
        p95_s=quantile(counted, 0.95),
        min_s=min(counted),
        max_s=max(counted),
        steps=len(timed),
        warmup_steps=reasons.count(WARM_UP),
        unsteady_steps=unsteady_steps,
        excluded={why: reasons.count(why) for why in sorted({*reasons} - {WARM_UP}) if why},
        drift=statistics.median(counted[half:]) / statistics.median(counted[:half]) - 1 if half else 0.0,
        mean=mean_of_steps(counted),
    )


def quantile(values: Sequence[float], fraction: float) -> float:
    """Return the value below which this fraction lies, interpolated between neighbours."""
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def mean_of_steps(counted: Sequence[float]) -> Mean | None:
    """Return the mean of one run's steps with its error, by batches (see the module); None with too few steps."""
    if len(counted) < MIN_BATCHED_STEPS:
        return None
    length = math.isqrt(len(counted) - 1) + 1
    batches = len(counted) // length
    rest = len(counted) - batches * length  # the earliest steps are spared, being the nearest to the warm-up
    means = [statistics.fmean(counted[rest + i * length : rest + (i + 1) * length]) for i in range(batches)]
    return Mean(statistics.fmean(counted), statistics.stdev(means) / math.sqrt(batches), batches - 1)


def mean_of_repeats(means: Sequence[float]) -> Mean | None:
    """Return the mean over repeated runs with its error; None with fewer than two."""
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
