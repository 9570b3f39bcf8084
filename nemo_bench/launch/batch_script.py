"""One benchmark point as one Slurm job: a script that starts the ranks with srun, to be read and run again by hand."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from nemo_bench.cluster import slurm
from nemo_bench.config import TrainConfig
from nemo_bench.entrypoints import entrypoint_of
from nemo_bench.project import PROJECT, python_path

# As NVIDIA's NeMo-Run recipes do it, once a node; a node without sudo goes on without.
VBOOST = "srun --ntasks={} --ntasks-per-node=1 sudo nvidia-smi boost-slider --vboost 1"

# What makes a rank's command of the configuration, the folder and the interpreter.
RankCommand = Callable[[TrainConfig, Path, str], list[str]]


def batch_script(cfg: TrainConfig, run_dir: Path, other: RankCommand | None = None) -> str:
    """Return the whole sbatch script of one point; of a machine check with its command, whose log is the job's own."""
    # Without checkpoints a requeued run would only start over.
    checkpoints = cfg.checkpoint.every_n_steps is not None
    vboost = [VBOOST.format(cfg.trainer.num_nodes)] if cfg.cluster.vboost else []
    return slurm.batch_script(
        replace(cfg.cluster, setup=[*vboost, *cfg.cluster.setup]),
        # Never `bash` or `interactive`, which Lightning takes for a shell.
        name=f"nemo-bench-{'check' if other else f'{cfg.model.name}-{cfg.precision.name}'}-{cfg.world_size}gpu",
        folder=run_dir,
        command=_srun_command(cfg, run_dir, other),
        environment=rank_environment(cfg),
        nodes=cfg.trainer.num_nodes,
        ntasks_per_node=cfg.trainer.devices,
        requeue=checkpoints,
        signal=f"USR1@{cfg.cluster.signal_s}" if checkpoints else None,
        template="launch/point.sbatch.j2",
    )


def _srun_command(cfg: TrainConfig, run_dir: Path, other: RankCommand | None) -> list[str]:
    """Return the srun line: one task a rank, all ended when one fails."""
    c, entrypoint = cfg.cluster, entrypoint_of(cfg)
    command = [
        "srun",
        "--kill-on-bad-exit=1",
        # Named here too: sbatch's environment carries them, but a user's srun settings may not override them.
        f"--nodes={cfg.trainer.num_nodes}",
        f"--ntasks={cfg.world_size}",
        f"--ntasks-per-node={cfg.trainer.devices}",
        *([] if other else [f"--output={slurm.literal(run_dir)}/rank%t.out"]),
        "--open-mode=append",
        "--unbuffered",
        *entrypoint.srun_options(cfg),
    ]
    if c.cpus_per_task is not None:
        command.append(f"--cpus-per-task={c.cpus_per_task}")  # srun does not inherit it
    if c.container is not None:
        mounts = [f"{path}:{path}" for path in _mounted_paths(cfg)] + list(c.container.mounts)
        command += [f"--container-image={c.container.image}", f"--container-mounts={','.join(mounts)}"]
        command += ["--container-writable"] if c.container.writable else []
        command += [] if c.container.mount_home else ["--no-container-mount-home"]
        # By default the image's own values win over those of the job.
        command.append(f"--container-env={','.join(rank_environment(cfg))}")
    bind = []
    if c.numa_gpus is not None:
        node = f"node=$((SLURM_LOCALID / {c.numa_gpus}))"
        bind = ["bash", "-c", f'{node}; exec numactl --cpunodebind=$node --membind=$node "$@"', "bash"]
    python = sys.executable if c.container is None else c.container.python
    return [*command, *c.srun_args, *bind, *(other or entrypoint.rank_command)(cfg, run_dir, python)]


def _mounted_paths(cfg: TrainConfig) -> list[str]:
    """Return the stage folder, the project, and the paths of the configuration outside both."""
    paths = [cfg.stage_path, str(PROJECT)]
    data, checkpoint = cfg.data, cfg.checkpoint
    named = [data.folder, data.tokenizer, *(str(Path(prefix).parent) for prefix in data.paths)]
    for path in [*named, checkpoint.resume_from, checkpoint.weights_from]:
        if path is not None and not any(Path(path).is_relative_to(mounted) for mounted in paths):
            paths.append(path)
    return paths


def rank_environment(cfg: TrainConfig, exported: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of every rank, without what Slurm sets; what a user exports wins over the recipe's."""
    entrypoint, exported = entrypoint_of(cfg), exported or {}
    path = {} if entrypoint.keeps_image_pythonpath(cfg) else {"PYTHONPATH": python_path(exported.get("PYTHONPATH"))}
    # Unbuffered: a killed rank's log holds its last lines.
    return {**entrypoint.environment(cfg), **exported, **cfg.cluster.env, **path, "PYTHONUNBUFFERED": "1"}
