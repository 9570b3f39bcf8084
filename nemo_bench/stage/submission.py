"""`setup_stage.py hydra/launcher=submitit_slurm`: the same command as a job, for login nodes without enroot or room."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from nemo_bench.cli import quoted_path
from nemo_bench.cluster import jobs, slurm
from nemo_bench.config import ComposedPoint, Launch, typed_as
from nemo_bench.files import dated_name
from nemo_bench.project import PROJECT
from nemo_bench.report.terminal import make_console
from nemo_bench.stage.config import StageConfig
from nemo_bench.stage.files import require_stage_folder, writing_error

LOGS = "results.stage_setup"
# What only concerns the submission: what Slurm sets in a job is not read as the user's settings there.
_SUBMISSION_KEYS = ("cluster", "launch")


def submit_stage(points: list[ComposedPoint], *, wait: bool) -> None:
    """Submits the command of each point, and follows the jobs to their end where `wait` is set.

    HF_TOKEN reaches the jobs in sbatch's environment; it is written nowhere.

    Raises:
        BenchError: it cannot be submitted, or the scheduler refuses.
        RunFailed: a job failed.
    """
    configs = [typed_as(StageConfig, point.config) for point in points]
    for cfg in configs:
        jobs.require_slurm(cfg.cluster)
        require_stage_folder(_stage(cfg))
    commands = [_command(cfg, point.overrides) for cfg, point in zip(configs, points)]
    if any(cfg.launch is Launch.dry for cfg in configs):
        for cfg, command in zip(configs, commands):
            jobs.show(slurm.command_script(cfg.cluster, _name(cfg), command, _new_folder(cfg)))
        print("launch=dry: nothing was submitted.")
        return
    jobs.require_sbatch()
    submitted: list[jobs.Job] = []
    for cfg, command in zip(configs, commands):
        folder = _new_folder(cfg)
        try:
            folder.mkdir(parents=True)
            script = slurm.command_script(cfg.cluster, _name(cfg), command, folder)
            submitted.append(jobs.submit(script, folder))
        except OSError as error:
            raise writing_error(_stage(cfg), error) from error
        print(f"job {submitted[-1].job_id}: {_name(cfg)}, log {submitted[-1].log}", flush=True)
    if wait:
        jobs.follow(make_console(), submitted)
    else:
        print("python setup_stage.py check says what is there; python jobs.py lists the jobs")


def _stage(cfg: StageConfig) -> Path:
    return Path(cfg.stage_path).absolute()


def _new_folder(cfg: StageConfig) -> Path:
    """The path of a job's own folder."""
    return _stage(cfg) / LOGS / dated_name()


def _command(cfg: StageConfig, overrides: list[str]) -> list[str]:
    """The command with its paths absolute: the job may have another environment, and stand in another folder."""
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
