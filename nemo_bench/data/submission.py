"""`prepare_data.py hydra/launcher=submitit_slurm`: a job a shard."""

from __future__ import annotations

import sys
from pathlib import Path

from nemo_bench.config import Launch, typed_as
from nemo_bench.data.preparation import (
    Shard,
    absolute_paths,
    new_log_folder,
    new_shard,
    plan,
    raise_failures,
    shard_tasks,
    summary,
    what_is_missing,
)
from nemo_bench.data.preparation_config import Action, PreparationConfig
from nemo_bench.data.shard import ShardTask
from nemo_bench.errors import BenchError
from nemo_bench.launch import command_jobs
from nemo_bench.launch.submission import Point, forget_sweep


def submit_preparations(points: list[Point], *, sweep_dir: Path, wait: bool, to_slurm: bool) -> None:
    """Submits what is missing of each point, and follows the jobs to their end where `wait` is set.

    Raises:
        BenchError: a point cannot work, or the scheduler refuses.
        RunFailed: a job did not complete.
    """
    forget_sweep(sweep_dir)  # the records of this command lie with the recipe's, in results.data_preparation
    for point in points:
        _submit(absolute_paths(typed_as(PreparationConfig, point.config)), wait=wait, to_slurm=to_slurm)


def _submit(cfg: PreparationConfig, *, wait: bool, to_slurm: bool) -> None:
    command_jobs.require_slurm(cfg.cluster, to_slurm=to_slurm)
    if cfg.action is not Action.prepare or cfg.data.kind != "megatron":
        raise BenchError(f"action={cfg.action.name} data={cfg.data.name}: only data=pile is prepared by jobs")
    tasks = shard_tasks(cfg)
    parent = new_log_folder(Path(cfg.stage_path))
    if cfg.launch is Launch.dry:
        print(plan(cfg, tasks))
        for task in tasks:
            command_jobs.show(cfg.cluster, _name(task), _command(parent / task.name), parent / task.name)
        print("launch=dry: nothing was submitted.")
        return
    waiting, results = what_is_missing(cfg, tasks)
    if not waiting:
        print(summary(cfg, tasks, results))
        return
    command_jobs.require_sbatch()
    try:
        shards = [new_shard(parent, task) for task in waiting]
    except OSError as error:
        raise BenchError(f"{error}\nSTAGE_PATH (or stage_path=...) must name a folder that can be written") from None
    jobs = []
    for one in shards:
        try:
            jobs.append(command_jobs.submit(cfg.cluster, _name(one.task), _command(one.folder), one.folder))
        except BenchError as error:
            told = f"\nsubmitted before that: {' '.join(job.job_id for job in jobs)}" if jobs else ""
            raise BenchError(f"{error}{told}") from None
        one.job_id, one.state = jobs[-1].job_id, jobs[-1].state
        print(f"job {one.job_id}: {one.task.name}, log {one.folder}/slurm-{one.job_id}.out", flush=True)
    if wait or cfg.wait:
        _follow(shards, jobs)
        results += [one.result for one in shards if one.result is not None]
        print(summary(cfg, tasks, results))
    else:
        print("python prepare_data.py check reads back what they have made")


def _follow(shards: list[Shard], jobs: list[command_jobs.CommandJob]) -> None:
    from nemo_bench.data.progress_display import ShardDisplay
    from nemo_bench.results.terminal import make_console

    with ShardDisplay(make_console(), shards) as display:

        def look() -> None:
            for one, job in zip(shards, jobs):
                if job.exit_code is not None and not one.ended:
                    one.end(job.exit_code)
                elif not one.ended:
                    one.state = job.state
            display.update()

        command_jobs.follow(jobs, look)
    raise_failures(shards)


def _name(task: ShardTask) -> str:
    return f"nemo-bench-{task.name}"


def _command(folder: Path) -> list[str]:
    return [sys.executable, "-u", "-m", "nemo_bench.data.shard", str(folder)]
