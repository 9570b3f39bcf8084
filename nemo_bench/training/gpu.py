"""A rank's GPU: whether there is one; its power, clocks, temperature and throttling meanwhile, as far as NVML tells."""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from nemo_bench.config import TrainConfig
from nemo_bench.errors import BenchError

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
    """Refuse a machine that has no GPU for this rank; RuntimeError, torch's, where CUDA itself does not start."""
    if torch.version.cuda is None:
        raise BenchError(
            f"torch {torch.__version__} is built without CUDA: install a CUDA build (pytorch.org), or choose gpu=cpu"
        )
    torch.cuda.init()
    count = torch.cuda.device_count()
    if local_rank >= count:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "unset")
        raise BenchError(
            f"this rank is number {local_rank} of its node, and sees {count} GPUs (CUDA_VISIBLE_DEVICES={visible}): "
            f"each rank must see as many as trainer.devices={cfg.trainer.devices}"
        )


class GpuSampler:
    """Sample one GPU in a thread until `stop`; `nvml` is the `pynvml` module, initialised."""

    def __init__(self, nvml: Any, handle: Any, interval_s: float = 0.1) -> None:
        self.nvml, self.handle, self._interval_s = nvml, handle, interval_s
        self._questions: dict[str, Callable[[], Any]] = {
            "energy": lambda: (time.monotonic(), nvml.nvmlDeviceGetTotalEnergyConsumption(handle)),
            "sm_clock": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "memory_clock": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            "temperature": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            # The name before "event reasons", which every driver knows.
            "reasons": lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle),
        }
        self._lock = threading.Lock()
        self._samples: defaultdict[str, list[Any]] = defaultdict(list)  # since the last `take`
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nvml", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; return when it is gone, or hangs in the driver, as it may where a GPU has failed."""
        self._ended.set()
        self._thread.join(timeout=2)

    def take(self) -> dict[str, Any]:
        """Return what was sampled since the last call, by the names of steps.jsonl, and start anew."""
        with self._lock:
            samples, self._samples = self._samples, defaultdict(list)
            self._samples["energy"] = samples["energy"][-1:]  # from there the next step's is counted
        summary: dict[str, Any] = {}
        if len(energy := samples["energy"]) > 1:
            (first_s, first_mj), (last_s, last_mj) = energy[0], energy[-1]
            summary["power_w"] = round((last_mj - first_mj) / 1000 / (last_s - first_s), 1)
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
            sample = {}
            for name, question in list(self._questions.items()):
                try:
                    sample[name] = question()
                except self.nvml.NVMLError as error:
                    del self._questions[name]
                    log(f"GPU measurements without {name}: {error}")
            with self._lock:
                for name, value in sample.items():
                    self._samples[name].append(value)
            if self._ended.wait(self._interval_s):
                return


def open_sampler(device: Any) -> GpuSampler | None:
    """Return the sampler of a CUDA device, by torch's properties of it; None, and a line in the log, without NVML.

    Found by UUID: NVML counts GPUs in an order of its own, and without CUDA_VISIBLE_DEVICES.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
        return GpuSampler(pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{str(device.uuid).removeprefix('GPU-')}"))
    except Exception as error:  # a missing package, library or driver, or one that is not as it should be
        log(f"no GPU measurements: {type(error).__name__}: {error}")
        return None


def log(text: str) -> None:
    """Print a line into this rank's log."""
    print(f"nemo_bench: {text}", flush=True)
