"""The measurements of a GPU rank, without a GPU: the driver answers from here, all else is real."""

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
from nemo_bench.record.folder import RunFolder

from ..nvml import UUID, Nvml

torch = pytest.importorskip("torch")

CONFIG = Path(__file__).parents[1] / "runs/nemo-2.7.3/bf16/70b/1/20261122-172402-5f1a/config.yaml"


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nvml]:
    from nemo_bench.training import gpu

    nvml = Nvml()
    nvml.sm_mhz, nvml.celsius, nvml.reasons = 1700, 66, 0x04
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(gpu.GpuSampler.__init__, "__defaults__", (0.001,))
    properties = types.SimpleNamespace(uuid=UUID, name="NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    stats = {"allocated_bytes.all.peak": 100 << 30, "reserved_bytes.all.current": 110 << 30}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: stats)
    monkeypatch.setenv("LOCAL_RANK", "0")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield nvml
    torch.distributed.destroy_process_group()


def started(run_dir: Path) -> Any:
    from nemo_bench.training.hooks import RankTelemetry

    hooks = copy.deepcopy(RankTelemetry(load(CONFIG), RunFolder(run_dir), 0, 791.23))  # as NeMo copies callbacks
    hooks.train_start(0)
    return hooks


def test_a_gpu_ranks_steps_and_its_line_in_ranks_json(
    driver: Nvml, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from nemo_bench.training.hooks import Step

    hooks = started(tmp_path)
    for number in range(5):
        hooks.step_start(number)
        driver.sampled(3)
        hooks.step_end(Step(number, 1.65, 2.5, None, 3e-4))
    assert hooks.step["power_w"] > 0 and hooks.step["sm_clock_min_mhz"] == 1700
    assert (hooks.step["peak_memory_gib"], hooks.step["reserved_memory_gib"]) == (100, 110)
    hooks.train_end()
    (mine,) = json.loads((tmp_path / "ranks.json").read_text())["ranks"]
    about = {"rank": 0, "local_rank": 0, "gpu_name": "NVIDIA H200", "gpu_uuid": f"GPU-{UUID}", "matrix_tflops": 791.2}
    assert about.items() <= mine.items()
    assert mine["steps"] == 2 and mine["power_w"] > 0 and mine["throttled"] == {"sw_power_cap": 1}
    started(tmp_path / "missing").train_end()  # a disk that refuses the file is no failure
    assert "nemo_bench: no ranks.json: FileNotFoundError" in capsys.readouterr().out
    assert not any(thread.name == "nvml" for thread in threading.enumerate())
