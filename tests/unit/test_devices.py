"""What the ranks' devices did: gathered from steps, written, read, judged, and shown."""

from __future__ import annotations

import html
import json
import re
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from nemo_bench.config import load
from nemo_bench.record import folder as record
from nemo_bench.record.ranks import RANKS, gathered, write_ranks
from nemo_bench.report import page
from nemo_bench.report.build import build_report
from nemo_bench.report.model import DeviceUse
from nemo_bench.report.numbers import rates_of_step
from nemo_bench.report.remarks import throttling
from nemo_bench.report.runs import load_run
from nemo_bench.report.terminal import summary_rows

H200 = Path(__file__).parents[1] / "runs/nemo-2.7.3/bf16/70b/1/20261122-172402-5f1a"


def step(seconds: float = 1.65, **measured: Any) -> dict[str, Any]:
    usual = {
        "power_w": 690.0,
        "sm_clock_mhz": 1700.0,
        "sm_clock_min_mhz": 1650,
        "memory_clock_mhz": 3201.0,
        "temperature_max_c": 66,
        "throttle_reasons": ["sw_power_cap"],
        "peak_memory_gib": 102.99,
        "reserved_memory_gib": 110.5,
    }
    return {"train_step_timing_s": seconds, **usual, **measured}


def rank(number: int, steps: list[dict[str, Any]], **about: Any) -> dict[str, Any]:
    return {
        "rank": number,
        "host": f"node{number // 8:02d}",
        "gpu_name": "NVIDIA H200",
        "matrix_tflops": 790.0 + number % 3,
        **about,
        **gathered(steps),
    }


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A real run of an H200; what its GPU did was not recorded yet."""
    return Path(shutil.copytree(H200, tmp_path / "run"))


def with_steps(run_dir: Path, **measured: Any) -> None:
    lines, _ = record.read_lines(run_dir / record.STEPS)
    text = "".join(json.dumps({**step(), **measured, **line}) + "\n" for line in lines)
    (run_dir / record.STEPS).write_text(text)


# --- a rank's steps in numbers ---


def test_the_first_steps_do_not_count() -> None:
    slow = step(9.0, power_w=100.0, sm_clock_min_mhz=300, temperature_max_c=90, throttle_reasons=["hw_thermal"])
    found = gathered([slow, slow, slow, step(1.6), step(1.8, power_w=710.0, sm_clock_min_mhz=1500)])
    assert found == {
        "steps": 2,
        "step_time_median_s": pytest.approx(1.7),
        "step_time_max_s": 1.8,
        "power_w": 700.0,
        "sm_clock_mhz": 1700.0,
        "sm_clock_min_mhz": 1500.0,
        "temperature_max_c": 66.0,
        "peak_memory_gib": 102.99,
        "reserved_memory_gib": 110.5,
        "throttled": {"sw_power_cap": 1.0},
    }


def test_of_few_steps_the_last_counts_and_of_none_nothing() -> None:
    assert gathered([step(9.0), step(2.0)])["step_time_max_s"] == 2.0
    assert gathered([]) == {"steps": 0}


def test_reasons_are_shares_of_the_steps_that_were_watched() -> None:
    watched = [step(throttle_reasons=[]), step(throttle_reasons=["hw_thermal", "sw_power_cap"]), step(), step()]
    unwatched = {"train_step_timing_s": 1.65}
    assert gathered([step()] * 3 + watched + [unwatched])["throttled"] == {"hw_thermal": 0.25, "sw_power_cap": 0.75}
    assert "throttled" not in gathered([unwatched] * 5)


# --- reading ---


def test_ranks_json_is_a_line_a_rank_and_comes_back(run_dir: Path) -> None:
    write_ranks(run_dir, [rank(number, [step()] * 10) for number in range(16)])
    lines = (run_dir / RANKS).read_text().splitlines()
    assert sum('"host": "node01"' in line for line in lines) == 8
    devices = load_run(run_dir).devices
    assert [each.rank for each in devices] == list(range(16))
    assert (devices[9].host, devices[9].power_w, devices[9].throttled) == ("node01", 690.0, {"sw_power_cap": 1.0})


def test_every_number_that_is_gathered_is_read(run_dir: Path) -> None:
    mine = rank(0, [step()] * 5, gpu_uuid="GPU-1", local_rank=0)
    write_ranks(run_dir, [mine])
    (device,) = load_run(run_dir).devices
    for field in fields(DeviceUse):
        assert getattr(device, field.name) == mine[field.name], field.name


def test_without_ranks_json_rank_0_is_known_by_its_steps(run_dir: Path) -> None:
    assert load_run(run_dir).devices == ()
    with_steps(run_dir)
    (device,) = load_run(run_dir).devices
    assert (device.rank, device.steps, device.power_w, device.matrix_tflops) == (0, 27, 690.0, None)


@pytest.mark.parametrize(
    "text", ["", "{}", '{"ranks": [{"rank": 0}]}', '{"ranks": [{"rank": "x", "steps": 1}]}', "[1]"]
)
def test_a_damaged_file_is_a_warning(run_dir: Path, text: str) -> None:
    (run_dir / RANKS).write_text(text)
    run = load_run(run_dir)
    assert run.devices == () and run.final
    assert any("what the devices did cannot be read" in warning for warning in run.warnings)


def test_the_largest_allocation_of_all_ranks_counts(run_dir: Path) -> None:
    write_ranks(run_dir, [rank(0, [step()] * 5), rank(1, [step(peak_memory_gib=120.0)] * 5)])
    assert load_run(run_dir).peak_memory_gib == 120.0


# --- judging ---


def test_a_gpu_that_is_slow_by_itself_is_a_straggler(run_dir: Path) -> None:
    """Its step times do not show it: the others wait for it."""
    write_ranks(run_dir, [rank(number, [step()] * 5) for number in range(8)])
    assert not any(each.straggler for each in load_run(run_dir).ranks)
    slow = [rank(number, [step()] * 5, **({"matrix_tflops": 600.0} if number == 5 else {})) for number in range(8)]
    write_ranks(run_dir, slow)
    (straggler,) = [each for each in load_run(run_dir).ranks if each.straggler]
    assert (straggler.rank, straggler.measure) == (5, "matrix rate (TFLOP/s)")
    assert straggler.slower == pytest.approx(791 / 600 - 1, abs=0.01)


def test_throttling_is_blamed_and_the_power_cap_is_not(run_dir: Path) -> None:
    write_ranks(run_dir, [rank(0, [step()] * 7), rank(1, [step()] * 7)])
    assert [*throttling(load_run(run_dir))] == []
    hot = [*[step()] * 6, step(throttle_reasons=["sw_power_cap", "hw_thermal", "hw_slowdown"])]
    write_ranks(run_dir, [rank(0, [step()] * 7), rank(9, hot)])
    assert [*throttling(load_run(run_dir))] == [
        "clocks of rank 9's GPU on node01 held back: hw slowdown in 25% of its steps, hw thermal in 25% of its steps"
    ]
    write_ranks(run_dir, [rank(number, hot) for number in range(8)])
    faults = [*throttling(load_run(run_dir))]
    assert len(faults) == 6 and faults[-1] == "and of 3 more ranks' GPUs"


def test_a_throttled_run_says_so_beside_its_verdict(run_dir: Path, tmp_path: Path) -> None:
    # as if it were the published 70B, so that there is a verdict
    config = (run_dir / record.CONFIG).read_text()
    for old, new in {
        "num_layers: 4": "num_layers: 80",
        "num_nodes: 1": "num_nodes: 8",
        "devices: 1": "devices: 8",
    }.items():
        assert old in config
        config = config.replace(old, new)
    (run_dir / record.CONFIG).write_text(config)
    with_steps(run_dir, throttle_reasons=["hw_power_brake"])
    (point,) = build_report([run_dir]).points
    assert "clocks of rank 0's GPU held back: hw power brake in 100% of its steps" in point.verdict.remarks


# --- showing ---


def test_the_summary_shows_power_energy_clocks_and_throttling(run_dir: Path) -> None:
    with_steps(run_dir, throttle_reasons=["sw_power_cap", "sw_thermal"])
    run = load_run(run_dir)
    assert run.numbers is not None
    shown = {name: (value, remark) for name, value, remark in summary_rows(run)}
    joules = 690 * run.numbers.step_time_s
    per_joule = 8192 * 4 / joules
    assert shown["power (W)"] == ("690", f"mean, {joules:,.0f} J a step and GPU, {per_joule:.3g} tokens/J")
    assert shown["SM clock (MHz)"] == ("1,700", "mean, lowest 1,650 (rank 0)")
    assert shown["temperature (°C)"] == ("66", "highest (rank 0)")
    assert shown["  sw power cap"] == ("100%", "of the steps, on 1 of 1 GPUs, usual at full load")
    assert shown["  sw thermal"] == ("100%", "of the steps, on 1 of 1 GPUs")
    assert "peak memory (GiB)" in shown


def test_the_summary_of_several_gpus(run_dir: Path) -> None:
    low = step(sm_clock_min_mhz=900, temperature_max_c=91, power_w=500.0, throttle_reasons=["hw_thermal"])
    write_ranks(run_dir, [rank(0, [step()] * 5), rank(1, [low] * 5)])
    shown = {name: (value, remark) for name, value, remark in summary_rows(load_run(run_dir))}
    assert shown["power (W)"][0] == "595" and shown["power (W)"][1].startswith("mean of 2 GPUs, ")
    assert shown["SM clock (MHz)"] == ("1,700", "mean of 2 GPUs, lowest 900 (rank 1)")
    assert shown["temperature (°C)"] == ("91", "highest (rank 1)")
    assert shown["  hw thermal"] == ("100%", "of the steps, on 1 of 2 GPUs")


def test_nothing_is_shown_of_what_was_not_measured(run_dir: Path) -> None:
    before = summary_rows(load_run(run_dir))
    write_ranks(run_dir, [{"rank": number, "host": "here", "steps": 5, "step_time_median_s": 1.6} for number in (0, 1)])
    assert summary_rows(load_run(run_dir)) == before


def test_the_page_lists_the_gpus_that_were_held_back_first(run_dir: Path) -> None:
    hot = [step(throttle_reasons=["hw_thermal"])] * 5
    write_ranks(run_dir, [rank(0, [step()] * 5), rank(1, [step()] * 5), rank(2, hot)])
    made = page.render(build_report([run_dir]))
    part = made[made.index("GPUs during the steps") :]
    shown = html.unescape(re.sub("<[^>]*>", " ", part[: part.index("</table>")]))
    assert re.search(r"2\s+node00\s+690\s+1,700\s+1,650\s+66\s+103\s+hw thermal 100%\s+0\s+node00", shown), shown


# --- rates of a step ---


def test_a_steps_rates_are_those_of_the_report() -> None:
    run, cfg = load_run(H200), load(H200 / record.CONFIG)
    assert run.numbers is not None
    assert rates_of_step(cfg, [], run.numbers.step_time_s) == {
        "tokens_per_s_per_gpu": pytest.approx(run.numbers.tokens_per_s_per_gpu),
        "tflops_per_gpu": pytest.approx(run.numbers.tflops_per_gpu),
        "mfu": pytest.approx(run.numbers.mfu),
    }


def test_without_a_peak_there_is_no_mfu_and_without_a_time_no_rate() -> None:
    cfg = load(H200 / record.CONFIG)
    cfg.gpu.peak_tflops = {"bf16": None}
    unknown, measured = rates_of_step(cfg, [], 1.0), rates_of_step(cfg, [500.0, 600.0], 1.0)
    assert "mfu" not in unknown and measured["mfu"] == pytest.approx(unknown["tflops_per_gpu"] / 550)
    assert rates_of_step(cfg, [], 0.0) == {} == rates_of_step(cfg, [], float("nan"))
