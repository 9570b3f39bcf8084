"""The sampler's thread on a GPU that changes while it is watched."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nemo_bench.training import gpu as gpu_module
from nemo_bench.training.gpu import GpuSampler, open_sampler

from ..nvml import UUID, Nvml

Start = Callable[[Nvml], GpuSampler]
DEVICE = types.SimpleNamespace(uuid=UUID)  # torch's properties of a device: their uuid has no prefix


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[GpuSampler] = []

    def begin(gpu: Nvml) -> GpuSampler:
        started.append(GpuSampler(gpu, "handle", interval_s=0.001))
        return started[-1]

    yield begin
    for sampler in started:
        sampler.stop()
        assert not sampler._thread.is_alive()


def test_a_step_holds_what_happened_in_it_alone(start: Start) -> None:
    gpu = Nvml()
    sampler = start(gpu)
    gpu.sampled()
    sampler.take()
    gpu.sm_mhz, gpu.celsius, gpu.reasons = 1200, 88, 0x40 | 0x04
    gpu.sampled()
    # Bits of an idle GPU and of clocks that somebody set: no throttling.
    gpu.sm_mhz, gpu.celsius, gpu.reasons = 1980, 70, 0x01 | 0x02 | 0x100
    gpu.sampled()
    hot = sampler.take()
    assert hot["sm_clock_min_mhz"] == 1200 < hot["sm_clock_mhz"] < 1980
    assert (hot["temperature_max_c"], hot["throttle_reasons"]) == (88, ["sw_power_cap", "hw_thermal"])
    gpu.sampled()  # the sample that was under way is in
    sampler.take()
    gpu.sampled()
    assert {"sm_clock_min_mhz": 1980, "temperature_max_c": 70, "throttle_reasons": []}.items() <= sampler.take().items()


def test_power_is_the_energy_counters_difference_over_time(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    # Each sample moves the counter by 7 mJ, and the clock by 10 ms: 0.7 W, in the first window and those behind it.
    gpu = Nvml()
    monkeypatch.setattr(gpu_module, "time", types.SimpleNamespace(monotonic=lambda: gpu.energy_mj / 700))
    sampler = start(gpu)
    for _ in range(2):
        gpu.sampled(3)
        assert sampler.take()["power_w"] == pytest.approx(0.7)


def test_what_is_not_supported_is_absent_and_reported_once(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    sampler = start(Nvml(unsupported=("energy_mj", "celsius", "reasons", "memory_mhz")))
    sampler.stop()
    assert set(sampler.take()) == {"sm_clock_mhz", "sm_clock_min_mhz"}
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[0] == "nemo_bench: GPU measurements without energy: Not Supported"


@pytest.mark.parametrize(
    ("nvml", "handle", "line"),
    [
        (Nvml(), f"GPU-{UUID}", None),
        (Nvml(broken="Driver Not Loaded"), None, "NVMLError: Driver Not Loaded"),
        (None, None, "ModuleNotFoundError: import of pynvml halted; None in sys.modules"),
    ],
)
def test_the_gpu_is_found_by_its_uuid_or_there_is_one_line(
    nvml: Any, handle: Any, line: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    sampler = open_sampler(DEVICE)
    assert (sampler and sampler.handle) == handle
    if sampler:
        sampler.stop()
    assert capsys.readouterr().out == (f"nemo_bench: no GPU measurements: {line}\n" if line else "")
