"""A `pynvml` in front of one GPU, whose state the tests change while it is watched."""

from __future__ import annotations

import threading
import types

UUID = "4a1b0c2d-0000-1111-2222-333344445555"
WAIT_S = 20


class Nvml(types.ModuleType):
    """The part of nvidia-ml-py that is called; each sample moves the energy counter by 7 mJ."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    NVMLError = type("NVMLError", (Exception,), {})

    def __init__(self, *, broken: str = "", unsupported: tuple[str, ...] = ()) -> None:
        super().__init__("pynvml")
        self.broken, self.unsupported = broken, unsupported
        self.energy_mj, self.sm_mhz, self.memory_mhz, self.celsius, self.reasons = 0, 1980, 3201, 50, 0
        self.samples = 0
        self.sampling = threading.Condition()

    def sampled(self, more: int = 2) -> None:
        """Wait until `more` samples have begun since now: all but the last are in."""
        with self.sampling:
            wanted = self.samples + more
            assert self.sampling.wait_for(lambda: self.samples >= wanted, WAIT_S)

    def nvmlInit(self) -> None:
        if self.broken:
            raise self.NVMLError(self.broken)

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        with self.sampling:
            self.samples += 1
            self.energy_mj += 7
            self.sampling.notify_all()
        return self._answer("energy_mj")

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        return self._answer({1: "sm_mhz", 2: "memory_mhz"}[kind])

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        return self._answer("celsius")

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        return self._answer("reasons")

    def _answer(self, name: str) -> int:
        if name in self.unsupported:
            raise self.NVMLError("Not Supported")
        return int(getattr(self, name))
