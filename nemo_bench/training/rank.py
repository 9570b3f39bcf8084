"""One rank of a run: `python -m nemo_bench.training.rank RUN_FOLDER`, with its place in RANK, LOCAL_RANK, …

Everything it needs is in the run folder (config.yaml); everything it has to say goes there.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from nemo_bench.cluster import lifeline, nsys
from nemo_bench.config import TrainConfig, load
from nemo_bench.errors import BenchError
from nemo_bench.record import folder as record
from nemo_bench.record.node import write_node
from nemo_bench.training import preemption_signal


def main(run_dir: Path) -> None:
    """Trains as `run_dir/config.yaml` says; an exception ends in this rank's error file and exit status 1."""
    _take_place_from_slurm()
    rank = int(os.environ["RANK"])
    events = record.EventLog(record.RunFolder(run_dir), enabled=rank == 0)
    try:
        cfg = load(run_dir / record.CONFIG)
        # Without checkpoints there is nothing to save, and a signal ends the rank as it does everywhere.
        saves = cfg.cluster.scheduler == "slurm" and cfg.checkpoint.every_n_steps is not None
        if saves:
            preemption_signal.listen()
        # After listen(): what is blocked stays blocked in nsys, which Slurm's warning would end.
        nsys.wrap(cfg.profile, run_dir, rank)
        lifeline.watch(lambda: record.RunFolder(run_dir).set_killed_with_launcher())
        if rank == 0:
            write_node(run_dir)
        events.write("importing")
        train(cfg, run_dir, rank, events)
        if saves:
            # Python would ask data loaders to end by SIGTERM and wait; they do not hear it. They end with this process.
            _leave(0)
    except BaseException as error:
        with contextlib.suppress(OSError):  # a full disk: the launching process looks for that itself
            if isinstance(error, BenchError):
                print(error)
            else:
                traceback.print_exc()
            record.RunFolder(run_dir).write_rank_error(rank, error)
        # Another rank may wait in a collective for this one: no destructor that would wait too.
        _leave(1)


def _leave(status: int) -> None:
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def _take_place_from_slurm() -> None:
    """srun tells a task its place in Slurm's own variables; the rest of the stack reads torch's."""
    if "RANK" in os.environ:
        return
    names = {
        "RANK": "SLURM_PROCID",
        "LOCAL_RANK": "SLURM_LOCALID",
        "NODE_RANK": "SLURM_NODEID",
        "WORLD_SIZE": "SLURM_NTASKS",
        "LOCAL_WORLD_SIZE": "SLURM_NTASKS_PER_NODE",
    }
    os.environ.update({ours: os.environ[slurms] for ours, slurms in names.items()})


def train(cfg: TrainConfig, run_dir: Path, rank: int, events: record.EventLog) -> None:
    """Builds model, data, optimizer and trainer, and runs NeMo's `llm.pretrain`."""
    if cfg.gpu.device == "cuda":
        from nemo_bench.training.gpu_check import check_gpu

        # Ahead of NeMo: its imports take longer, and Transformer Engine's would fail first.
        check_gpu(cfg, int(os.environ["LOCAL_RANK"]))
    if cfg.gpu.device == "cpu":
        from nemo_bench.training import cpu_device

        cpu_device.install()
    elif cfg.model.gradient_accumulation_fusion:
        from nemo_bench.training import weight_gradient

        weight_gradient.install()

    # About 20 s on a CPU: torch, Transformer Engine, megatron-core, Lightning and NeMo.
    from nemo import lightning as nl
    from nemo.collections import llm
    from nemo.lightning.pytorch.callbacks.garbage_collection import GarbageCollectionCallback

    from nemo_bench.training.callbacks import StepRecorder, build_timing
    from nemo_bench.training.checkpoint import build_checkpoint_callback, build_resume
    from nemo_bench.training.data import build_data, build_tokenizer
    from nemo_bench.training.model import build_model
    from nemo_bench.training.optimizer import build_optimizer
    from nemo_bench.training.preemption import CheckpointOnSignal
    from nemo_bench.training.profiling import build_profiling
    from nemo_bench.training.telemetry import RankTelemetry
    from nemo_bench.training.trainer import build_strategy, build_trainer

    if cfg.gpu.device == "cpu":
        cpu_device.install_for_checkpoints()

    if cfg.precision.fp8_param_gather:
        from nemo_bench.training import fp8_weights

        fp8_weights.install()
    if cfg.gpu.device == "cuda" and cfg.model.bias_activation_fusion:
        from nemo_bench.training import swiglu

        swiglu.install()
    if cfg.precision_aware_optimizer and {cfg.model.optim.exp_avg_dtype, cfg.model.optim.exp_avg_sq_dtype} != {"fp32"}:
        from nemo_bench.training import adam_memory

        adam_memory.install()

    events.write("building")
    if cfg.gpu.peak_tflops.get(cfg.precision.name) is None:
        from nemo_bench.training.peak import measure_peak

        record.RunFolder(run_dir).write_peak(rank, measure_peak(cfg.precision.name).as_dict())
    matrix_tflops = None
    if cfg.gpu.device == "cuda":
        from nemo_bench.training.peak import measure_gpu_rate

        matrix_tflops = measure_gpu_rate(int(os.environ["LOCAL_RANK"]))

    tokenizer = build_tokenizer(cfg)
    timing = build_timing(cfg)
    telemetry = RankTelemetry(cfg, run_dir, rank, timing, matrix_tflops)
    callbacks: list[Any] = [
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
    strategy = build_strategy(cfg)
    if cfg.gpu.device == "cpu":
        # NeMo's ProgressPrinter reads Megatron's timers on rank 0 alone, which all-gathers: with gloo the next
        # collective then never ends.
        strategy.timers = None
    trainer = build_trainer(cfg, callbacks, strategy)
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
    events.write("requeue" if (run_dir / record.REQUEUE).exists() else "done")


if __name__ == "__main__":
    # The guard matters: saving a checkpoint spawns a process that imports this file again.
    main(Path(sys.argv[1]))
