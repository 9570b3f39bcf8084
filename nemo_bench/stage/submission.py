"""`setup_stage.py hydra/launcher=submitit_slurm`: the same command as a job, for login nodes without enroot or room."""

from __future__ import annotations

import os
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
# These concern the submission alone: in the job, what Slurm sets is not read as the user's settings.
_SUBMISSION_KEYS = ("cluster", "launch")


def submit_stage(points: list[ComposedPoint], *, wait: bool) -> None:
    """Submit the command of each point, and follow the jobs to their end if `wait` is set.

    HF_TOKEN reaches the jobs in sbatch's environment; it is written nowhere.

    Raises:
        BenchError: it cannot be submitted, or the scheduler refuses.
        RunFailed: a job failed.
    """
    configs = [typed_as(StageConfig, point.config) for point in points]
    dry = any(cfg.launch is Launch.dry for cfg in configs)
    for cfg in configs:
        jobs.require_slurm(cfg.cluster)
    if not dry:
        jobs.require_sbatch()
    submitted: list[Job] = []
    for cfg, point in zip(configs, points):
        folder = Path(cfg.stage_path) / LOGS / dated_name()
        script = slurm.command_script(cfg.cluster, _name(cfg), _command(cfg, point.overrides), folder)
        if dry:
            jobs.show(script)
            continue
        with explained_disk_errors(Path(cfg.stage_path), REMEDY):
            folder.mkdir(parents=True)
            submitted.append(jobs.submit(script, folder))
        print(f"job {submitted[-1].job_id}: {_name(cfg)}, log {submitted[-1].log}", flush=True)
    if dry:
        print("launch=dry: nothing was submitted.")
    elif wait:
        jobs.follow(make_console(), submitted)
    else:
        print("`python setup_stage.py check` shows what exists; `python jobs.py` lists the jobs")


def _command(cfg: StageConfig, overrides: list[str]) -> list[str]:
    """Return the command with absolute paths: the job may have another environment and working folder."""
    by_key = {override.lstrip("+").partition("=")[0]: override for override in overrides}
    paths = {"stage_path": cfg.stage_path, "bundle": cfg.bundle}
    if "tokenizer.folder" in by_key:
        paths["tokenizer.folder"] = cfg.tokenizer.folder
    if os.sep in cfg.enroot:
        paths["enroot"] = cfg.enroot
    pinned = {key: f"{key}={quoted_path(Path(path).absolute())}" for key, path in paths.items() if path is not None}
    kept = [
        override
        for key, override in by_key.items()
        if key.partition(".")[0] not in _SUBMISSION_KEYS and key not in pinned
    ]
    return [sys.executable, "-u", str(PROJECT / "setup_stage.py"), "cluster=local", *kept, *pinned.values()]


def _name(cfg: StageConfig) -> str:
    return f"nemo-bench-setup-stage-{cfg.action.value}"
