"""Warm-up detection and the median behind every reported number."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_bench.results.statistics import step_times

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
