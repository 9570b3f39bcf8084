"""A rank's GPU: whether there is one; its power, clocks, temperature and throttling meanwhile.

What NVIDIA's management library (NVML) does not tell is left out, with one line in the rank's log: it fails no run.
"""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from typing import Any

import torch

from nemo_bench.config import TrainConfig
from nemo_bench.errors import BenchError

SAMPLE_INTERVAL_S = 0.1
STOP_S = 2.0
# NVML's bits (nvml.h, nvmlClocksEventReasons) that hold clocks back; an idle GPU and clocks that were set do not.
_THROTTLING = {
    0x04: "sw_power_cap",
    0x08: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal",
    0x40: "hw_thermal",
    0x80: "hw_power_brake",
}


def check_gpu(cfg: TrainConfig, local_rank: int) -> None:
    """Refuse a machine that has no GPU for this rank, before the long imports.

    Raises:
        BenchError: naming what is missing.
        RuntimeError: torch's, where CUDA itself does not start.
    """
    if torch.version.cuda is None:
        raise BenchError(
            f"torch {torch.__version__} is built without CUDA: install a CUDA build (pytorch.org), or choose gpu=cpu"
        )
    torch.cuda.init()
    count = torch.cuda.device_count()
    if local_rank >= count:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = f"CUDA_VISIBLE_DEVICES={visible}" if visible is not None else "all of this machine's"
        raise BenchError(
            f"this rank is number {local_rank} of its node, and sees {count} GPUs ({why}): each rank must see as many "
            f"as trainer.devices={cfg.trainer.devices}"
        )


class GpuSampler:
    """Sample one GPU in a thread from `start` to `stop`; `nvml` is the `pynvml` module, initialised."""

    def __init__(self, nvml: Any, handle: Any, interval_s: float = SAMPLE_INTERVAL_S) -> None:
        self._nvml, self._handle, self._interval_s = nvml, handle, interval_s
        self._questions: dict[str, tuple[Any, ...]] = {
            "energy": (nvml.nvmlDeviceGetTotalEnergyConsumption,),
            "sm_clock": (nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
            "memory_clock": (nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_MEM),
            "temperature": (nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
            # The name before "event reasons", which every driver knows.
            "reasons": (nvml.nvmlDeviceGetCurrentClocksThrottleReasons,),
        }
        self._lock = threading.Lock()
        # Since the last `take`. Of the energy counter (seconds, mJ), whose last reading before that comes first.
        self._samples: defaultdict[str, list[int]] = defaultdict(list)
        self._energy: list[tuple[float, int]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nvml", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread; return when it is gone, or hangs in the driver, as it may where a GPU has failed."""
        self._ended.set()
        self._thread.join(STOP_S)

    def take(self) -> dict[str, Any]:
        """Return what was sampled since the last call, by the names of steps.jsonl, and start anew."""
        with self._lock:
            energy, self._energy = self._energy, self._energy[-1:]
            samples, self._samples = self._samples, defaultdict(list)
        summary: dict[str, Any] = {}
        if energy and (seconds := energy[-1][0] - energy[0][0]) > 0:
            summary["power_w"] = round((energy[-1][1] - energy[0][1]) / 1000 / seconds, 1)
        for clock in ("sm_clock", "memory_clock"):
            if mhz := samples[clock]:
                summary[f"{clock}_mhz"] = round(sum(mhz) / len(mhz), 1)
                summary[f"{clock}_min_mhz"] = min(mhz)
        if celsius := samples["temperature"]:
            summary["temperature_max_c"] = max(celsius)
        if reasons := samples["reasons"]:
            summary["throttle_reasons"] = [name for bit, name in _THROTTLING.items() if any(bit & r for r in reasons)]
        return summary

    def _run(self) -> None:
        while True:
            now = time.monotonic()  # the energy counter is read first
            sample = self._sample()
            with self._lock:
                if "energy" in sample:
                    self._energy.append((now, sample.pop("energy")))
                for name, value in sample.items():
                    self._samples[name].append(value)
            if self._ended.wait(self._interval_s):
                return

    def _sample(self) -> dict[str, int]:
        sample: dict[str, int] = {}
        for name, (question, *arguments) in list(self._questions.items()):
            try:
                sample[name] = int(question(self._handle, *arguments))
            except self._nvml.NVMLError as error:
                del self._questions[name]
                log(f"GPU measurements without {name}: {error}")
        return sample


def open_sampler(device: Any) -> GpuSampler | None:
    """Return the sampler of a CUDA device, by torch's properties of it; None, and a line in the log, without NVML."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return GpuSampler(pynvml, _handle(pynvml, device))
    except Exception as error:  # a missing package, library or driver, or one that is not as it should be
        log(f"no GPU measurements: {type(error).__name__}: {error}")
        return None


def _handle(nvml: Any, device: Any) -> Any:
    """Return NVML's handle of a device; of an instance of a MIG device, its whole GPU's, which has the sensors.

    Found by UUID: NVML counts GPUs in an order of its own, and without CUDA_VISIBLE_DEVICES.
    """
    uuid = str(device.uuid).removeprefix("GPU-").removeprefix("MIG-")
    try:
        return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except nvml.NVMLError:
        return nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(nvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}"))


def log(text: str) -> None:
    """Print a line into this rank's log."""
    print(f"nemo_bench: {text}", flush=True)
