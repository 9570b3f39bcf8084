"""One rank of a run: `python -m nemo_bench.training.rank RUN_FOLDER`, with its place in RANK, LOCAL_RANK, …"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from importlib import import_module
from pathlib import Path

from nemo_bench.cluster import nsys
from nemo_bench.cluster.processes import end_with_launcher
from nemo_bench.config import TrainConfig, load
from nemo_bench.errors import BenchError
from nemo_bench.files import write_json
from nemo_bench.record.folder import CONFIG, REQUEUE, RunFolder
from nemo_bench.record.node import cpu_wait_share, write_node
from nemo_bench.training import preemption

# torch's variables, and those in which srun tells a task its place.
_PLACE = {
    "RANK": "SLURM_PROCID",
    "LOCAL_RANK": "SLURM_LOCALID",
    "NODE_RANK": "SLURM_NODEID",
    "WORLD_SIZE": "SLURM_NTASKS",
    "LOCAL_WORLD_SIZE": "SLURM_NTASKS_PER_NODE",
}


def main(run_dir: Path) -> None:
    """Train as `run_dir/config.yaml` says; an exception ends in this rank's error file and exit status 1."""
    if "RANK" not in os.environ:
        os.environ.update({name: os.environ[slurms] for name, slurms in _PLACE.items()})
    run, rank = RunFolder(run_dir), int(os.environ["RANK"])
    try:
        cfg = load(run_dir / CONFIG)
        # NeMo tells every rank the loss, Megatron-Bridge only those of the last pipeline stage.
        records = rank == (int(os.environ["WORLD_SIZE"]) - 1 if cfg.entrypoint.stack == "megatron_bridge" else 0)
        # Without checkpoints there is nothing to save, and a signal ends the rank as it does everywhere.
        if cfg.cluster.scheduler == "slurm" and cfg.checkpoint.every_n_steps is not None:
            preemption.listen()
        # After listen(): what is blocked stays blocked in nsys, which Slurm's warning would end.
        nsys.wrap(cfg.profile, run_dir, rank)
        end_with_launcher()
        if rank == 0:
            write_node(run_dir)
        if records:
            run.write_event("importing")
        train(cfg, run, rank, records)
        if records:
            run.write_event("requeue" if (run_dir / REQUEUE).exists() else "done", cpu_wait_share=cpu_wait_share())
        status = 0
    except BaseException as error:
        with contextlib.suppress(OSError):  # a full disk: the launching process looks for that itself
            if isinstance(error, BenchError):
                print(error)
            else:
                traceback.print_exc()
            run.write_rank_error(rank, error)
        status = 1
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    # No destructors: another rank may wait in a collective for this one, and data loaders do not hear SIGTERM.
    os._exit(status)


def train(cfg: TrainConfig, run: RunFolder, rank: int, records: bool) -> None:
    """Check the device, import what trains, measure the matrix rate, and train; one rank records the run."""
    local_rank, on_gpu = int(os.environ["LOCAL_RANK"]), cfg.gpu.device == "cuda"
    if on_gpu:
        from nemo_bench.training.gpu import check_gpu

        # Before NeMo: its imports take longer, and Transformer Engine's would fail first.
        check_gpu(cfg, local_rank)
    from nemo_bench.training import incompatibilities, patches

    patches.install(cfg)
    incompatibilities.install(cfg.entrypoint.stack)
    # About 20 s on a CPU.
    stack = import_module(f"nemo_bench.training.{cfg.entrypoint.stack}")
    from nemo_bench.training.hooks import RankTelemetry, RunRecorder
    from nemo_bench.training.loggers import MetricsLogger
    from nemo_bench.training.matrix_rate import cpu_matrix_rate, gpu_matrix_rate
    from nemo_bench.training.peers import PeerWatch
    from nemo_bench.training.profiling import build_profiling

    if records:
        run.write_event("building")
    if cfg.gpu.peak_tflops.get(cfg.precision.name) is None:
        write_json(run.path / f"peak_rank{rank}.json", cpu_matrix_rate(cfg.precision.name))
    telemetry = RankTelemetry(cfg, run, rank, gpu_matrix_rate(local_rank) if on_gpu else None)
    # Telemetry stands ahead of a profiler, which takes its time to write.
    hooks = [telemetry, PeerWatch(cfg, run, rank, records, telemetry), *build_profiling(cfg, run.path, rank)]
    if records:
        recorder = RunRecorder(cfg, run, telemetry)
        hooks.append(recorder)
        if cfg.logger.kind != "none":
            hooks.append(MetricsLogger(cfg, recorder))
    stack.pretrain(cfg, run.path, hooks)


if __name__ == "__main__":
    # The guard matters: saving a checkpoint spawns a process that imports this file again.
    main(Path(sys.argv[1]))
