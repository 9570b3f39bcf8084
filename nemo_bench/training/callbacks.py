"""What is written down while the model trains: a line per step into the run record."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from nemo.utils.exp_manager import TimingCallback

from nemo_bench.config import TrainConfig
from nemo_bench.results.record import EventLog, StepLog

STEP_TIMING = "train_step_timing"


class StepRecorder(pl.Callback):
    """Writes each step's loss, time and learning rate to `steps.jsonl`, on global rank 0.

    Loss and step time are NeMo's own (`reduced_train_loss`, TimingCallback), in full precision; the lines that NeMo
    prints, with four digits, stay in the rank's log. `step` counts from 0, as NeMo's `global_step` does there.
    """

    def __init__(self, cfg: TrainConfig, timing: TimingCallback, steps: StepLog, events: EventLog) -> None:
        self.cfg, self.timing, self.steps, self.events = cfg, timing, steps, events

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.events.write("training", first_step=trainer.global_step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        metrics = trainer.callback_metrics
        step = trainer.global_step - 1  # Lightning has counted this one already
        batch_size = self.cfg.model.global_batch_size
        row: dict[str, Any] = {
            "step": step,
            "loss": float(metrics["reduced_train_loss"]),
            "train_step_timing_s": float(self.timing.timer[STEP_TIMING]),
            "consumed_samples": (step + 1) * batch_size,
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
        }
        if "grad_norm" in metrics:
            row["grad_norm"] = float(metrics["grad_norm"])
        if torch.cuda.is_available():
            row["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.steps.write(row)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.events.write("validation", after_step=trainer.global_step - 1)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loss = trainer.callback_metrics.get("val_loss")
        self.events.write("validated", val_loss=None if loss is None else float(loss))

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
        self.events.write("checkpoint", after_step=trainer.global_step - 1)


def build_timing(cfg: TrainConfig) -> TimingCallback:
    """NeMo's step timer, synchronised with the device as in the recipe."""
    return TimingCallback(timer_kwargs={"sync_cuda": cfg.gpu.device == "cuda"})
