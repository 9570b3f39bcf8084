"""What a rank refuses of a GPU; torch's questions to the driver are answered here."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nemo_bench.cluster.processes import Outcome
from nemo_bench.config import TrainConfig, load
from nemo_bench.errors import BenchError
from nemo_bench.launch import point
from nemo_bench.record import folder as record

torch = pytest.importorskip("torch")

RUNS = Path(__file__).parents[1] / "runs/nemo-2.7.3"
Gpu = tuple[str, tuple[int, int]]
A100, L40, H100, B200 = ("A100", (8, 0)), ("L40", (8, 9)), ("H100", (9, 0)), ("B200", (10, 0))
CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


FP8, BF16 = (
    load(RUNS / run / "config.yaml") for run in ("fp8/70b/1/20261122-172139-8348", "bf16/70b/1/20261122-172402-5f1a")
)
Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Gives this machine a GPU of this kind, and a torch that was built so."""

    def has(gpu: Gpu, *, cuda: str | None = "13.0", built: list[str] = CUDA_13) -> None:
        monkeypatch.setattr(torch.cuda, "init", lambda: None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpu[0])
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: gpu[1])
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
        monkeypatch.setattr(torch.version, "cuda", cuda)

    return has


def refusal(cfg: TrainConfig, local_rank: int = 0) -> str:
    """Return why the GPU is refused; "" where it is accepted."""
    from nemo_bench.training.gpu import check_gpu

    try:
        check_gpu(cfg, local_rank)
    except BenchError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("gpu", "recipe", "cuda", "message"),
    [
        (A100, "", "13.0", ""),
        (A100, "delayed", "13.0", "fp8_recipe=delayed needs it (8.9 or later); use precision=bf16"),
        *((gpu, "delayed", "13.0", "") for gpu in (L40, H100, B200)),
        (L40, "blockwise", "13.0", "use precision.fp8_recipe=delayed or precision.fp8_recipe=tensorwise or precision"),
        (H100, "blockwise", "12.8", f"blockwise needs CUDA 12.9, and torch {torch.__version__} has 12.8"),
        *((H100, "blockwise", cuda, "") for cuda in ("12.9", "12.10", "13.0")),
        (H100, "", None, "is built without CUDA: install a CUDA build (pytorch.org), or choose gpu=cpu"),
    ],
)
def test_a_gpu_must_have_the_number_format(
    gpu: Gpu, recipe: str, cuda: str | None, message: str, machine: Machine
) -> None:
    machine(gpu, cuda=cuda)
    refused = refusal(replace(FP8, precision=replace(FP8.precision, fp8_recipe=recipe)) if recipe else BF16)
    assert message in refused and bool(message) == bool(refused)


@pytest.mark.parametrize(
    ("gpu", "built", "works"),
    [
        (H100, ["sm_80", "sm_90"], True),
        (L40, ["sm_80", "sm_90"], True),  # machine code of its generation
        (B200, ["sm_80", "sm_90"], False),
        (B200, ["sm_80", "compute_90"], True),  # PTX is translated
        (A100, ["sm_86", "sm_90"], False),
        (H100, ["sm_90a"], True),
        (H100, [], True),  # it does not say
    ],
)
def test_torch_must_hold_kernels_for_the_gpu(gpu: Gpu, built: list[str], works: bool, machine: Machine) -> None:
    machine(gpu, built=built)
    message = f"holds no kernels for {gpu[0]} (sm_{gpu[1][0]}{gpu[1][1]}), only for {', '.join(built)}: install"
    assert (message in refusal(BF16)) == (not works)


def test_a_rank_must_see_its_gpu(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    machine(H100)
    message = refusal(BF16, local_rank=3)
    for text in ("number 3 of its node, and sees 1 GPUs (CUDA_VISIBLE_DEVICES=3)", "trainer.devices=1"):
        assert text in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_rank_without_a_gpu_ends_with_one_message(tmp_path: Path) -> None:
    """The rank itself, as it is started, and the message that its launcher makes of it."""
    cfg, run = replace(FP8, stage_path=str(tmp_path)), record.RunFolder(tmp_path / "run")
    run.path.mkdir()
    text = OmegaConf.to_yaml(OmegaConf.structured(cfg))
    run.create(config_yaml=text, command=["python", "train.py"], overrides=[])
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "NODE_RANK": "0"}
    with open(run.log(0), "wb") as log:
        done = subprocess.run(
            [sys.executable, "-m", "nemo_bench.training.rank", str(run.path)],
            env={**os.environ, **place},
            cwd=Path(__file__).resolve().parents[2],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            timeout=120,
        )
    assert done.returncode == 1
    message = point.record_failure(cfg, run, Outcome(0, 1, seen_at=time.time()))
    printed = run.log(0).read_text()
    if torch.version.cuda is None:
        assert message.startswith("rank 0 of 1 failed: torch") and "is built without CUDA" in message
        assert "Traceback" not in message + printed
    else:
        assert "CUDA sees no GPU" in message or "driver is too old" in message
