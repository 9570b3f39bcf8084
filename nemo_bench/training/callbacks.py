"""What is recorded while the model trains: a line a step, and after the last one what every rank's device did."""

from __future__ import annotations

import os
import socket
from collections import deque
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from nemo_bench.config import TrainConfig
from nemo_bench.record.folder import EventLog, RunFolder
from nemo_bench.record.ranks import gathered, write_ranks
from nemo_bench.report.numbers import rates_of_step
from nemo_bench.training.gpu import GpuSampler, open_sampler

STEP_TIMING = "train_step_timing"
# The summary is of the last so many steps: a longer run does not grow.
MAX_STEPS = 10_000


class StepRecorder(pl.Callback):
    """Write each step's loss, time, rates and device measurements to `steps.jsonl`, on global rank 0.

    Loss and step time are NeMo's own (`reduced_train_loss`, TimingCallback), in full precision; `step` counts from 0.
    """

    def __init__(
        self, cfg: TrainConfig, timing: Any, telemetry: RankTelemetry, run_dir: Path, events: EventLog
    ) -> None:
        self.cfg, self.timing, self.telemetry = cfg, timing, telemetry
        self.run, self.events = RunFolder(run_dir), events

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.events.write("training", first_step=trainer.global_step)
        # By now every rank has measured its peak, where it is not a published one.
        self.peaks = [float(peak["tflops"]) for peak in self.run.peaks()]

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        metrics = trainer.callback_metrics
        step = trainer.global_step - 1  # Lightning has counted this one already
        seconds = float(self.timing.timer[STEP_TIMING])
        row: dict[str, Any] = {
            "step": step,
            "loss": float(metrics["reduced_train_loss"]),
            "train_step_timing_s": seconds,
            "consumed_samples": (step + 1) * self.cfg.model.global_batch_size,
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
        }
        if "grad_norm" in metrics:
            row["grad_norm"] = float(metrics["grad_norm"])
        self.run.write_step({**row, **rates_of_step(self.cfg, self.peaks, seconds), **self.telemetry.step})

    def on_validation_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.events.write("validation", after_step=trainer.global_step - 1)

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        loss = trainer.callback_metrics.get("val_loss")
        self.events.write("validated", val_loss=None if loss is None else float(loss))

    def on_save_checkpoint(self, trainer: pl.Trainer, *_: Any) -> None:
        self.events.write("checkpoint", after_step=trainer.global_step - 1)


class RankTelemetry(pl.Callback):
    """Measure every step on every rank; after the last, rank 0 writes what all of them measured to `ranks.json`.

    Stands behind NeMo's TimingCallback, whose step time it reads, and ahead of StepRecorder, which reads `step`.
    """

    def __init__(self, cfg: TrainConfig, run_dir: Path, rank: int, timing: Any, matrix_tflops: float | None) -> None:
        # Nothing that cannot be copied (NeMo copies callbacks): the thread begins with the training.
        self.on_gpu, self.run_dir, self.rank, self.timing = cfg.gpu.device == "cuda", run_dir, rank, timing
        self.matrix_tflops = matrix_tflops
        self.sampler: GpuSampler | None = None
        self.rows: deque[dict[str, Any]] = deque(maxlen=MAX_STEPS)
        self.step: dict[str, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.on_gpu:
            self.sampler = open_sampler(torch.cuda.get_device_properties(torch.cuda.current_device()), _log)
        if self.sampler is not None:
            self.sampler.start()

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.sampler is not None:
            self.sampler.take()  # between steps: validation, a checkpoint

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.step = {}
        if self.on_gpu:
            stats = torch.cuda.memory_stats()
            self.step["peak_memory_gib"] = stats["allocated_bytes.all.peak"] / 2**30
            self.step["reserved_memory_gib"] = stats["reserved_bytes.all.current"] / 2**30
        if self.sampler is not None:
            self.step |= self.sampler.take()
        self.rows.append({"train_step_timing_s": float(self.timing.timer[STEP_TIMING]), **self.step})

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._stop()
        rank: dict[str, Any] = {"rank": self.rank, "host": socket.gethostname()}
        if self.on_gpu:
            properties = torch.cuda.get_device_properties(torch.cuda.current_device())
            rank |= {"local_rank": int(os.environ["LOCAL_RANK"]), "gpu_name": properties.name}
            rank["gpu_uuid"] = f"GPU-{str(properties.uuid).removeprefix('GPU-')}"
        if self.matrix_tflops is not None:
            rank["matrix_tflops"] = round(self.matrix_tflops, 1)
        ranks: list[Any] = [None] * torch.distributed.get_world_size()
        try:
            torch.distributed.all_gather_object(ranks, rank | gathered(list(self.rows)))
            if self.rank == 0:
                write_ranks(self.run_dir, ranks)
        except (RuntimeError, OSError) as error:  # the training is done, and its numbers are safe
            _log(f"no ranks.json: {type(error).__name__}: {error}")

    def on_exception(self, trainer: pl.Trainer, *_: Any) -> None:
        self._stop()

    def _stop(self) -> None:
        if self.sampler is not None:
            self.sampler.stop()
            self.sampler = None


def _log(text: str) -> None:
    print(f"nemo_bench: {text}", flush=True)
