"""Checkpoints of a run: written every N steps and when Slurm ends it, read to continue it or for its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from nemo import lightning as nl

from nemo_bench.config import TrainConfig
from nemo_bench.record.folder import CHECKPOINTS, REQUEUE, RunFolder
from nemo_bench.training import preemption


def build_checkpoint_callback(cfg: TrainConfig, run_dir: Path) -> Any | None:
    """Return NeMo's ModelCheckpoint for `checkpoint.every_n_steps`, or None where none is asked for."""
    if cfg.checkpoint.every_n_steps is None:
        return None
    return nl.ModelCheckpoint(
        dirpath=str(run_dir / CHECKPOINTS),
        filename="{step}",  # step=9: the last step that is in it, counted as in steps.jsonl
        monitor=None,
        every_n_train_steps=cfg.checkpoint.every_n_steps,
        save_top_k=-1,  # all
        save_last=False,
        save_optim_on_train_end=True,
        always_save_context=False,
        save_context_on_train_end=False,
    )


def build_resume(cfg: TrainConfig, run_dir: Path) -> nl.AutoResume | None:
    """Return how to start from a checkpoint, or None to start afresh. A requeued job goes on from its own last one."""
    resumed = RunFolder(run_dir).last_checkpoint() or cfg.checkpoint.resume_from
    chosen = resumed or cfg.checkpoint.weights_from
    if chosen is None:
        return None
    path = str(RunFolder(Path(chosen)).last_checkpoint())
    if resumed is not None:
        return _Resume(resume_from_path=path)
    return nl.AutoResume(restore_config=nl.RestoreConfig(path=path, load_optim_state=False, load_artifacts=False))


class _Resume(nl.AutoResume):
    """Need no checkpoint callback, unlike NeMo's: a resumed run may well write no checkpoints itself."""

    def setup(self, trainer: Any, model: Any = None) -> None:
        trainer.ckpt_path = self.get_trainer_ckpt_path(model)


class CheckpointOnSignal(pl.Callback):
    """Save a checkpoint after the step in which Slurm has warned any rank, ask for a requeue, and stop."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        # All ranks must agree on the step: a checkpoint is a collective.
        warned = torch.tensor(int(preemption.received.is_set()), device=trainer.strategy.root_device)
        torch.distributed.all_reduce(warned, op=torch.distributed.ReduceOp.MAX)
        if not warned.item() or trainer.global_step >= trainer.max_steps:
            return
        checkpoint = self.run_dir / CHECKPOINTS / f"step={trainer.global_step - 1}"
        if not checkpoint.exists():
            trainer.checkpoint_callback._save_checkpoint(trainer, str(checkpoint))
        if trainer.is_global_zero:
            (self.run_dir / REQUEUE).touch()
        trainer.limit_val_batches = 0  # Lightning would validate before it stops, and time is short
        trainer.should_stop = True
