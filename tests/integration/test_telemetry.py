"""The callback of a GPU rank, without a GPU: the driver answers from here, all else is real."""

from __future__ import annotations

import copy
import json
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_bench.config import load

torch = pytest.importorskip("torch")

CONFIG = Path(__file__).parents[1] / "runs/nemo-2.7.3/bf16/70b/1/20261122-172402-5f1a/config.yaml"
UUID = "4a1b0c2d-0000-1111-2222-333344445555"
WAIT_S = 20


class Driver(types.ModuleType):
    """`pynvml` of one GPU, which says when it was asked."""

    NVMLError = type("NVMLError", (Exception,), {})
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.asked = threading.Semaphore(0)
        self.nvmlInit = lambda: None
        self.nvmlDeviceGetHandleByUUID = {f"GPU-{UUID}": "handle"}.__getitem__
        self.nvmlDeviceGetClockInfo = lambda handle, kind: {1: 1700, 2: 3201}[kind]
        self.nvmlDeviceGetTemperature = lambda handle, sensor: 66
        self.nvmlDeviceGetPowerUsage = lambda handle: 690_000
        self.nvmlDeviceGetTotalEnergyConsumption = self._refused

    def _refused(self, handle: str) -> int:
        raise self.NVMLError("Not Supported")

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:
        self.asked.release()
        return 0x04

    def sampled(self) -> None:
        """Waits for a sample that began after this call; the one before it is in."""
        while self.asked.acquire(blocking=False):
            pass
        for _ in range(3):
            assert self.asked.acquire(timeout=WAIT_S)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    from nemo_bench.training import gpu

    made = Driver()
    monkeypatch.setitem(sys.modules, "pynvml", made)
    monkeypatch.setattr(gpu.GpuSampler.__init__, "__defaults__", (0.001,))
    properties = types.SimpleNamespace(uuid=UUID, name="NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    stats = {"allocated_bytes.all.peak": 100 << 30, "reserved_bytes.all.current": 110 << 30}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: stats)
    monkeypatch.setenv("LOCAL_RANK", "0")
    return made


@pytest.fixture
def process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def sampling() -> bool:
    return any(thread.name == "nvml" for thread in threading.enumerate())


def test_a_gpu_ranks_steps_and_its_line_in_ranks_json(driver: Driver, process_group: None, tmp_path: Path) -> None:
    from nemo_bench.training.callbacks import RankTelemetry

    timing: Any = types.SimpleNamespace(timer={"train_step_timing": 1.65})
    trainer: Any = None
    callback = RankTelemetry(load(CONFIG), tmp_path, 0, timing, 791.23)
    callback = copy.deepcopy(callback)  # as NeMo does
    callback.on_train_start(trainer, trainer)
    for batch in range(5):
        callback.on_train_batch_start(trainer, trainer, None, batch)
        driver.sampled()
        callback.on_train_batch_end(trainer, trainer, None, None, batch)
        assert callback.step == {
            "peak_memory_gib": 100,
            "reserved_memory_gib": 110,
            "power_w": 690,
            "sm_clock_mhz": 1700,
            "sm_clock_min_mhz": 1700,
            "memory_clock_mhz": 3201,
            "memory_clock_min_mhz": 3201,
            "temperature_max_c": 66,
            "throttle_reasons": ["sw_power_cap"],
        }
    assert sampling()
    callback.on_train_end(trainer, trainer)
    assert not sampling()
    (mine,) = json.loads((tmp_path / "ranks.json").read_text())["ranks"]
    about = {"rank": 0, "local_rank": 0, "gpu_name": "NVIDIA H200", "gpu_uuid": f"GPU-{UUID}", "matrix_tflops": 791.2}
    assert about.items() <= mine.items()
    assert (mine["steps"], mine["power_w"], mine["throttled"]) == (2, 690, {"sw_power_cap": 1})


def test_a_disk_that_refuses_the_file_is_no_failure(
    driver: Driver, process_group: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from nemo_bench.training.callbacks import RankTelemetry

    timing: Any = types.SimpleNamespace(timer={"train_step_timing": 1.65})
    trainer: Any = None
    callback = RankTelemetry(load(CONFIG), tmp_path / "missing", 0, timing, None)
    callback.on_train_start(trainer, trainer)
    callback.on_train_end(trainer, trainer)
    assert "nemo_bench: no ranks.json: FileNotFoundError" in capsys.readouterr().out


def test_an_exception_ends_the_thread(driver: Driver, tmp_path: Path) -> None:
    from nemo_bench.training.callbacks import RankTelemetry

    trainer: Any = None
    callback = RankTelemetry(load(CONFIG), tmp_path, 0, trainer, None)
    callback.on_train_start(trainer, trainer)
    assert sampling()
    callback.on_exception(trainer, trainer, RuntimeError())
    assert not sampling()
