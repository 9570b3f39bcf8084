"""Pre-training with NeMo 2: model, data, optimizer, trainer and callbacks of a configuration, and `llm.pretrain`.

Importing this module imports all that a rank needs: torch, megatron-core, Lightning and NeMo.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo import lightning as nl
from nemo.collections import llm
from nemo.lightning.pytorch.callbacks.garbage_collection import GarbageCollectionCallback
from nemo.utils.exp_manager import TimingCallback

from nemo_bench.config import TrainConfig
from nemo_bench.record.folder import EventLog
from nemo_bench.training.callbacks import RankTelemetry, StepRecorder
from nemo_bench.training.checkpoint import CheckpointOnSignal, build_checkpoint_callback, build_resume
from nemo_bench.training.data import build_data, build_tokenizer
from nemo_bench.training.model import build_model
from nemo_bench.training.profiling import build_profiling
from nemo_bench.training.trainer import build_optimizer, build_strategy, build_trainer


def pretrain(cfg: TrainConfig, run_dir: Path, rank: int, events: EventLog, matrix_tflops: float | None) -> None:
    """Train `cfg` to its last step, or until a preemption."""
    tokenizer = build_tokenizer(cfg)
    strategy = build_strategy(cfg)
    if cfg.gpu.device == "cpu":
        # NeMo's ProgressPrinter reads Megatron's timers on rank 0 alone, which all-gathers: with gloo the next
        # collective then never ends.
        strategy.timers = None
    trainer = build_trainer(cfg, _callbacks(cfg, run_dir, rank, events, matrix_tflops), strategy)
    llm.pretrain(
        model=build_model(cfg, tokenizer),
        data=build_data(cfg, tokenizer),
        trainer=trainer,
        log=nl.NeMoLogger(
            explicit_log_dir=str(run_dir / "nemo"),
            log_global_rank_0_only=True,
            ckpt=build_checkpoint_callback(cfg, run_dir),
            update_logger_directory=False,
        ),
        resume=build_resume(cfg, run_dir),
        optim=build_optimizer(cfg),
    )


def _callbacks(cfg: TrainConfig, run_dir: Path, rank: int, events: EventLog, matrix_tflops: float | None) -> list[Any]:
    timing = TimingCallback(timer_kwargs={"sync_cuda": cfg.gpu.device == "cuda"})  # as in the recipe
    telemetry = RankTelemetry(cfg, run_dir, rank, timing, matrix_tflops)
    callbacks = [
        timing,
        GarbageCollectionCallback(cfg.trainer.gc_interval, cfg.trainer.gc_interval),
        telemetry,  # ahead of a profiler, which takes its time to write
        *build_profiling(cfg, run_dir, rank, events),
    ]
    if rank == 0:
        callbacks.append(StepRecorder(cfg, timing, telemetry, run_dir, events))
    if cfg.cluster.scheduler == "slurm" and cfg.checkpoint.every_n_steps is not None:
        callbacks.append(CheckpointOnSignal(run_dir))
    if cfg.model.tp_comm_overlap and cfg.model.tensor_model_parallel_size > 1:
        from nemo_bench.training.tp_overlap import build_tp_comm_overlap

        callbacks.append(build_tp_comm_overlap(cfg))
    return callbacks
