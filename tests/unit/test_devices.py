"""What the ranks' devices did: gathered from steps, written, read, judged, and shown."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from nemo_bench.record.ranks import gathered, write_ranks
from nemo_bench.report.build import build_report
from nemo_bench.report.remarks import throttling
from nemo_bench.report.runs import load_run

H200 = Path(__file__).parents[1] / "runs/nemo-2.7.3/bf16/70b/1/20261122-172402-5f1a"


def step(seconds: float = 1.65, **measured: Any) -> dict[str, Any]:
    usual = {
        "power_w": 690.0,
        "sm_clock_mhz": 1700.0,
        "sm_clock_min_mhz": 1650,
        "temperature_max_c": 66,
        "throttle_reasons": ["sw_power_cap"],
        "peak_memory_gib": 102.99,
        "reserved_memory_gib": 110.5,
    }
    return {"train_step_timing_s": seconds, **usual, **measured}


def rank(number: int, *steps: dict[str, Any], **about: Any) -> dict[str, Any]:
    about = {"host": f"node{number // 8:02d}", "matrix_tflops": 790.0 + number % 3, **about}
    return {"rank": number, **about, **gathered(steps or [step()] * 5)}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A real run of an H200; what its GPU did was not recorded yet."""
    return Path(shutil.copytree(H200, tmp_path / "run"))


def test_a_rank_is_its_steps_in_numbers_and_the_first_do_not_count() -> None:
    slow = step(9.0, power_w=100.0, sm_clock_min_mhz=300, temperature_max_c=90, throttle_reasons=["hw_thermal"])
    assert gathered([slow, slow, slow, step(1.6), step(1.8, power_w=710.0, sm_clock_min_mhz=1500)]) == {
        "steps": 2,
        "step_time_median_s": pytest.approx(1.7),
        "power_w": 700.0,
        "sm_clock_mhz": 1700.0,
        "sm_clock_min_mhz": 1500.0,
        "temperature_max_c": 66.0,
        "peak_memory_gib": 102.99,
        "throttled": {"sw_power_cap": 1.0},
    }
    assert gathered([step(9.0), step(2.0)])["step_time_median_s"] == 2.0
    assert gathered([]) == {"steps": 0}
    watched = [step(throttle_reasons=[]), step(throttle_reasons=["hw_thermal", "sw_power_cap"]), step(), step()]
    unwatched = {"train_step_timing_s": 1.65}
    assert gathered([step()] * 3 + watched + [unwatched])["throttled"] == {"hw_thermal": 0.25, "sw_power_cap": 0.75}


def test_a_gpu_that_is_slow_by_itself_is_a_straggler(run_dir: Path) -> None:
    """Its step times do not show it: the others wait for it."""
    write_ranks(run_dir, [rank(number) for number in range(8)])
    assert not any(comparison.straggler for comparison in load_run(run_dir).ranks)
    write_ranks(run_dir, [rank(number, **({"matrix_tflops": 600.0} if number == 5 else {})) for number in range(8)])
    (straggler,) = [comparison for comparison in load_run(run_dir).ranks if comparison.straggler]
    assert (straggler.rank, straggler.measure) == (5, "matrix rate (TFLOP/s)")
    assert straggler.slower == pytest.approx(791 / 600 - 1, abs=0.01)


def test_throttling_is_blamed_and_the_power_cap_is_not(run_dir: Path) -> None:
    write_ranks(run_dir, [rank(0), rank(1)])
    assert [*throttling(load_run(run_dir))] == []
    hot = [*[step()] * 6, step(throttle_reasons=["sw_power_cap", "hw_thermal", "hw_slowdown"])]
    write_ranks(run_dir, [rank(0), rank(9, *hot)])
    assert [*throttling(load_run(run_dir))] == [
        "clocks of rank 9's GPU on node01 held back: hw slowdown in 25% of its steps, hw thermal in 25% of its steps"
    ]
    write_ranks(run_dir, [rank(number, *hot) for number in range(8)])
    faults = [*throttling(load_run(run_dir))]
    assert len(faults) == 6 and faults[-1] == "and 3 more ranks' GPUs"
    assert "and 3 more ranks' GPUs" in build_report([run_dir]).points[0].verdict.remarks
