"""A last checkpoint when Slurm says that the job is preempted or will reach its time limit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from nemo_bench.record.folder import CHECKPOINTS, REQUEUE
from nemo_bench.training import preemption_signal


class CheckpointOnSignal(pl.Callback):
    """Saves a checkpoint after the step in which any rank was told, asks for a requeue, and stops.

    Not NeMo's PreemptionCallback: it saves only where `save_last` is on, and cannot ask for the requeue.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # All ranks must agree on the step: a checkpoint is a collective.
        told = torch.tensor(int(preemption_signal.received()), device=trainer.strategy.root_device)
        torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MAX)
        if not told.item() or trainer.global_step >= trainer.max_steps:
            return
        checkpoint = self.run_dir / CHECKPOINTS / f"step={trainer.global_step - 1}"
        if not checkpoint.exists():
            trainer.checkpoint_callback._save_checkpoint(trainer, str(checkpoint))
        if trainer.is_global_zero:
            (self.run_dir / REQUEUE).touch()
        trainer.limit_val_batches = 0  # Lightning would validate before it stops, and time is short
        trainer.should_stop = True
