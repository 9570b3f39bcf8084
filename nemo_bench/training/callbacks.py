"""What is written down while the model trains: a line per step into the run record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from nemo.utils.exp_manager import TimingCallback

from nemo_bench.config import TrainConfig
from nemo_bench.record.folder import EventLog, RunFolder, StepLog
from nemo_bench.report.numbers import rates
from nemo_bench.training.telemetry import STEP_TIMING, RankTelemetry


class StepRecorder(pl.Callback):
    """Writes each step's loss, time, rates and device measurements to `steps.jsonl`, on global rank 0.

    Loss and step time are NeMo's own (`reduced_train_loss`, TimingCallback), in full precision; the lines that NeMo
    prints, with four digits, stay in the rank's log. `step` counts from 0, as NeMo's `global_step` does there.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        timing: TimingCallback,
        telemetry: RankTelemetry,
        run_dir: Path,
        events: EventLog,
    ) -> None:
        self.cfg, self.timing, self.telemetry = cfg, timing, telemetry
        self.run_dir, self.steps, self.events = run_dir, StepLog(RunFolder(run_dir)), events

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.events.write("training", first_step=trainer.global_step)
        # By now every rank has measured its peak, where it is not a published one.
        self.rates = rates(self.cfg, [float(peak["tflops"]) for peak in RunFolder(self.run_dir).peaks()])

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        metrics = trainer.callback_metrics
        step = trainer.global_step - 1  # Lightning has counted this one already
        batch_size = self.cfg.model.global_batch_size
        seconds = float(self.timing.timer[STEP_TIMING])
        row: dict[str, Any] = {
            "step": step,
            "loss": float(metrics["reduced_train_loss"]),
            "train_step_timing_s": seconds,
            "consumed_samples": (step + 1) * batch_size,
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
        }
        if "grad_norm" in metrics:
            row["grad_norm"] = float(metrics["grad_norm"])
        self.steps.write({**row, **self.rates.at(seconds), **self.telemetry.step})

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
