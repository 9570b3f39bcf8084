"""Which steps count, the statistics behind every reported number, and how sure they are."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_bench.report.statistics import (
    Mean,
    Steps,
    StepTimes,
    mean_of_steps,
    ratio_of,
    step_times,
)


def steps_of(times: list[float], paused: dict[int, str] | None = None, restarts: list[int] | None = None) -> Steps:
    steps = Steps(restarts=restarts or [])
    for i, time_s in enumerate(times):
        steps.append(i, time_s, None, None, (paused or {}).get(i))
    return steps


def measured(times: list[float]) -> StepTimes:
    result = step_times(steps_of(times))
    assert result is not None
    return result


@pytest.mark.parametrize(
    ("times", "warmup", "unsteady"),
    [
        ([30.0, 5.0, 1.2, *[1.0, 1.01, 0.99] * 10], 3, 3),
        ([1.0] * 50, 0, 0),
        ([1.0, 1.0, 9.0, *[1.0] * 20], 0, 0),  # a slow step later on
        ([3.0] * 15 + [1.0] * 35, 10, 15),  # a warm-up is at most a fifth of the steps
        ([30.0] * 30 + [11.0] * 20, 10, 25),
    ],
)
def test_the_warm_up_is_a_slow_start_of_at_most_a_fifth(times: list[float], warmup: int, unsteady: int) -> None:
    result = measured(times)
    assert (result.warmup_steps, result.counted, result.unsteady_steps) == (warmup, len(times) - warmup, unsteady)


def test_each_step_left_out_says_why() -> None:
    steps = steps_of([9.0, 1.0, 1.0, 1.0, 0.0, 1.0, 7.0, 1.0, math.nan, 1.0, -1.0, 1.0], {6: "checkpoint"})
    result = step_times(steps)
    assert steps.excluded[0] == "warm-up" and steps.excluded[6] == "checkpoint"
    assert [i for i, why in enumerate(steps.excluded) if why == "no time"] == [4, 8, 10]
    assert result is not None
    assert (result.steps, result.warmup_steps, result.excluded, result.counted) == (9, 1, {"checkpoint": 1}, 7)
    assert result.median_s == result.mean_s == result.p95_s == 1.0
    assert step_times(Steps()) is None and step_times(steps_of([math.nan, -1.0, 1e10])) is None
    steps = steps_of([9.0, *[1.0] * 9, 8.0, 2.0, *[1.0] * 8], restarts=[10])
    step_times(steps)
    assert [i for i, why in enumerate(steps.excluded) if why == "restart"] == [10, 11]


@settings(deadline=None)
@given(
    st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=60),
    st.sets(st.integers(0, 60)),
    st.dictionaries(st.integers(0, 60), st.just("validation")),
)
def test_any_times_are_sorted_out(times: list[float], restarts: set[int], paused: dict[int, str]) -> None:
    steps = steps_of(times, paused, [*restarts])
    result = step_times(steps)
    counted = [time for time, why in zip(times, steps.excluded) if why is None]
    assert all(0 < time < 1e9 for time in counted)
    usable = [time for i, time in enumerate(times) if i not in paused and 0 < time < 1e9]
    # Of each session, one step or a fifth is called warm-up.
    assert len(counted) >= len(usable) * 0.8 - len(restarts) - 1
    if result is not None:
        assert result.counted == len(counted)
        # a sum of numbers near the largest may round up over it
        assert min(counted) <= result.p5_s * (1 + 1e-9) <= result.median_s * (1 + 2e-9) <= max(counted) * (1 + 3e-9)
        assert result.p95_s <= max(counted) * (1 + 1e-9)
        assert result.mean is None or result.mean.interval[0] <= result.mean_s <= result.mean.interval[1]


def correlated(number: int, rng: random.Random, correlation: float) -> list[float]:
    """Step times around 10 s, each depending on the one before."""
    error, times = rng.gauss(0, 1), []
    for _ in range(number):
        error = correlation * error + math.sqrt(1 - correlation**2) * rng.gauss(0, 1)
        times.append(10 + 0.1 * error)
    return times


@pytest.mark.parametrize(("correlation", "steps"), [(0.0, 49), (0.5, 49), (0.7, 100)])
def test_the_interval_of_one_run_holds_what_it_promises(correlation: float, steps: int) -> None:
    """Where steps depend on each other, an interval that took them as independent would be far too narrow."""
    rng = random.Random(1)
    held = 0
    for _ in range(400):
        mean = mean_of_steps(correlated(steps, rng, correlation))
        assert mean is not None
        held += mean.interval[0] <= 10 <= mean.interval[1]
    assert held / 400 > 0.89


def test_a_difference_is_judged_by_both_errors() -> None:
    low, high = ratio_of(Mean(11.0, 0.1, 5), Mean(10.0, 0.1, 5)).interval
    assert 1.0 < low < 1.1 < high < 1.2
    low, high = ratio_of(Mean(11.0, 0.5, 2), Mean(10.0, 0.5, 2)).interval
    assert low < 1 < high
    assert ratio_of(Mean(11.0, 0, 5), Mean(10.0, 0, 5)).interval == (1.1, 1.1)
