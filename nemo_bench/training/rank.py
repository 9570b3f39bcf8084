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
from nemo_bench.record.folder import CONFIG, REQUEUE, EventLog, RunFolder
from nemo_bench.record.node import write_node
from nemo_bench.training import preemption


def main(run_dir: Path) -> None:
    """Train as `run_dir/config.yaml` says; an exception ends in this rank's error file and exit status 1."""
    _take_place_from_slurm()
    run, rank = RunFolder(run_dir), int(os.environ["RANK"])
    events = EventLog(run, enabled=rank == 0)
    try:
        cfg = load(run_dir / CONFIG)
        # Without checkpoints there is nothing to save, and a signal ends the rank as it does everywhere.
        saves = cfg.cluster.scheduler == "slurm" and cfg.checkpoint.every_n_steps is not None
        if saves:
            preemption.listen()
        # After listen(): what is blocked stays blocked in nsys, which Slurm's warning would end.
        nsys.wrap(cfg.profile, run_dir, rank)
        lifeline.watch(run.set_killed_with_launcher)
        if rank == 0:
            write_node(run_dir)
        events.write("importing")
        train(cfg, run, rank, events)
        if saves:
            # Python would ask data loaders to end by SIGTERM and wait; they do not hear it. They end with this process.
            _leave(0)
    except BaseException as error:
        with contextlib.suppress(OSError):  # a full disk: the launching process looks for that itself
            if isinstance(error, BenchError):
                print(error)
            else:
                traceback.print_exc()
            run.write_rank_error(rank, error)
        # Another rank may wait in a collective for this one: no destructor that would wait too.
        _leave(1)


def _leave(status: int) -> None:
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def _take_place_from_slurm() -> None:
    """Set torch's variables from those in which srun tells a task its place."""
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


def train(cfg: TrainConfig, run: RunFolder, rank: int, events: EventLog) -> None:
    """Check the device, import NeMo with the patches that `cfg` needs, measure the matrix rate, and train."""
    local_rank = int(os.environ["LOCAL_RANK"])
    if cfg.gpu.device == "cuda":
        from nemo_bench.training.gpu import check_gpu

        # Before NeMo: its imports take longer, and Transformer Engine's would fail first.
        check_gpu(cfg, local_rank)
    from nemo_bench.training import patches
    from nemo_bench.training.matrix_rate import cpu_matrix_rate, gpu_matrix_rate

    patches.before_imports(cfg)
    # About 20 s on a CPU: torch, Transformer Engine, megatron-core, Lightning and NeMo.
    from nemo_bench.training.pretrain import pretrain

    patches.after_imports(cfg)
    events.write("building")
    if cfg.gpu.peak_tflops.get(cfg.precision.name) is None:
        run.write_peak(rank, cpu_matrix_rate(cfg.precision.name))
    matrix_tflops = gpu_matrix_rate(local_rank) if cfg.gpu.device == "cuda" else None
    pretrain(cfg, run.path, rank, events, matrix_tflops)
    events.write("requeue" if (run.path / REQUEUE).exists() else "done")


if __name__ == "__main__":
    # The guard matters: saving a checkpoint spawns a process that imports this file again.
    main(Path(sys.argv[1]))
