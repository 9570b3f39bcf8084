"""`prepare_data.py hydra/launcher=submitit_slurm`: a Slurm job for each shard."""

from __future__ import annotations

from pathlib import Path

from nemo_bench.cluster import jobs, slurm
from nemo_bench.config import ComposedPoint, Launch, typed_as
from nemo_bench.data import prepare
from nemo_bench.data.config import PreparationConfig
from nemo_bench.data.shard import Shard
from nemo_bench.errors import BenchError
from nemo_bench.files import dated_name
from nemo_bench.report.terminal import make_console

#: The recipe's folder, in the stage folder, for the logs of this work.
LOGS = "results.data_preparation"


def submit_preparations(points: list[ComposedPoint], *, wait: bool) -> None:
    """Submit what is missing of all points, once all have been checked, and with `wait` follow the jobs.

    Raises BenchError if a point cannot work or the scheduler refuses, RunFailed if a job did not complete.
    """
    configs = [_checked(point) for point in points]
    groups = [prepare.shards_of(cfg) for cfg in configs]
    if any(cfg.launch is Launch.dry for cfg in configs):
        scripts = []
        for cfg, point, group in zip(configs, points, groups):
            print(prepare.plan(cfg, group))
            scripts += [_script(cfg, point, number, shard)[0] for number, shard in group.items()]
        jobs.show_commands(scripts)
        return
    missing = [prepare.missing_shards(cfg, list(group.values())) for cfg, group in zip(configs, groups)]
    if any(missing):
        jobs.require_sbatch()
        active = {job.content.get("prefix"): job for job in jobs.submitted(Path(configs[0].stage_path)) if job.active}
        submitted = []
        for cfg, point, group, to_make in zip(configs, points, groups, missing):
            for number, shard in group.items():
                if job := active.get(shard.prefix):
                    print(f"job {job.job_id} is making {shard.name} already", flush=True)
                    submitted.append(job)
                elif shard in to_make:
                    submitted.append(jobs.submit_command(*_script(cfg, point, number, shard), prefix=shard.prefix))
        if not wait:
            print("python prepare_data.py check reads back what they make; python jobs.py lists them")
            return
        jobs.follow(make_console(), submitted)
    for cfg, group, to_make in zip(configs, groups, missing):
        print(prepare.summary(cfg, list(group.values()), to_make))


def _checked(point: ComposedPoint) -> PreparationConfig:
    cfg = prepare.checked(typed_as(PreparationConfig, point.config))
    jobs.check_command(cfg)
    if cfg.action != "prepare":
        raise BenchError(f"{cfg.action} needs no job: leave out hydra/launcher=...")
    if cfg.data.kind != "megatron":
        raise BenchError(f"data={cfg.data.name} takes seconds and needs no job: leave out hydra/launcher=...")
    return cfg


def _script(cfg: PreparationConfig, point: ComposedPoint, number: int, shard: Shard) -> tuple[str, Path]:
    """Return the batch script that makes a shard, and the folder of its log."""
    folder = Path(cfg.stage_path, LOGS, dated_name(), shard.name)
    command = jobs.repeated_command("prepare_data.py", point.overrides, cfg.stage_path, f"only={number}")
    return slurm.command_script(cfg.cluster, f"nemo-bench-{shard.name}", command, folder), folder
