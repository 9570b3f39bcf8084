"""A rank's GPU: whether it can compute what is asked for; its power, clocks, temperature and throttling meanwhile.

What NVIDIA's management library (NVML) does not tell is left out, with one line in the rank's log: it fails no run.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from nemo_bench.config import TrainConfig
from nemo_bench.errors import BenchError

# Compute capability that each scaling needs, and the CUDA that blockwise needs as well: Transformer Engine's own checks
# (pytorch/quantization.py).
_FP8_CAPABILITY = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0)}
_BLOCKWISE_CUDA = (12, 9)

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
    """Refuse a GPU that cannot train as `cfg` says, before the long imports.

    Raises:
        BenchError: naming the GPU, what it lacks, and what works.
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
    name, capability = torch.cuda.get_device_name(local_rank), torch.cuda.get_device_capability(local_rank)
    _check_kernels(name, capability)
    if cfg.precision.fp8:
        _check_fp8(cfg.precision.fp8_recipe, name, capability)


def _check_kernels(name: str, capability: tuple[int, int]) -> None:
    """Refuse a GPU that torch holds no kernels for: torch only warns, and the first kernel then fails."""
    built = torch.cuda.get_arch_list()
    for arch in built:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", arch)
        if match is None:
            continue
        kind, major, minor = match[1], int(match[2]), int(match[3])
        # Machine code runs on later GPUs of its generation, PTX on all later ones.
        if (kind == "sm" and major == capability[0] and minor <= capability[1]) or (
            kind == "compute" and (major, minor) <= capability
        ):
            return
    if built:
        raise BenchError(
            f"torch {torch.__version__} holds no kernels for {name} (sm_{capability[0]}{capability[1]}), only for "
            f"{', '.join(built)}: install a build of torch for this GPU (pytorch.org)"
        )


def _check_fp8(recipe: str, name: str, capability: tuple[int, int]) -> None:
    needed = _FP8_CAPABILITY[recipe]
    if capability < needed:
        recipes = [f"precision.fp8_recipe={recipe}" for recipe, least in _FP8_CAPABILITY.items() if capability >= least]
        raise BenchError(
            f"{name} (compute capability {capability[0]}.{capability[1]}) has no fp8 as precision.fp8_recipe={recipe} "
            f"needs it ({needed[0]}.{needed[1]} or later); use {' or '.join([*recipes, 'precision=bf16'])}"
        )
    if recipe == "blockwise" and tuple(int(part) for part in str(torch.version.cuda).split(".")[:2]) < _BLOCKWISE_CUDA:
        raise BenchError(
            f"precision.fp8_recipe=blockwise needs CUDA 12.9, and torch {torch.__version__} has {torch.version.cuda}: "
            "use another build of torch, precision.fp8_recipe=delayed or precision=bf16"
        )


class _Window:
    """The samples since a moment: those of one step."""

    def __init__(self, energy: list[tuple[float, int]]) -> None:
        # (seconds, mJ) of the energy counter, from its last reading before the window: the power is of all of it.
        self.energy = energy
        self.samples: defaultdict[str, list[int]] = defaultdict(list)

    def add(self, now: float, sample: dict[str, int]) -> None:
        for name, value in sample.items():
            if name == "energy":
                self.energy.append((now, value))
            else:
                self.samples[name].append(value)

    def summary(self) -> dict[str, Any]:
        """Return the samples in numbers, by the names of steps.jsonl; empty where nothing was sampled."""
        summary: dict[str, Any] = {}
        if self.energy and (seconds := self.energy[-1][0] - self.energy[0][0]) > 0:
            summary["power_w"] = round((self.energy[-1][1] - self.energy[0][1]) / 1000 / seconds, 1)
        for clock in ("sm_clock", "memory_clock"):
            if mhz := self.samples[clock]:
                summary[f"{clock}_mhz"] = round(sum(mhz) / len(mhz), 1)
                summary[f"{clock}_min_mhz"] = min(mhz)
        if celsius := self.samples["temperature"]:
            summary["temperature_max_c"] = max(celsius)
        if reasons := self.samples["reasons"]:
            summary["throttle_reasons"] = [name for bit, name in _THROTTLING.items() if any(bit & r for r in reasons)]
        return summary


class GpuSampler:
    """Sample one GPU in a thread from `start` to `stop`.

    `nvml` is the `pynvml` module, initialised; `log` takes one line for each thing that this GPU does not tell.
    """

    def __init__(
        self, nvml: Any, handle: Any, log: Callable[[str], None], interval_s: float = SAMPLE_INTERVAL_S
    ) -> None:
        self._nvml, self._handle, self._log, self._interval_s = nvml, handle, log, interval_s
        self._questions: dict[str, tuple[Any, ...]] = {
            "energy": (nvml.nvmlDeviceGetTotalEnergyConsumption,),
            "sm_clock": (nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
            "memory_clock": (nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_MEM),
            "temperature": (nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
            # The name before "event reasons", which every driver knows.
            "reasons": (nvml.nvmlDeviceGetCurrentClocksThrottleReasons,),
        }
        self._lock = threading.Lock()
        self._window = _Window([])
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nvml", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread; return when it is gone, or hangs in the driver, as it may where a GPU has failed."""
        self._ended.set()
        self._thread.join(STOP_S)

    def take(self) -> dict[str, Any]:
        """Return what was sampled since the last call, and start anew."""
        with self._lock:
            window, self._window = self._window, _Window(self._window.energy[-1:])
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
        for name, (question, *arguments) in list(self._questions.items()):
            try:
                sample[name] = int(question(self._handle, *arguments))
            except self._nvml.NVMLError as error:
                del self._questions[name]
                self._log(f"GPU measurements without {name}: {error}")
        return sample


def open_sampler(device: Any, log: Callable[[str], None]) -> GpuSampler | None:
    """Return the sampler of a CUDA device, by torch's properties of it; None, and a line in the log, without NVML."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return GpuSampler(pynvml, _handle(pynvml, device), log)
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
