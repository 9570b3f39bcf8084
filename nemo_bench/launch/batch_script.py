"""One benchmark point as one Slurm job: the request and the batch script.

The request comes from the point's own configuration. The script is written out whole, so that what runs can be read in
the run folder and run again by hand. It starts the ranks with srun; they find everything else in the run folder.
Nothing is pickled: the interpreter on the nodes (a container's) may be another one than this.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from nemo_bench.cluster import slurm
from nemo_bench.config import TrainConfig
from nemo_bench.entrypoints import entrypoint_of
from nemo_bench.project import PROJECT
from nemo_bench.record.folder import EXIT, REQUEUE


def job_name(cfg: TrainConfig) -> str:
    """Never `bash` or `interactive`, which Lightning takes for a shell."""
    return f"nemo-bench-{cfg.model.name}-{cfg.precision.name}-{cfg.world_size}gpu"


def sbatch_options(cfg: TrainConfig, run_dir: Path) -> dict[str, Any]:
    """sbatch's long options and their values (True: no value) for this point, in a fixed order."""
    # Without checkpoints there is nothing to go on from: a requeued run would only start over.
    signal = f"USR1@{cfg.cluster.signal_s}" if _checkpoints(cfg) else None
    return slurm.sbatch_options(
        cfg.cluster,
        name=job_name(cfg),
        nodes=cfg.trainer.num_nodes,
        ntasks_per_node=cfg.trainer.devices,
        folder=run_dir,
        requeue=_checkpoints(cfg),
        signal=signal,
    )


def _checkpoints(cfg: TrainConfig) -> bool:
    return cfg.checkpoint.every_n_steps is not None


def srun_command(cfg: TrainConfig, run_dir: Path) -> list[str]:
    """The srun line: one task a rank, all ended when one fails."""
    c = cfg.cluster
    command = [
        "srun",
        "--kill-on-bad-exit=1",
        # Named here too: sbatch's environment carries them, but a user's srun settings may not override them.
        f"--nodes={cfg.trainer.num_nodes}",
        f"--ntasks={cfg.world_size}",
        f"--ntasks-per-node={cfg.trainer.devices}",
        f"--output={run_dir}/rank%t.out",
        "--open-mode=append",
        "--unbuffered",
        *entrypoint_of(cfg).srun_options(cfg),
    ]
    if c.cpus_per_task is not None:
        command.append(f"--cpus-per-task={c.cpus_per_task}")  # srun does not inherit it
    python = sys.executable
    if c.container is not None:
        python = c.container.python
        mounts = [f"{path}:{path}" for path in _mounted_paths(cfg)] + list(c.container.mounts)
        command += [f"--container-image={c.container.image}", f"--container-mounts={','.join(mounts)}"]
        if c.container.writable:
            command.append("--container-writable")
        if not c.container.mount_home:
            command.append("--no-container-mount-home")
        # By default the image's own values win over those of the job.
        command.append(f"--container-env={','.join(rank_environment(cfg))}")
    return [*command, *c.srun_args, *entrypoint_of(cfg).rank_command(cfg, run_dir, python)]


def _mounted_paths(cfg: TrainConfig) -> list[str]:
    """The stage folder, the project, and what the configuration names outside of both."""
    paths = [cfg.stage_path, str(PROJECT)]
    data, checkpoint = cfg.data, cfg.checkpoint
    named = [data.folder, data.tokenizer, *(str(Path(prefix).parent) for prefix in data.paths)]
    for path in [*named, checkpoint.resume_from, checkpoint.weights_from]:
        if path is not None and not any(Path(path).is_relative_to(mounted) for mounted in paths):
            paths.append(path)
    return paths


def rank_environment(cfg: TrainConfig) -> dict[str, str]:
    """Environment of every rank, besides what Slurm sets."""
    path = {} if entrypoint_of(cfg).keeps_image_pythonpath(cfg) else {"PYTHONPATH": str(PROJECT)}
    return {**entrypoint_of(cfg).environment(cfg), **cfg.cluster.env, **path, "PYTHONUNBUFFERED": "1"}


def batch_script(cfg: TrainConfig, run_dir: Path) -> str:
    """The whole sbatch script of one point."""
    exports = [f"export {name}={shlex.quote(value)}" for name, value in rank_environment(cfg).items()]
    run = shlex.quote(str(run_dir))
    lines = [
        "#!/bin/bash",
        *slurm.sbatch_lines(sbatch_options(cfg, run_dir)),
        "",
        f"RUN={run}",
        "# Left by an earlier start, where this one is a requeue.",
        f'rm -f "$RUN/{REQUEUE}" "$RUN/{EXIT}" "$RUN"/rank*.error.json',
        "",
        "# The ranks meet at the first node. A port of the job's own: nodes may be shared.",
        'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))",
        "# The ranks take their places from srun, whatever the submitting shell had.",
        "unset RANK LOCAL_RANK NODE_RANK WORLD_SIZE LOCAL_WORLD_SIZE",
        "export MASTER_ADDR MASTER_PORT",
        *exports,
        *cfg.cluster.setup,
        "",
        shlex.join(srun_command(cfg, run_dir)),
        "status=$?",
        "",
        "# Asked for by rank 0 after its last checkpoint; done here, since a container has no scontrol. A job that is",
        "# being cancelled is no longer RUNNING, and stays cancelled.",
        f'if [ -e "$RUN/{REQUEUE}" ] && scontrol show job "$SLURM_JOB_ID" | grep -q "JobState=RUNNING" &&',
        '  scontrol requeue "$SLURM_JOB_ID"; then exit 0; fi',
        *slurm.record_status("RUN"),
    ]
    return "\n".join(lines)
