"""On a machine with GPUs: what NVML tells, and the real texts of failures through the diagnosis. Skipped elsewhere."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nemo_bench.checks.machine import count_gpus
from nemo_bench.cluster import processes
from nemo_bench.config import TrainConfig, load
from nemo_bench.launch import point
from nemo_bench.launch.diagnosis import explain
from nemo_bench.record import folder as record

pytestmark = pytest.mark.gpu

CONFIG = Path(__file__).parents[1] / "runs/nemo-2.7.3/bf16/70b/1/20261122-172402-5f1a/config.yaml"
# Rank 1 never joins the collective that rank 0 waits in.
STUCK = """
import datetime, os, sys
import torch
import torch.distributed as dist
rank = int(os.environ["RANK"])
torch.cuda.set_device(rank)
dist.init_process_group("nccl", timeout=datetime.timedelta(seconds=10))
dist.all_reduce(torch.ones(1, device="cuda"))
torch.cuda.synchronize()
print("rank", rank, "reads shard 7", flush=True)
if rank == 1:
    sys.stdin.read()
dist.all_reduce(torch.ones(1024, device="cuda"))
torch.cuda.synchronize()
"""


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

    lines: list[str] = []
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    sampler = open_sampler(device, lines.append)
    assert sampler is not None, lines
    import pynvml

    assert str(device.uuid) in pynvml.nvmlDeviceGetUUID(sampler._handle)
    busy(0.5)
    sampler.start()
    sampler.take()
    busy(1.5)
    found = sampler.take()
    sampler.stop()
    print(found, lines)
    assert lines == []
    assert set(found) == {
        *("power_w", "sm_clock_mhz", "sm_clock_min_mhz", "memory_clock_mhz", "memory_clock_min_mhz"),
        *("temperature_max_c", "throttle_reasons"),
    }
    limit_w = pynvml.nvmlDeviceGetEnforcedPowerLimit(sampler._handle) / 1000
    assert 0.3 * limit_w < found["power_w"] < 1.1 * limit_w
    assert 500 < found["sm_clock_min_mhz"] <= found["sm_clock_mhz"] < 4000
    assert 20 < found["temperature_max_c"] < 100


def test_the_matrix_rate_leaves_nothing_behind() -> None:
    import torch

    from nemo_bench.training.matrix_rate import gpu_matrix_rate

    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    rates = [gpu_matrix_rate(0) for _ in range(2)]
    print(rates)
    assert rates[0] > 50 and rates[1] == pytest.approx(rates[0], rel=0.1)
    # cuBLAS keeps its workspace, which the training takes over
    assert torch.cuda.memory_allocated() - before < 128 << 20


def test_this_gpu_is_accepted(cfg: TrainConfig) -> None:
    from nemo_bench.training.gpu import check_gpu

    check_gpu(cfg, 0)


def test_out_of_memory(cfg: TrainConfig) -> None:
    import torch

    with pytest.raises(torch.OutOfMemoryError) as error:
        torch.empty(1 << 42, dtype=torch.uint8, device="cuda")
    text = "\n".join(explain(cfg, f"OutOfMemoryError: {error.value}", {}) or [])
    print(text)
    for part in (
        "asked for 4096.00 GiB",
        "total capacity of",
        " is free",
        "allocated by PyTorch",
        "needed by this config",
    ):
        assert part in text


@pytest.mark.skipif(count_gpus() < 2, reason="needs two GPUs")
def test_a_collective_that_a_rank_never_joins(tmp_path: Path, cfg: TrainConfig) -> None:
    cfg.trainer.devices, cfg.stage_path = 2, str(tmp_path)
    text = OmegaConf.to_yaml(OmegaConf.structured(cfg))
    record.RunFolder(tmp_path).create(config_yaml=text, command=["python", "train.py"], overrides=[])
    ranks, port = [], str(processes.free_port())
    for rank in range(2):
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        with open(record.RunFolder(tmp_path).log(rank), "wb") as log:
            ranks.append(
                subprocess.Popen(
                    [sys.executable, "-c", STUCK],
                    env={**os.environ, **place},
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        code = ranks[0].wait(timeout=300)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert code == -signal.SIGABRT, record.RunFolder(tmp_path).log(0).read_text()[-4000:]
    message = point.record_failure(cfg, record.RunFolder(tmp_path), processes.Outcome(0, code, seen_at=time.time()))
    print(message)
    assert message.startswith(
        "rank 0 of 2 failed: killed by SIGABRT: NCCL time-out: ALLREDUCE of 1,024 elements (number "
    )
    assert "did not end within 10 s on rank 0\n  not reported by rank 1, for which" in message
    assert "rank1.out ends: rank 1 reads shard 7" in message
