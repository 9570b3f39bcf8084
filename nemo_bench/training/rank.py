"""One rank of a run: `python -m nemo_bench.training.rank RUN_FOLDER`, with its place in RANK, LOCAL_RANK, …

Everything it needs is in the run folder (config.yaml); everything it has to say goes there.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from pathlib import Path

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
    """Checks the device, imports NeMo with what this device and configuration need, and trains."""
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
    from nemo_bench.training.pretrain import pretrain

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
    pretrain(cfg, run_dir, rank, events, matrix_tflops)
    events.write("requeue" if (run_dir / record.REQUEUE).exists() else "done")


if __name__ == "__main__":
    # The guard matters: saving a checkpoint spawns a process that imports this file again.
    main(Path(sys.argv[1]))
