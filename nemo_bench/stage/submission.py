"""`setup_stage.py hydra/launcher=submitit_slurm`: the same command as a job, for login nodes without enroot or room."""

from __future__ import annotations

import sys
from pathlib import Path

from nemo_bench.config import Launch, typed_as
from nemo_bench.errors import BenchError, RunFailed
from nemo_bench.launch import command_jobs
from nemo_bench.launch.slurm import PROJECT
from nemo_bench.launch.submission import Point, forget_sweep
from nemo_bench.results.record import tail
from nemo_bench.stage.config import StageConfig


def submit_stage(points: list[Point], *, sweep_dir: Path, wait: bool, to_slurm: bool) -> None:
    """Submits the command of each point, and follows the jobs to their end where `wait` is set.

    HF_TOKEN reaches the jobs in sbatch's environment; it is written nowhere.

    Raises:
        BenchError: it cannot be submitted, or the scheduler refuses.
        RunFailed: a job failed.
    """
    configs = [typed_as(StageConfig, point.config) for point in points]
    folders = [sweep_dir / str(number) for number in range(len(points))]
    commands = [
        [sys.executable, "-u", str(PROJECT / "setup_stage.py"), "cluster=local", *_of_the_stage(point.overrides)]
        for point in points
    ]
    dry = any(cfg.launch is Launch.dry for cfg in configs)
    try:
        for cfg in configs:
            command_jobs.require_slurm(cfg.cluster, to_slurm=to_slurm)
        if not dry:
            command_jobs.require_sbatch()
    except BenchError:
        forget_sweep(sweep_dir)
        raise
    if dry:
        forget_sweep(sweep_dir)
        for cfg, command, folder in zip(configs, commands, folders):
            command_jobs.show(cfg.cluster, _name(cfg), command, folder)
        print("launch=dry: nothing was submitted.")
        return
    jobs = []
    for cfg, command, folder in zip(configs, commands, folders):
        folder.mkdir(parents=True)
        jobs.append(command_jobs.submit(cfg.cluster, _name(cfg), command, folder))
        print(f"job {jobs[-1].job_id}: {_name(cfg)}, log {_log(jobs[-1])}", flush=True)
    if not wait:
        print("python setup_stage.py check says what is there")
        return
    command_jobs.follow(jobs, lambda: None)
    for job in jobs:
        print("\n".join(tail(_log(job), 20)))
    failed = [job for job in jobs if job.exit_code != 0]
    if failed:
        code = failed[0].exit_code or 1
        raise RunFailed(f"job {', '.join(job.job_id for job in failed)} failed: the end of its log is above", code)


def _of_the_stage(overrides: list[str]) -> list[str]:
    """Without what only concerns the submission; what Slurm sets in a job is not read as the user's settings there."""
    return [override for override in overrides if not override.startswith(("cluster", "launch="))]


def _name(cfg: StageConfig) -> str:
    return f"nemo-bench-setup-stage-{cfg.action.value}"


def _log(job: command_jobs.CommandJob) -> Path:
    return job.folder / f"slurm-{job.job_id}.out"
