"""`prepare_data.py hydra/launcher=submitit_slurm`: a job a shard."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from nemo_bench.cluster import jobs, slurm
from nemo_bench.cluster.jobs import Job
from nemo_bench.config import ComposedPoint, Launch, typed_as
from nemo_bench.data import shard
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
from nemo_bench.data.shard import ShardResult, ShardTask
from nemo_bench.errors import BenchError


@dataclass
class _Preparation:
    """A point of the sweep: what it asks for, what is there, and what is under way."""

    cfg: PreparationConfig
    tasks: list[ShardTask]
    waiting: list[ShardTask] = field(default_factory=list)
    results: list[ShardResult] = field(default_factory=list)
    shards: list[Shard] = field(default_factory=list)


def submit_preparations(points: list[ComposedPoint], *, wait: bool) -> None:
    """Submits what is missing of all points, once all were checked, and follows the jobs where `wait` is set.

    Raises:
        BenchError: a point cannot work (then nothing was submitted), or the scheduler refuses.
        RunFailed: a job did not complete.
    """
    preparations = [_checked(point) for point in points]
    repeated = [
        prefix for prefix, count in Counter(t.prefix for p in preparations for t in p.tasks).items() if count > 1
    ]
    if repeated:
        raise BenchError(
            f"two points of the sweep make the same dataset: {', '.join(repeated)}; output_prefix=... names them apart"
        )
    if any(p.cfg.launch is Launch.dry for p in preparations):
        for p in preparations:
            _show(p)
        return
    for p in preparations:
        p.waiting, p.results = what_is_missing(p.cfg, p.tasks)
    submitted = _submit(preparations)
    if not wait and submitted:
        print("python prepare_data.py check reads back what they have made; python jobs.py lists them")
        return
    if submitted:
        _follow([one for p in preparations for one in p.shards], submitted)
    for p in preparations:
        made = [one.result for one in p.shards if one.result is not None]
        print(summary(p.cfg, p.tasks, p.results + made))


def _checked(point: ComposedPoint) -> _Preparation:
    cfg = absolute_paths(typed_as(PreparationConfig, point.config))
    jobs.require_slurm(cfg.cluster)
    if cfg.action is not Action.prepare:
        raise BenchError(f"{cfg.action.name} needs no job: leave hydra/launcher=... out")
    if cfg.data.kind != "megatron":
        raise BenchError(f"data={cfg.data.name} is prepared here, in seconds: leave hydra/launcher=... out")
    return _Preparation(cfg, shard_tasks(cfg))


def _show(p: _Preparation) -> None:
    print(plan(p.cfg, p.tasks))
    parent = new_log_folder(Path(p.cfg.stage_path))
    for task in p.tasks:
        jobs.show(slurm.command_script(p.cfg.cluster, _name(task), _command(parent / task.name), parent / task.name))
    print("launch=dry: nothing was submitted.")


def _submit(preparations: list[_Preparation]) -> list[Job]:
    """A job for each missing dataset, or the one that is making it already."""
    if not any(p.waiting for p in preparations):
        return []
    jobs.require_sbatch()
    active = _active(Path(preparations[0].cfg.stage_path))
    submitted: list[Job] = []
    for p in preparations:
        parent = new_log_folder(Path(p.cfg.stage_path))
        for task in p.waiting:
            if (job := active.get(task.prefix)) is not None:
                one = Shard(task, job.folder)
                print(f"job {job.job_id} is making {task.name} already", flush=True)
            else:
                try:
                    one = new_shard(parent, task)
                    script = slurm.command_script(p.cfg.cluster, _name(task), _command(one.folder), one.folder)
                    job = jobs.submit(script, one.folder)
                except (BenchError, OSError) as error:
                    told = f"\nsubmitted before that: {' '.join(job.job_id for job in submitted)}" if submitted else ""
                    raise BenchError(f"{error}{told}") from None
                print(f"job {job.job_id}: {task.name}, log {one.folder}/slurm-{job.job_id}.out", flush=True)
            one.job_id, one.state = job.job_id, job.state
            p.shards.append(one)
            submitted.append(job)
    return submitted


def _active(stage: Path) -> dict[str, Job]:
    """Jobs of earlier commands that have not ended, by the dataset that they make."""
    found = {}
    for job in jobs.submitted(stage):
        try:
            prefix = json.loads((job.folder / shard.TASK).read_bytes())["prefix"]
        except (OSError, ValueError, KeyError):
            continue
        if job.active:
            found[prefix] = job
    return found


def _follow(shards: list[Shard], submitted: list[Job]) -> None:
    from nemo_bench.data.progress_display import ShardDisplay
    from nemo_bench.report.terminal import make_console

    with ShardDisplay(make_console(), shards) as display:

        def look() -> None:
            for one, job in zip(shards, submitted):
                if job.over and not one.ended:
                    one.end(1 if job.exit_code is None else job.exit_code)
                elif not one.ended:
                    one.state = job.state
            display.update()

        jobs.wait(submitted, look)
    raise_failures(shards)


def _name(task: ShardTask) -> str:
    return f"nemo-bench-{task.name}"


def _command(folder: Path) -> list[str]:
    return [sys.executable, "-u", "-m", "nemo_bench.data.shard", str(folder)]
