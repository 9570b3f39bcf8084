"""Statistics of step times that leave the warm-up out, and say what they left out and how sure they are.

Step times of one run are not independent of each other: garbage collection, clocks and neighbours on the network last
for more than a step. An interval that treated them as independent would be too narrow. So the interval of one run's
median comes from *batches*: its steps are cut into about sqrt(n) consecutive batches of about sqrt(n) steps, the median
of each is one observation, and Student's t with one degree of freedom less than there are batches gives the interval.
What is correlated over a few steps then falls within a batch. What changes from run to run (other nodes, other days)
is in no single run: only repeats show it, and where there are repeats, the interval is over their medians.
"""

from __future__ import annotations

import bisect
import itertools
import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass

# Fewer steps than this after the warm-up give no number that could be defended.
MIN_STEADY_STEPS = 5
# Fewer than three batches of three steps say nothing about noise.
MIN_BATCHED_STEPS = 9
CONFIDENCE = 0.95

WARM_UP = "warm-up"
RESTART = "restart"
NO_TIME = "no time"
# No step takes thirty years: a damaged line does.
_LONGEST_S = 1e9

# Student's t, 97.5% quantile, for 1 to 30 degrees of freedom.
_T = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)


@dataclass(frozen=True)
class Interval:
    """A confidence interval in the unit of what it is about.

    Attributes:
        low, high: its ends.
        confidence: 0.95.
        n: independent observations behind it: repeats, or batches of steps.
        method: what was observed: "repeats" or "batches of steps".
    """

    low: float
    high: float
    confidence: float
    n: int
    method: str


@dataclass(frozen=True)
class StepTimes:
    """Step times of one run in seconds; all but `last_s` are over the steps that count.

    Attributes:
        last_s: the last step's, which the recipe reads.
        median_s, mean_s, p95_s, min_s, max_s: of the steps that count; p95 interpolates between neighbours.
        spread_s: median absolute deviation, scaled to a normal distribution's standard deviation.
        steps: steps that have a time.
        warmup_steps: leading ones left out.
        excluded: others left out: reason -> number of steps.
        drift: median of the second half of the steps that count, over that of the first half, less 1: 0.02 is a run
            that became 2% slower.
        interval: of the median; None with fewer than 9 steps.
    """

    last_s: float
    median_s: float
    mean_s: float
    p95_s: float
    min_s: float
    max_s: float
    spread_s: float
    steps: int
    warmup_steps: int
    excluded: dict[str, int]
    drift: float
    interval: Interval | None

    @property
    def counted(self) -> int:
        """Steps behind the median."""
        return self.steps - self.warmup_steps - sum(self.excluded.values())

    @property
    def enough(self) -> bool:
        return self.counted >= MIN_STEADY_STEPS


@dataclass(frozen=True)
class Estimate:
    """A mean, its standard error and the degrees of freedom of that."""

    value: float
    error: float
    freedom: int


def t_quantile(freedom: int) -> float:
    """97.5% quantile of Student's t distribution: half the width of a 95% interval, in standard errors."""
    if freedom <= len(_T):
        return _T[freedom - 1]
    z = statistics.NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
    # Cornish and Fisher's expansion: within 1e-5 from 30 degrees on.
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def _spread(times: Sequence[float]) -> float:
    middle = statistics.median(times)
    return 1.4826 * statistics.median(abs(t - middle) for t in times)


def _limit(times: Sequence[float]) -> float:
    """The longest time that is no warm-up: what is usual in the second half, and three spreads (at least 2%) more."""
    half = times[len(times) // 2 :]
    usual = statistics.median(half)
    return usual + max(3 * _spread(half), 0.02 * usual)


def _leading(times: Sequence[float], limit: float) -> int:
    """Leading times over the limit, at most half of them."""
    return next((i for i, t in enumerate(times[: len(times) // 2]) if t <= limit), len(times) // 2)


def exclusions(
    times: Sequence[float | None], paused: Sequence[str | None] | None = None, restarts: Collection[int] = ()
) -> list[str | None]:
    """Why each step is left out of the statistics; None for those that count.

    The second half of the run shows what is usual. The warm-up are the leading steps before the first that is within
    three spreads (and never less than 2%) of its median, at most half of all; after each restart the same is done.

    Args:
        times: step times in seconds, in order; None, a number that is not positive, and one of years is no time.
        paused: of each step, what disturbed it ("validation", "checkpoint", "profile"), or None.
        restarts: indices of the steps that a restarted process began with.
    """
    reasons: list[str | None] = list(paused) if paused is not None else [None] * len(times)
    timed: dict[int, float] = {}  # the steps that may count
    for i, time in enumerate(times):
        if time is None or not 0 < time < _LONGEST_S:
            reasons[i] = NO_TIME
        elif reasons[i] is None:
            timed[i] = time
    if not timed:
        return reasons
    limit = _limit(list(timed.values()))
    order = list(timed)
    begins = [bisect.bisect_left(order, start) for start in sorted({0, *restarts})]
    for begin, end in itertools.pairwise([*begins, len(order)]):
        session = order[begin:end]
        for i in session[: _leading([timed[i] for i in session], limit)]:
            reasons[i] = RESTART if begin else WARM_UP
    return reasons


def step_times(times: Sequence[float | None], excluded: Sequence[str | None] | None = None) -> StepTimes:
    """Statistics of a run's step times (seconds, in order), with `excluded` as `exclusions` gives it.

    Raises:
        ValueError: no step that counts.
    """
    reasons = exclusions(times) if excluded is None else excluded
    timed = [time for time, reason in zip(times, reasons) if reason != NO_TIME and time is not None]
    counted = [time for time, reason in zip(times, reasons) if reason is None and time is not None]
    if not counted:
        raise ValueError("no step times")
    left_out = [reason for reason in reasons if reason not in (None, NO_TIME)]
    half = len(counted) // 2
    return StepTimes(
        last_s=timed[-1],
        median_s=statistics.median(counted),
        mean_s=statistics.fmean(counted),
        p95_s=_quantile(counted, 0.95),
        min_s=min(counted),
        max_s=max(counted),
        spread_s=_spread(counted),
        steps=len(timed),
        warmup_steps=left_out.count(WARM_UP),
        excluded={reason: left_out.count(reason) for reason in sorted({*left_out} - {WARM_UP}) if reason},
        drift=statistics.median(counted[half:]) / statistics.median(counted[:half]) - 1 if half else 0.0,
        interval=interval(estimate_of_steps(counted), "batches of steps"),
    )


def _quantile(values: Sequence[float], fraction: float) -> float:
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def estimate_of_steps(counted: Sequence[float]) -> Estimate | None:
    """The median of one run's steps with its error, by batches (see the module); None with too few steps."""
    if len(counted) < MIN_BATCHED_STEPS:
        return None
    length = math.isqrt(len(counted) - 1) + 1
    batches = len(counted) // length
    rest = len(counted) - batches * length  # the earliest steps are spared, being the nearest to the warm-up
    medians = [statistics.median(counted[rest + i * length : rest + (i + 1) * length]) for i in range(batches)]
    error = statistics.stdev(medians) / math.sqrt(batches)
    return Estimate(statistics.median(counted), error, batches - 1)


def estimate_of_repeats(medians: Sequence[float]) -> Estimate | None:
    """The mean over repeated runs with its error; None with fewer than two."""
    if len(medians) < 2:
        return None
    error = statistics.stdev(medians) / math.sqrt(len(medians))
    return Estimate(statistics.fmean(medians), error, len(medians) - 1)


def interval(estimate: Estimate | None, method: str) -> Interval | None:
    """The estimate's 95% confidence interval."""
    if estimate is None:
        return None
    margin = t_quantile(estimate.freedom) * estimate.error
    return Interval(estimate.value - margin, estimate.value + margin, CONFIDENCE, estimate.freedom + 1, method)


def ratio_interval(new: Estimate, old: Estimate) -> tuple[float, float]:
    """The 95% confidence interval of new / old: Welch's, on relative errors."""
    variances = (new.error / new.value) ** 2, (old.error / old.value) ** 2
    total = sum(variances)
    if total == 0:
        return new.value / old.value, new.value / old.value
    freedom = total**2 / (variances[0] ** 2 / new.freedom + variances[1] ** 2 / old.freedom)
    margin = t_quantile(max(1, math.floor(freedom))) * math.sqrt(total)
    ratio = new.value / old.value
    return ratio * (1 - margin), ratio * (1 + margin)
