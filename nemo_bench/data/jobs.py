"""`prepare_data.py hydra/launcher=submitit_slurm`: a Slurm job for each shard."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from nemo_bench.cluster import jobs, slurm
from nemo_bench.cluster.job import Job
from nemo_bench.config import ComposedPoint, Launch, typed_as
from nemo_bench.data import prepare
from nemo_bench.data.config import Action, PreparationConfig
from nemo_bench.data.display import ShardDisplay
from nemo_bench.data.shard import RECORD, Shard
from nemo_bench.errors import BenchError
from nemo_bench.report.terminal import make_console


def submit_preparations(points: list[ComposedPoint], *, wait: bool) -> None:
    """Submit what is missing of all points, once all have been checked, and with `wait` follow the jobs.

    Raises:
        BenchError: a point cannot work (then nothing was submitted), or the scheduler refuses.
        RunFailed: a job did not complete.
    """
    configs = [_checked(point) for point in points]
    groups = [prepare.shards_of(cfg) for cfg in configs]
    counts = Counter(shard.prefix for group in groups for shard in group)
    if repeated := [prefix for prefix, count in counts.items() if count > 1]:
        raise BenchError(
            f"two points of the sweep make the same dataset: {', '.join(repeated)}; output_prefix=... must differ"
        )
    if any(cfg.launch is Launch.dry for cfg in configs):
        for cfg, group in zip(configs, groups):
            _show(cfg, group)
        return
    work = [(cfg, shard) for cfg, group in zip(configs, groups) for shard in prepare.missing_shards(cfg, group)]
    if work:
        jobs.require_sbatch()
        active = _active(Path(configs[0].stage_path))
        submitted = [_submit(cfg, shard, active) for cfg, shard in work]
        if not wait:
            print("python prepare_data.py check reads back what they make; python jobs.py lists them")
            return
        _follow([shard for _, shard in work], submitted)
    for cfg, group in zip(configs, groups):
        print(prepare.summary(cfg, group))


def _checked(point: ComposedPoint) -> PreparationConfig:
    cfg = prepare.checked(typed_as(PreparationConfig, point.config))
    jobs.require_slurm(cfg.cluster)
    if cfg.action is not Action.prepare:
        raise BenchError(f"{cfg.action.name} needs no job: leave out hydra/launcher=...")
    if cfg.data.kind != "megatron":
        raise BenchError(f"data={cfg.data.name} takes seconds and needs no job: leave out hydra/launcher=...")
    return cfg


def _show(cfg: PreparationConfig, shards: list[Shard]) -> None:
    print(prepare.plan(cfg, shards))
    parent = prepare.new_folder(cfg)
    for shard in shards:
        shard.folder = str(parent / shard.name)
        jobs.show(_script(cfg, shard))
    print("launch=dry: nothing was submitted.")


def _submit(cfg: PreparationConfig, shard: Shard, active: dict[str, Job]) -> Job:
    """Return the job that makes the shard: a new one, or the one that is making it already."""
    if job := active.get(shard.prefix):
        shard.folder = str(job.folder)
        print(f"job {job.job_id} is making {shard.name} already", flush=True)
    else:
        prepare.begin(shard, prepare.new_folder(cfg))
        job = jobs.submit(_script(cfg, shard), Path(shard.folder))
        print(f"job {job.job_id}: {shard.name}, log {job.log}", flush=True)
    shard.job_id, shard.state = job.job_id, job.state
    return job


def _active(stage: Path) -> dict[str, Job]:
    """Return the jobs of earlier commands that have not ended, by the dataset that they make."""
    active = [job for job in jobs.submitted(stage) if job.active and (job.folder / RECORD).exists()]
    return {Shard.load(job.folder).prefix: job for job in active}


def _follow(shards: list[Shard], submitted: list[Job]) -> None:
    with ShardDisplay(make_console(), shards) as display:

        def look() -> None:
            for shard, job in zip(shards, submitted):
                if shard.ended:
                    continue
                shard.state = job.state
                if job.over:
                    prepare.end(shard, 1 if job.exit_code is None else job.exit_code)
                else:
                    shard.refresh()
            display.update()

        jobs.wait(submitted, look)
    prepare.raise_failures(shards)


def _script(cfg: PreparationConfig, shard: Shard) -> str:
    name = f"nemo-bench-{shard.name}"
    return slurm.command_script(cfg.cluster, name, prepare.command(shard), Path(shard.folder))
