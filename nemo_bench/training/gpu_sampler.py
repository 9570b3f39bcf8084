"""Samples of a GPU's power, clocks, temperature and throttling, by NVIDIA's management library (NVML), in a thread.

Nothing here can fail a run: what NVML does not give is left out, with one line in the rank's log.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

SAMPLE_INTERVAL_S = 0.1
STOP_S = 2.0

# NVML's bits (nvml.h, nvmlClocksEventReasons) that hold clocks back. Not among them: an idle GPU, and clocks that
# somebody has set.
_THROTTLING = {
    0x04: "sw_power_cap",
    0x08: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal",
    0x40: "hw_thermal",
    0x80: "hw_power_brake",
}


class _Window:
    """What was sampled since a moment: one step."""

    def __init__(self, since: tuple[float, int] | None) -> None:
        # The energy counter's last reading before the window, so that the power is of all of it.
        self.first_energy, self.last_energy = since, since
        self.power_mw: list[int] = []
        self.sm_mhz: list[int] = []
        self.memory_mhz: list[int] = []
        self.celsius: list[int] = []
        self.reasons: int | None = None

    def add(self, now: float, sample: dict[str, int]) -> None:
        if "energy" in sample:
            self.last_energy = (now, sample["energy"])
            self.first_energy = self.first_energy or self.last_energy
        for name, values in (
            ("power", self.power_mw),
            ("sm", self.sm_mhz),
            ("memory", self.memory_mhz),
            ("temperature", self.celsius),
        ):
            if name in sample:
                values.append(sample[name])
        if "reasons" in sample:
            self.reasons = (self.reasons or 0) | sample["reasons"]

    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.first_energy and self.last_energy and self.last_energy[0] > self.first_energy[0]:
            seconds, millijoules = (b - a for a, b in zip(self.first_energy, self.last_energy))
            found["power_w"] = round(millijoules / 1000 / seconds, 1)
        elif self.power_mw:
            found["power_w"] = round(sum(self.power_mw) / len(self.power_mw) / 1000, 1)
        for name, values in (("sm_clock", self.sm_mhz), ("memory_clock", self.memory_mhz)):
            if values:
                found[f"{name}_mhz"] = round(sum(values) / len(values), 1)
                found[f"{name}_min_mhz"] = min(values)
        if self.celsius:
            found["temperature_max_c"] = max(self.celsius)
        if self.reasons is not None:
            found["throttle_reasons"] = [name for bit, name in _THROTTLING.items() if self.reasons & bit]
        return found


class GpuSampler:
    """Samples one GPU in a thread from `start` to `stop`.

    Args:
        nvml: the `pynvml` module, initialised.
        handle: of the GPU.
        log: takes one line for each thing that this GPU or driver does not tell.
        interval_s: between samples.
    """

    def __init__(
        self, nvml: Any, handle: Any, log: Callable[[str], None], interval_s: float = SAMPLE_INTERVAL_S
    ) -> None:
        self._nvml, self._handle, self._log, self._interval_s = nvml, handle, log, interval_s
        clock, degrees = nvml.nvmlDeviceGetClockInfo, nvml.nvmlDeviceGetTemperature
        # The second name of each is asked where the first is not there or not answered.
        self._asked: dict[str, list[Callable[[], int]]] = {
            "energy": [lambda: int(nvml.nvmlDeviceGetTotalEnergyConsumption(handle))],
            "sm": [lambda: int(clock(handle, nvml.NVML_CLOCK_SM))],
            "memory": [lambda: int(clock(handle, nvml.NVML_CLOCK_MEM))],
            "temperature": [lambda: int(degrees(handle, nvml.NVML_TEMPERATURE_GPU))],
            "reasons": [
                lambda: int(nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)),
                lambda: int(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)),
            ],
        }
        self._lock = threading.Lock()
        self._window = _Window(None)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nvml", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; returns when it is gone, or hangs in the driver, as it may where a GPU has failed."""
        self._ended.set()
        self._thread.join(STOP_S)

    def take(self) -> dict[str, Any]:
        """What was sampled since the last call, by the names of steps.jsonl; empty where nothing was. Starts anew."""
        with self._lock:
            window, self._window = self._window, _Window(self._window.last_energy)
        return window.summary()

    def _run(self) -> None:
        while True:
            now = time.monotonic()  # the energy counter is read first
            sample = self._sample()
            with self._lock:
                self._window.add(now, sample)
            if self._ended.wait(self._interval_s):
                return

    def _sample(self) -> dict[str, int]:
        sample: dict[str, int] = {}
        for name, ways in list(self._asked.items()):
            try:
                sample[name] = ways[0]()
            except (self._nvml.NVMLError, AttributeError) as error:
                del ways[0]
                if not ways:
                    del self._asked[name]
                    self._missing(name, error)
        return sample

    def _missing(self, name: str, error: Exception) -> None:
        if name == "energy":
            # The counter came with Volta; the power that NVML shows is a mean over up to a second.
            nvml, handle = self._nvml, self._handle
            self._asked["power"] = [lambda: int(nvml.nvmlDeviceGetPowerUsage(handle))]
        self._log(f"GPU measurements without {name}: {error}")


def open_sampler(device: Any, log: Callable[[str], None]) -> GpuSampler | None:
    """The sampler of a CUDA device; None, and a line in the log, where NVML cannot be had.

    Args:
        device: torch's properties of it: NVML counts GPUs in an order of its own, and without CUDA_VISIBLE_DEVICES.
        log: takes the lines.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
        return GpuSampler(pynvml, _handle(pynvml, device), log)
    except Exception as error:  # a missing package, library or driver, or one that is not as it should be
        log(f"no GPU measurements: {type(error).__name__}: {error}")
        return None


def _handle(nvml: Any, device: Any) -> Any:
    """NVML's handle of a device; of an instance of a MIG device, its whole GPU's, which has the sensors."""
    uuid = str(device.uuid).removeprefix("GPU-").removeprefix("MIG-")
    try:
        return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except nvml.NVMLError:
        return nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(nvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}"))
