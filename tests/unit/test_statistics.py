"""Warm-up detection and the median behind every reported number."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_bench.report.statistics import (
    Estimate,
    estimate_of_repeats,
    estimate_of_steps,
    exclusions,
    interval,
    ratio_interval,
    step_times,
    t_quantile,
)

TIMES = st.lists(st.floats(min_value=1e-3, max_value=1e3), min_size=1, max_size=200)


def test_a_slow_start_is_left_out() -> None:
    result = step_times([30.0, 5.0, 1.2, *[1.0, 1.01, 0.99] * 10])
    assert result.warmup_steps == 3
    assert result.median_s == 1.0
    assert result.last_s == 0.99
    assert result.enough


def test_a_steady_run_has_no_warmup() -> None:
    result = step_times([1.0] * 50)
    assert (result.warmup_steps, result.spread_s, result.steps) == (0, 0.0, 50)


def test_a_slow_step_later_on_is_no_warmup() -> None:
    assert step_times([1.0, 1.0, 9.0, *[1.0] * 20]).warmup_steps == 0


def test_too_few_steps_are_not_enough() -> None:
    assert not step_times([3.0, 1.0, 1.0]).enough
    assert not step_times([1.0]).enough


def test_no_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="no step times"):
        step_times([])


@given(TIMES)
def test_the_median_lies_within_the_times_and_half_the_run_is_kept(times: list[float]) -> None:
    result = step_times(times)
    assert min(times) <= result.median_s <= max(times)
    assert result.steps - result.warmup_steps >= len(times) - len(times) // 2
    assert result.spread_s >= 0


@given(TIMES, st.floats(min_value=0.1, max_value=10))
def test_other_units_change_nothing_but_the_scale(times: list[float], factor: float) -> None:
    scaled = step_times([t * factor for t in times])
    assert scaled.median_s == pytest.approx(step_times(times).median_s * factor, rel=1e-6) or (
        # rounding may move one step over the limit
        abs(scaled.warmup_steps - step_times(times).warmup_steps) > 0
    )


# --- which steps count ---


def test_each_step_left_out_says_why() -> None:
    times = [9.0, 1.0, 1.0, 1.0, None, 1.0, 7.0, 1.0, math.nan, 1.0, -1.0, 1.0]
    paused = [None] * 6 + ["checkpoint"] + [None] * 5
    reasons = exclusions(times, paused)
    assert reasons[0] == "warm-up" and reasons[6] == "checkpoint"
    assert [i for i, reason in enumerate(reasons) if reason == "no time"] == [4, 8, 10]
    result = step_times(times, reasons)
    assert (result.steps, result.warmup_steps, result.excluded, result.counted) == (9, 1, {"checkpoint": 1}, 7)
    assert result.median_s == result.max_s == 1.0


def test_a_restart_warms_up_again() -> None:
    times = [9.0, *[1.0] * 9, 8.0, 2.0, *[1.0] * 8]
    reasons = exclusions(times, restarts={10})
    assert [i for i, reason in enumerate(reasons) if reason == "restart"] == [10, 11]
    assert step_times(times, reasons).excluded == {"restart": 2}


def test_mean_and_percentile_are_over_the_steps_that_count() -> None:
    result = step_times([50.0, *[1.0 + i / 100 for i in range(20)]])
    assert result.warmup_steps == 1
    assert result.mean_s == pytest.approx(1.095)
    assert result.p95_s == pytest.approx(1.1805)
    assert result.min_s == 1.0 and result.max_s == pytest.approx(1.19)


def test_a_run_that_slows_down_shows_a_drift() -> None:
    assert step_times([1.0] * 20 + [1.1] * 20).drift == pytest.approx(0.1)
    assert step_times([1.0] * 40).drift == 0


@given(
    st.lists(st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True)), max_size=60),
    st.sets(st.integers(0, 60)),
    st.data(),
)
def test_any_times_are_sorted_out(times: list[float | None], restarts: set[int], data: st.DataObject) -> None:
    paused = data.draw(st.lists(st.sampled_from([None, None, "validation"]), min_size=len(times), max_size=len(times)))
    reasons = exclusions(times, paused, restarts)
    assert len(reasons) == len(times)
    counted = [time for time, reason in zip(times, reasons) if reason is None]
    assert all(time is not None and 0 < time < 1e9 for time in counted)
    usable = [time for time, why in zip(times, paused) if why is None and time and 0 < time < 1e9]
    # at most half of each session is called warm-up
    assert len(counted) >= len(usable) // 2 - len(restarts)
    if counted:
        result = step_times(times, reasons)
        assert result.counted == len(counted)
        # a sum of numbers near the largest may round up over it
        assert result.min_s <= result.median_s <= result.p95_s * (1 + 1e-9) and result.p95_s <= result.max_s


# --- confidence ---


def test_students_t() -> None:
    stats = pytest.importorskip("scipy.stats")
    for freedom in range(1, 200):
        assert t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=1e-4)


def test_the_interval_over_repeats_is_the_textbooks() -> None:
    found = interval(estimate_of_repeats([10.0, 11.0, 12.0]), "repeats")
    assert found is not None
    # 11 +- 4.3027 * 1 / sqrt(3)
    assert [found.low, found.high] == pytest.approx([8.5159, 13.4841], abs=1e-3) and found.n == 3
    assert estimate_of_repeats([10.0]) is None


def test_too_few_steps_have_no_interval() -> None:
    assert step_times([1.0] * 8).interval is None
    assert step_times([1.0] * 9).interval is not None


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
    held = naive = 0
    for _ in range(400):
        times = correlated(steps, rng, correlation)
        found = interval(estimate_of_steps(times), "batches of steps")
        assert found is not None
        held += found.low <= 10 <= found.high
        margin = 1.96 * 1.2533 * statistics.stdev(times) / math.sqrt(steps)
        naive += abs(statistics.median(times) - 10) <= margin
    assert held / 400 > 0.89
    if correlation:
        assert naive / 400 < 0.85


def test_a_difference_is_judged_by_both_errors() -> None:
    low, high = ratio_interval(Estimate(11.0, 0.1, 5), Estimate(10.0, 0.1, 5))
    assert 1.0 < low < 1.1 < high < 1.2
    low, high = ratio_interval(Estimate(11.0, 0.5, 2), Estimate(10.0, 0.5, 2))
    assert low < 1 < high
    assert ratio_interval(Estimate(11.0, 0, 5), Estimate(10.0, 0, 5)) == (1.1, 1.1)


@given(st.lists(st.floats(min_value=0.1, max_value=100), min_size=18, max_size=100))
def test_the_interval_is_around_the_median(times: list[float]) -> None:
    found = step_times(times)
    assert found.interval is not None
    assert found.interval.low <= found.median_s <= found.interval.high
