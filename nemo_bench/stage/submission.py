"""`setup_stage.py hydra/launcher=submitit_slurm`: the same command as a job, for login nodes without enroot or room."""

from __future__ import annotations

import sys
from pathlib import Path

from nemo_bench.cli import quoted_path
from nemo_bench.cluster import jobs, slurm
from nemo_bench.cluster.job import Job
from nemo_bench.config import ComposedPoint, Launch, typed_as
from nemo_bench.files import dated_name, explained_disk_errors
from nemo_bench.project import PROJECT
from nemo_bench.report.terminal import make_console
from nemo_bench.stage.config import StageConfig
from nemo_bench.stage.stage import REMEDY

LOGS = "results.stage_setup"
# These concern the submission alone, or are given as this process sees them.
_DROPPED = ("cluster", "launch", "stage_path")


def submit_stage(points: list[ComposedPoint], *, wait: bool) -> None:
    """Submit the command of each point, and follow the jobs to their end if `wait` is set.

    HF_TOKEN reaches the jobs in sbatch's environment; it is written nowhere.

    Raises:
        BenchError: it cannot be submitted, or the scheduler refuses.
        RunFailed: a job failed.
    """
    configs = [typed_as(StageConfig, point.config) for point in points]
    for cfg in configs:
        jobs.require_slurm(cfg.cluster)
    dry = any(cfg.launch is Launch.dry for cfg in configs)
    if not dry:
        jobs.require_sbatch()
    submitted: list[Job] = []
    for cfg, point in zip(configs, points):
        name = f"nemo-bench-setup-stage-{cfg.action.value}"
        folder = Path(cfg.stage_path) / LOGS / dated_name()
        script = slurm.command_script(cfg.cluster, name, _command(cfg, point.overrides), folder)
        if dry:
            jobs.show(script)
            continue
        with explained_disk_errors(Path(cfg.stage_path), REMEDY):
            folder.mkdir(parents=True)
            submitted.append(jobs.submit(script, folder))
        print(f"job {submitted[-1].job_id}: {name}, log {submitted[-1].log}", flush=True)
    if dry:
        print("launch=dry: nothing was submitted.")
    elif wait:
        jobs.follow(make_console(), submitted)
    else:
        print("`python setup_stage.py check` shows what exists; `python jobs.py` lists the jobs")


def _command(cfg: StageConfig, overrides: list[str]) -> list[str]:
    """Return the command. Slurm runs it in our working folder, where relative paths mean the same."""
    kept = [text for text in overrides if text.lstrip("+").partition("=")[0].partition(".")[0] not in _DROPPED]
    script = str(PROJECT / "setup_stage.py")
    return [sys.executable, "-u", script, "cluster=local", *kept, f"stage_path={quoted_path(cfg.stage_path)}"]
