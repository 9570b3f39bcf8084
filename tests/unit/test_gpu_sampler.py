"""The sampler's thread on a `pynvml` of the test's own, whose GPU changes while it is watched."""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from nemo_bench.training import gpu as gpu_module
from nemo_bench.training.gpu import GpuSampler, _Window, open_sampler

UUID = "4a1b0c2d-0000-1111-2222-333344445555"
WAIT_S = 20


class NVMLError(Exception):
    pass


@dataclass
class Gpu:
    """What the fake driver answers with; `calls` counts the questions, and `changed` tells of each."""

    millijoules: int = 0
    milliwatts: int = 400_000
    sm_mhz: int = 1980
    memory_mhz: int = 3201
    celsius: int = 50
    reasons: int = 0
    unsupported: tuple[str, ...] = ()
    samples: int = 0
    changed: threading.Condition = field(default_factory=threading.Condition)

    def sampled(self, more: int = 2) -> None:
        """Waits until `more` samples have been begun since now: all but the last are in."""
        with self.changed:
            wanted = self.samples + more
            assert self.changed.wait_for(lambda: self.samples >= wanted, WAIT_S)


class Nvml(types.ModuleType):
    """The part of nvidia-ml-py that is called, in front of one GPU."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    NVMLError = NVMLError

    def __init__(self, gpu: Gpu, name: str = f"GPU-{UUID}") -> None:
        super().__init__("pynvml")
        self.gpu, self.known = gpu, name
        self.broken: str | None = None

    def nvmlInit(self) -> None:
        if self.broken:
            raise NVMLError(self.broken)

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != self.known:
            raise NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: str) -> str:
        return f"whole GPU of {handle}"

    def _answer(self, name: str) -> int:
        if name in self.gpu.unsupported:
            raise NVMLError("Not Supported")
        return int(getattr(self.gpu, name))

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        with self.gpu.changed:
            self.gpu.samples += 1
            self.gpu.millijoules += 7
            self.gpu.changed.notify_all()
        return self._answer("millijoules")

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        with self.gpu.changed:
            self.gpu.samples += 1
            self.gpu.changed.notify_all()
        return self._answer("milliwatts")

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        return self._answer({1: "sm_mhz", 2: "memory_mhz"}[kind])

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        return self._answer("celsius")

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        return self._answer("reasons")


Start = Callable[..., GpuSampler]


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def start(lines: list[str]) -> Iterator[Start]:
    started: list[GpuSampler] = []

    def begin(gpu: Gpu) -> GpuSampler:
        sampler = GpuSampler(Nvml(gpu), "handle", lines.append, interval_s=0.001)
        sampler.start()
        started.append(sampler)
        return sampler

    yield begin
    for sampler in started:
        sampler.stop()


def test_a_step_holds_what_happened_in_it_alone(start: Start) -> None:
    gpu = Gpu()
    sampler = start(gpu)
    gpu.sampled()
    sampler.take()
    gpu.sampled()
    quiet = sampler.take()
    assert (quiet["sm_clock_mhz"], quiet["sm_clock_min_mhz"], quiet["memory_clock_mhz"]) == (1980, 1980, 3201)
    assert (quiet["temperature_max_c"], quiet["throttle_reasons"]) == (50, [])

    gpu.sm_mhz, gpu.celsius, gpu.reasons = 1200, 88, 0x40 | 0x04
    gpu.sampled()
    gpu.sm_mhz, gpu.celsius, gpu.reasons = 1980, 70, 0
    gpu.sampled()
    hot = sampler.take()
    assert hot["sm_clock_min_mhz"] == 1200 < hot["sm_clock_mhz"] < 1980
    assert (hot["temperature_max_c"], hot["throttle_reasons"]) == (88, ["sw_power_cap", "hw_thermal"])

    gpu.sampled()  # the sample that was under way is in
    sampler.take()
    gpu.sampled()
    after = sampler.take()
    assert (after["sm_clock_min_mhz"], after["temperature_max_c"], after["throttle_reasons"]) == (1980, 70, [])


def test_an_idle_gpu_and_clocks_that_somebody_set_are_no_throttling(start: Start) -> None:
    gpu = Gpu(reasons=0x01 | 0x02 | 0x100)
    sampler = start(gpu)
    gpu.sampled()
    assert sampler.take()["throttle_reasons"] == []


def test_power_is_the_energy_counters_difference_over_time(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    # Each question moves the counter by 7 mJ, and the clock by 10 ms: 0.7 W, however long the questions took.
    gpu = Gpu()
    monkeypatch.setattr(gpu_module, "time", types.SimpleNamespace(monotonic=lambda: gpu.millijoules / 700))
    sampler = start(gpu)
    gpu.sampled(3)
    assert sampler.take()["power_w"] == pytest.approx(0.7)
    gpu.sampled(3)
    assert sampler.take()["power_w"] == pytest.approx(0.7)


def test_the_energy_of_a_step_begins_with_the_last_reading_before_it() -> None:
    """A step of one sample has a power all the same."""
    window = _Window([(10.0, 5_000)])
    window.add(11.0, {"energy": 705_000})
    assert window.summary() == {"power_w": 700.0}
    first = _Window([])
    first.add(11.0, {"energy": 705_000})
    assert first.summary() == {}


def test_without_an_energy_counter_the_power_is_sampled(start: Start, lines: list[str]) -> None:
    gpu = Gpu(unsupported=("millijoules",))
    sampler = start(gpu)
    gpu.sampled(4)
    assert sampler.take()["power_w"] == 400
    assert lines == ["GPU measurements without energy: Not Supported"]


def test_what_is_not_supported_is_absent_and_said_once(start: Start, lines: list[str]) -> None:
    gpu = Gpu(unsupported=("celsius", "reasons", "memory_mhz"))
    sampler = start(gpu)
    gpu.sampled(5)
    assert set(sampler.take()) == {"power_w", "sm_clock_mhz", "sm_clock_min_mhz"}
    assert len(lines) == 3 and all("Not Supported" in line for line in lines)


def test_between_two_samples_there_is_nothing(lines: list[str]) -> None:
    sampler = GpuSampler(Nvml(Gpu()), "handle", lines.append)
    assert sampler.take() == {}


def test_stopping_ends_the_thread(start: Start) -> None:
    sampler = start(Gpu())
    sampler.stop()
    assert not any(thread.name == "nvml" and thread.is_alive() for thread in threading.enumerate())


def test_a_driver_that_hangs_does_not_keep_a_rank_from_ending(
    lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, released = threading.Event(), threading.Event()

    class Hanging(Nvml):
        def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
            asked.set()
            released.wait(WAIT_S)
            return 0

    monkeypatch.setattr(gpu_module, "STOP_S", 0.01)
    sampler = GpuSampler(Hanging(Gpu()), "handle", lines.append)
    sampler.start()
    assert asked.wait(WAIT_S)
    sampler.stop()
    assert sampler._thread.is_alive() and sampler._thread.daemon
    released.set()
    sampler._thread.join(WAIT_S)


# --- finding the GPU ---


def installed(monkeypatch: pytest.MonkeyPatch, nvml: Nvml) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)


def device(uuid: str = UUID) -> Any:
    """torch's properties of a device: their uuid has no prefix."""
    return types.SimpleNamespace(uuid=uuid)


def test_the_gpu_is_found_by_its_uuid(monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> None:
    installed(monkeypatch, Nvml(Gpu()))
    sampler = open_sampler(device(), lines.append)
    assert sampler is not None and sampler._handle == f"GPU-{UUID}"
    assert lines == []


def test_an_instance_of_a_mig_device_is_measured_as_its_whole_gpu(
    monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    installed(monkeypatch, Nvml(Gpu(), f"MIG-{UUID}"))
    sampler = open_sampler(device(), lines.append)
    assert sampler is not None and sampler._handle == f"whole GPU of MIG-{UUID}"


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda nvml: setattr(nvml, "broken", "Driver Not Loaded"), "NVMLError: Driver Not Loaded"),
        (lambda nvml: setattr(nvml, "known", "GPU-another"), "NVMLError: Not Found"),
    ],
)
def test_without_nvml_there_is_one_line(
    damage: Callable[[Nvml], None], line: str, monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    nvml = Nvml(Gpu())
    damage(nvml)
    installed(monkeypatch, nvml)
    assert open_sampler(device(), lines.append) is None
    assert lines == [f"no GPU measurements: {line}"]


def test_without_the_package_there_is_one_line(monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert open_sampler(device(), lines.append) is None
    assert len(lines) == 1 and "pynvml" in lines[0]


def test_where_there_is_no_driver_the_real_package_gives_one_line(lines: list[str]) -> None:
    pynvml = pytest.importorskip("pynvml")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        assert open_sampler(device(), lines.append) is None
        assert len(lines) == 1 and lines[0].startswith("no GPU measurements: NVMLError")
    else:
        pytest.skip("this machine has a GPU driver")
