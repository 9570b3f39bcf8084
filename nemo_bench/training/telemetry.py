"""What each rank measures beside the steps, and the summary of all ranks after the last one."""

from __future__ import annotations

import os
import socket
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch

from nemo_bench.config import TrainConfig
from nemo_bench.record.ranks import gathered, write_ranks
from nemo_bench.training.gpu_sampler import GpuSampler, open_sampler

if TYPE_CHECKING:
    from nemo.utils.exp_manager import TimingCallback

STEP_TIMING = "train_step_timing"
# The summary is of the last so many steps: a longer run does not grow.
MAX_STEPS = 10_000


def _log(text: str) -> None:
    print(f"nemo_bench: {text}", flush=True)


class RankTelemetry(pl.Callback):
    """Measures every step on every rank; after the last, rank 0 writes what all of them saw to `ranks.json`.

    Stands behind NeMo's TimingCallback, whose step time it reads, and ahead of StepRecorder, which reads `step`.
    """

    def __init__(
        self, cfg: TrainConfig, run_dir: Path, rank: int, timing: TimingCallback, matrix_tflops: float | None
    ) -> None:
        # Nothing that cannot be copied (NeMo copies callbacks): the thread begins with the training.
        self.cfg, self.run_dir, self.rank, self.timing = cfg, run_dir, rank, timing
        self.matrix_tflops = matrix_tflops
        self.sampler: GpuSampler | None = None
        self.rows: deque[dict[str, Any]] = deque(maxlen=MAX_STEPS)
        self.step: dict[str, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.cfg.gpu.device == "cuda":
            self.sampler = open_sampler(torch.cuda.get_device_properties(torch.cuda.current_device()), _log)
        if self.sampler is not None:
            self.sampler.start()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.sampler is not None:
            self.sampler.take()  # between steps: validation, a checkpoint

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.step = memory() if self.cfg.gpu.device == "cuda" else {}
        if self.sampler is not None:
            self.step |= self.sampler.take()
        self.rows.append({"train_step_timing_s": float(self.timing.timer[STEP_TIMING]), **self.step})

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()
        about: dict[str, Any] = {"rank": self.rank, "host": socket.gethostname()}
        if self.cfg.gpu.device == "cuda":
            properties = torch.cuda.get_device_properties(torch.cuda.current_device())
            about |= {"local_rank": int(os.environ["LOCAL_RANK"]), "gpu_name": properties.name}
            about["gpu_uuid"] = f"GPU-{str(properties.uuid).removeprefix('GPU-')}"
        if self.matrix_tflops is not None:
            about["matrix_tflops"] = round(self.matrix_tflops, 1)
        mine = about | gathered(list(self.rows))
        ranks: list[Any] = [None] * torch.distributed.get_world_size()
        try:
            torch.distributed.all_gather_object(ranks, mine)
            if self.rank == 0:
                write_ranks(self.run_dir, ranks)
        except (RuntimeError, OSError) as error:  # the training is done, and its numbers are safe
            _log(f"no ranks.json: {type(error).__name__}: {error}")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self.sampler is not None:
            self.sampler.stop()
            self.sampler = None


def memory() -> dict[str, float]:
    """The largest allocation so far, and what PyTorch holds of the GPU now, in GiB."""
    stats = torch.cuda.memory_stats()
    return {
        "peak_memory_gib": stats["allocated_bytes.all.peak"] / 2**30,
        "reserved_memory_gib": stats["reserved_bytes.all.current"] / 2**30,
    }
