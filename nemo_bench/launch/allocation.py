"""A point inside the Slurm job that this process is part of, as NVIDIA's recipe starts its own: `sbatch launch.sh`."""

from __future__ import annotations

import os
import subprocess
import sys

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from nemo_bench.checks.problems import problems
from nemo_bench.cluster import jobs
from nemo_bench.cluster.slurm import SCRIPT
from nemo_bench.config import Launch, TrainConfig, typed
from nemo_bench.errors import BenchError, ConfigurationRefused, RunFailed
from nemo_bench.launch.point import prepare_data, run_point
from nemo_bench.launch.submission import submit_run


def start_point(raw: DictConfig) -> None:
    """Run a cluster's point in this process's Slurm allocation, if there is one; else `run_point`."""
    cfg = typed(raw)
    if cfg.launch is Launch.dry or cfg.cluster.scheduler != "slurm" or "SLURM_JOB_ID" not in os.environ:
        run_point(raw)
    else:
        for _ in range(cfg.repeats):
            _run_in_allocation(cfg)


def _run_in_allocation(cfg: TrainConfig) -> None:
    """Run the point's batch script here: a job inside a job is never submitted."""
    if broken := problems(cfg):
        raise ConfigurationRefused(broken)
    nodes, needed = int(os.environ.get("SLURM_JOB_NUM_NODES", 1)), cfg.trainer.num_nodes
    if nodes < needed:
        raise BenchError(f"this allocation has {nodes} nodes, and the point needs {needed}: sbatch -N {needed}")
    overrides = list(HydraConfig.get().overrides.task)
    job = submit_run(prepare_data(cfg), ["python", *sys.argv], overrides, submit=jobs.adopt)
    print(f"run folder: {job.folder}", flush=True)
    if status := subprocess.call(["bash", str(job.folder / SCRIPT)]):
        raise RunFailed(f"the point failed: python jobs.py log {job.job_id}", status)
