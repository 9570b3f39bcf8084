"""Points as Slurm jobs, all checked before any is submitted; or within the job that this process is part of."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from nemo_bench.checks.problems import problems
from nemo_bench.cluster import jobs, slurm
from nemo_bench.cluster.job import FAILURES, Job
from nemo_bench.config import ComposedPoint, TrainConfig, load, typed
from nemo_bench.errors import BenchError, ConfigurationRefused, Problem, RunFailed
from nemo_bench.files import locked, write_json
from nemo_bench.launch.batch_script import batch_script
from nemo_bench.launch.diagnosis import failure_text
from nemo_bench.launch.plan import files_plan, plan, results_dir
from nemo_bench.launch.point import new_run, prepare_data, run_point
from nemo_bench.record.folder import CONFIG, JOB, Status
from nemo_bench.report.model import point_name
from nemo_bench.report.terminal import make_console


def start_point(raw: DictConfig) -> None:
    """Run a cluster's point in this process's Slurm allocation (`sbatch launch.sh`), if there is one; else here."""
    cfg = typed(raw)
    # A job inside a job is never submitted: the point's batch script runs here.
    if cfg.launch == "dry" or cfg.cluster.scheduler != "slurm" or "SLURM_JOB_ID" not in os.environ:
        run_point(cfg)
        return
    if broken := problems(cfg):
        raise ConfigurationRefused(broken)
    nodes, needed = int(os.environ.get("SLURM_JOB_NUM_NODES", 1)), cfg.trainer.num_nodes
    if nodes < needed:
        raise BenchError(f"this allocation has {nodes} nodes, and the point needs {needed}: sbatch -N {needed}")
    for _ in range(cfg.repeats):
        overrides = list(HydraConfig.get().overrides.task)
        job = submit_run(prepare_data(cfg), overrides, submit=jobs.adopt)
        print(f"run folder: {job.folder}", flush=True)
        if status := subprocess.call(["bash", str(job.folder / slurm.SCRIPT)]):
            raise RunFailed(f"the point failed: python jobs.py log {job.job_id}", status)


def submit_points(points: list[ComposedPoint], *, wait: bool) -> None:
    """Check all points, then submit each as a job (launch=run) or print what would be submitted (launch=dry).

    Raises BenchError if a point is refused, by our checks (then none was submitted) or by the scheduler.
    """
    configs = [typed(point.config) for point in points]
    dry = any(cfg.launch == "dry" for cfg in configs)
    broken = [problems(cfg) for cfg in configs]
    # launch=dry also serves to plan on a laptop, which has no stage folder: it lists what is missing.
    refused = [[problem for problem in of_point if not (dry and problem.missing)] for of_point in broken]
    if any(refused):
        raise BenchError(_all_problems([point.name for point in points], refused))
    for cfg in configs:
        jobs.require_slurm(cfg)
    if dry:
        scripts = [batch_script(cfg, results_dir(cfg) / "<run>") for cfg in configs]
        texts = [
            "\n".join([f"# {point.name}", plan(cfg, missing), script, *files_plan(cfg)])
            for point, cfg, missing, script in zip(points, configs, broken, scripts)
        ]
        jobs.show_scripts(scripts, texts)
        return
    prepared = [prepare_data(cfg) for cfg in configs]
    submitted = _submit_all([pair for pair in zip(points, prepared) for _ in range(pair[1].repeats)])
    for job in submitted:
        job.done()
    make_console().print(jobs.table(submitted))
    if wait:
        jobs.follow(submitted, failure_text)
    else:
        print("python jobs.py lists them, shows a log, cancels and resubmits")


def _all_problems(points: list[str], refused: list[list[Problem]]) -> str:
    """Return every problem of every point; what several points share is said once."""
    shared: dict[str, list[str]] = {}
    for point, broken in zip(points, refused):
        for problem in broken:
            shared.setdefault(str(problem), []).append(point)
    problem_count = f"{len(shared)} problem{'s' if len(shared) > 1 else ''}"
    lines = [f"{problem_count} in {sum(map(bool, refused))} of {len(points)} points; nothing was submitted:"]
    for text, names in shared.items():
        lines += ["", f"  {text}"]
        if len(points) > 1:
            lines.append(f"    in: {'; '.join(names)}")
    return "\n".join(lines)


def _submit_all(runs: list[tuple[ComposedPoint, TrainConfig]]) -> list[Job]:
    """Submit each run, and say which were submitted also where that ends early."""
    submitted: list[Job] = []
    try:
        for point, cfg in runs:
            submitted.append(submit_run(cfg, point.overrides))
    except KeyboardInterrupt:
        raise RunFailed("interrupted: python jobs.py lists what was submitted", 130) from None
    finally:
        if submitted:
            ids = " ".join(job.job_id for job in submitted)
            print(f"{len(submitted)} of {len(runs)} jobs submitted; `scancel {ids}` takes them back")
    return submitted


def submit_run(cfg: TrainConfig, overrides: list[str], submit: Callable[..., Job] = jobs.submit) -> Job:
    """Record a run and submit it; a refused one does not look as if it were waiting."""
    run = new_run(cfg, overrides, state="submitted")
    try:
        return submit(
            batch_script(cfg, run.path),
            run.path,
            point=point_name(cfg.model.name, cfg.precision.name, cfg.world_size, overrides),
            overrides=overrides,
            nodes=cfg.trainer.num_nodes,
            gpus=cfg.world_size,
            max_steps=cfg.trainer.max_steps,
            requeue=cfg.checkpoint.every_n_steps is not None,
        )
    except slurm.Refused as error:
        run.set_status(Status("failed", reason=str(error).splitlines()[0]))
        raise


def resubmit(stage: Path, ids: list[str]) -> None:
    """Submit these jobs again, or all that failed; of two such commands at once the second finds nothing to do."""
    with locked(stage / ".resubmit.lock", "resubmits jobs"):
        submitted = jobs.submitted(stage)
        # What was cancelled was meant to end.
        failed = [job for job in submitted if job.is_run and job.state in FAILURES]
        chosen = [jobs.find(submitted, job_id, stage) for job_id in ids] if ids else failed
        again = [job for job in chosen if "resubmitted_as" not in job.content]
        for job in again:
            print(f"job {_resubmit(job).job_id}: {job.folder.name} again", flush=True)
    if not again:
        print("no job to resubmit: none has failed that was not submitted again")


def _resubmit(job: Job) -> Job:
    """Submit a run again, with the very configuration it had, into a run folder of its own."""
    if not job.is_run:
        what = f"job {job.job_id} ({job.what}) is not a run of train.py"
        raise BenchError(f"{what}: the same command again does what is missing\n  {job.content['command']}")
    if job.active:
        raise BenchError(f"job {job.job_id} is {job.state}: cancel it first (python jobs.py cancel {job.job_id})")
    again = submit_run(load(job.folder / CONFIG), job.content["overrides"])
    write_json(job.folder / JOB, {**job.content, "resubmitted_as": again.job_id})
    return again
