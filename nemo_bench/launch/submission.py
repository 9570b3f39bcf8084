"""Submit the points of a sweep to Slurm: all are checked before any is submitted."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from omegaconf import OmegaConf

from nemo_bench.checks.problems import problems
from nemo_bench.cluster import jobs, slurm
from nemo_bench.cluster.job import Job, refresh
from nemo_bench.config import ComposedPoint, Launch, TrainConfig, load, typed
from nemo_bench.entrypoints import entrypoint_of
from nemo_bench.errors import BenchError, Need, Problem, RunFailed
from nemo_bench.files import dated_name, write_json
from nemo_bench.launch.batch_script import batch_script
from nemo_bench.launch.plan import files_plan, missing_plan, plan, point_name, results_dir
from nemo_bench.launch.point import prepare_data
from nemo_bench.record.folder import CONFIG, JOB, RunFolder, Status
from nemo_bench.record.node import git_revision
from nemo_bench.report.terminal import make_console


def submit_points(points: list[ComposedPoint], *, wait: bool) -> None:
    """Check all points, then submit each as a job (launch=run) or print what would be submitted (launch=dry).

    Raises:
        BenchError: a point is refused, by our checks (then none was submitted) or by the scheduler.
        RunFailed: with `wait`, a job did not complete.
    """
    configs = [typed(point.config) for point in points]
    dry = any(cfg.launch is Launch.dry for cfg in configs)
    broken = [_problems(cfg) for cfg in configs]
    # launch=dry also serves to plan on a laptop, which has no stage folder: it lists what is missing.
    refused = {
        point.name: [problem for problem in point_problems if not (dry and problem.missing)]
        for point, point_problems in zip(points, broken)
    }
    if any(refused.values()):
        raise BenchError(_all_problems(refused))
    if dry:
        for point, cfg, missing in zip(points, configs, broken):
            _print_dry(point, cfg, missing)
        return
    if not slurm.have_sbatch():
        raise BenchError(
            "sbatch is not on this machine: submit from a login node of the cluster.\n"
            "launch=dry prints the scripts; scale=local runs here"
        )
    prepared = [prepare_data(cfg) for cfg in configs]
    configs = [cfg for cfg, _ in prepared]
    for data in dict.fromkeys(data for _, data in prepared if data):
        print(data)
    submitted = _submit_all(points, configs)
    _write_jobs(Path(configs[0].stage_path), submitted)
    console = make_console()
    refresh(submitted)
    console.print(jobs.table(submitted))
    if wait:
        jobs.follow(console, submitted)
    else:
        print("python jobs.py lists them, shows a log, cancels and resubmits")


def _problems(cfg: TrainConfig) -> list[Problem]:
    need = Need(cfg)
    fix = "use cluster=slurm (scale=local brings cluster=local: add cluster=slurm too)"
    on_slurm = cfg.cluster.scheduler == "slurm"
    need(on_slurm, "cluster", "hydra/launcher=submitit_slurm submits to Slurm", fix, value=cfg.cluster.name)
    return need.problems + [problem for problem in problems(cfg) if on_slurm or not problem.missing]


def _all_problems(refused: dict[str, list[Problem]]) -> str:
    """Return every problem of every point; what several points share is said once."""
    shared: dict[str, list[str]] = {}
    for point, broken in refused.items():
        for problem in broken:
            shared.setdefault(str(problem), []).append(point)
    problem_count = f"{len(shared)} problem{'s' if len(shared) > 1 else ''}"
    lines = [f"{problem_count} in {sum(map(bool, refused.values()))} of {len(refused)} points; nothing was submitted:"]
    for text, names in shared.items():
        lines += ["", f"  {text}"]
        if len(refused) > 1:
            lines.append(f"    in: {'; '.join(names)}")
    return "\n".join(lines)


def _print_dry(point: ComposedPoint, cfg: TrainConfig, missing: list[Problem]) -> None:
    run_dir = results_dir(cfg) / "<run>"
    print(f"# {point.name}")
    print(plan(cfg))
    if missing:
        print(missing_plan(missing))
    if cfg.cluster.scheduler == "slurm":
        jobs.show(batch_script(cfg, run_dir), *files_plan(cfg))
    print("launch=dry: nothing was submitted.\n")


def _submit_all(points: list[ComposedPoint], configs: list[TrainConfig]) -> list[Job]:
    submitted: list[Job] = []
    git = git_revision()
    try:
        for point, cfg in zip(points, configs):
            run = RunFolder.new(results_dir(cfg))
            run.create(
                # As it is now: what happens to conf/ later changes nothing in it.
                config_yaml=OmegaConf.to_yaml(OmegaConf.structured(cfg)),
                command=["python", *sys.argv],
                overrides=point.overrides,
                ranks=cfg.world_size,
                state="submitted",
                git=git,
            )
            submitted.append(_submit(run, cfg, point.overrides))
    except (BenchError, OSError, KeyboardInterrupt) as error:
        message = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
        if submitted:
            with contextlib.suppress(BenchError):
                _write_jobs(Path(configs[0].stage_path), submitted)
            ids = " ".join(job.job_id for job in submitted)
            count = f"{len(submitted)} of {len(points)} points"
            message += f"\n{count} were submitted before that: `scancel {ids}` takes them back"
        if isinstance(error, KeyboardInterrupt):
            raise RunFailed(f"{message}\npython jobs.py lists what was submitted", 130) from None
        raise BenchError(message) from None
    return submitted


def _submit(run: RunFolder, cfg: TrainConfig, overrides: list[str]) -> Job:
    """Submit a recorded run; a refused one does not look as if it were waiting.

    Raises:
        BenchError: the scheduler refused it, or may have taken it.
    """
    entrypoint_of(cfg).write_files(cfg, run.path)
    try:
        return jobs.submit(
            batch_script(cfg, run.path),
            run.path,
            point=point_name(cfg),
            overrides=overrides,
            nodes=cfg.trainer.num_nodes,
            gpus=cfg.world_size,
            max_steps=cfg.trainer.max_steps,
            requeue=cfg.checkpoint.every_n_steps is not None,
        )
    except slurm.Refused as error:
        run.set_status(Status("failed", reason=str(error).splitlines()[0]))
        raise


def resubmit(job: Job) -> Job:
    """Submit a run again, with the very configuration it had, into a run folder of its own.

    Raises:
        BenchError: it is still active, it is no run, or the scheduler refused.
    """
    if not job.is_run:
        raise BenchError(
            f"job {job.job_id} ({job.what}) is not a run of train.py: "
            f"the same command again does what is still missing\n  {job.content['command']}"
        )
    if not (job.ended or job.lost):
        raise BenchError(f"job {job.job_id} is {job.state}: cancel it first (python jobs.py cancel {job.job_id})")
    run, cfg, overrides = RunFolder.new(job.folder.parent), load(job.folder / CONFIG), job.content["overrides"]
    run.create(
        config_yaml=(job.folder / CONFIG).read_text(),
        command=["python", "jobs.py", "resubmit", job.job_id],
        overrides=overrides,
        ranks=cfg.world_size,
        state="submitted",
    )
    again = _submit(run, cfg, overrides)
    write_json(job.folder / JOB, {**job.content, "resubmitted_as": again.job_id})
    return again


def _write_jobs(stage: Path, submitted: list[Job]) -> None:
    """Write `submissions/<date>/jobs.json`: for scripts that work on what one command has submitted."""
    folder = stage / "submissions" / dated_name()
    rows = [
        {
            **{key: job.content[key] for key in ("point", "overrides", "nodes", "gpus")},
            "job_id": job.job_id,
            "run_dir": str(job.folder),
            "log": str(RunFolder(job.folder).log(0)),
        }
        for job in submitted
    ]
    try:
        folder.mkdir(parents=True)
        write_json(folder / "jobs.json", rows)
    except OSError as error:
        ids = " ".join(job.job_id for job in submitted)
        raise BenchError(f"all points were submitted, then: {error}\n`scancel {ids}` takes them back") from None
    print(f"{len(submitted)} job{'s' if len(submitted) != 1 else ''} submitted: {folder}/jobs.json")
