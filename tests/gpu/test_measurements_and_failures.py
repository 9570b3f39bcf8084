"""On a machine with GPUs: what NVML tells, and the real texts of failures through the diagnosis. Skipped elsewhere."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from nemo_bench.config import TrainConfig, load
from nemo_bench.launch.diagnosis import explain

pytestmark = pytest.mark.gpu

CONFIG = Path(__file__).parents[1] / "runs/nemo-2.7.3/bf16/70b/1/20261122-172402-5f1a/config.yaml"


@pytest.fixture
def cfg() -> TrainConfig:
    return load(CONFIG)


def busy(seconds: float) -> None:
    import torch

    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        torch.mm(a, a)
        torch.cuda.synchronize()


def test_the_sampler_finds_torchs_device_and_measures_it_under_load() -> None:
    import torch

    from nemo_bench.training.gpu import open_sampler

    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    sampler = open_sampler(device)
    assert sampler is not None
    import pynvml

    assert str(device.uuid) in pynvml.nvmlDeviceGetUUID(sampler.handle)
    busy(0.5)
    sampler.take()
    busy(1.5)
    measured = sampler.take()
    sampler.stop()
    clocks = {"sm_clock_mhz", "sm_clock_min_mhz", "memory_clock_mhz", "memory_clock_min_mhz"}
    assert set(measured) == {"power_w", "temperature_max_c", "throttle_reasons", *clocks}
    limit_w = pynvml.nvmlDeviceGetEnforcedPowerLimit(sampler.handle) / 1000
    assert 0.3 * limit_w < measured["power_w"] < 1.1 * limit_w
    assert 500 < measured["sm_clock_min_mhz"] <= measured["sm_clock_mhz"] < 4000
    assert 20 < measured["temperature_max_c"] < 100


def test_the_matrix_rate_leaves_nothing_behind() -> None:
    import torch

    from nemo_bench.training.matrix_rate import gpu_matrix_rate

    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    rates = [gpu_matrix_rate(0) for _ in range(2)]
    assert rates[0] > 50 and rates[1] == pytest.approx(rates[0], rel=0.1)
    # cuBLAS keeps its workspace, which the training takes over
    assert torch.cuda.memory_allocated() - before < 128 << 20


def test_out_of_memory(cfg: TrainConfig) -> None:
    import torch

    with pytest.raises(torch.OutOfMemoryError) as error:
        torch.empty(1 << 42, dtype=torch.uint8, device="cuda")
    text = "\n".join(explain(cfg, f"OutOfMemoryError: {error.value}", {}) or [])
    parts = ("asked for 4096.00 GiB", "total capacity of", " is free", "allocated by PyTorch", "needed by this config")
    assert all(part in text for part in parts)
