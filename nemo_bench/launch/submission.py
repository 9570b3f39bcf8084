"""Submit the points of a sweep to Slurm: all are checked before any is submitted."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from nemo_bench.checks.problems import problems
from nemo_bench.cluster import slurm
from nemo_bench.config import ComposedPoint, Launch, TrainConfig, typed
from nemo_bench.entrypoints import entrypoint_of
from nemo_bench.errors import BenchError, Need, Problem
from nemo_bench.files import dated_name, write_json
from nemo_bench.launch.batch_script import batch_script, job_name
from nemo_bench.launch.plan import files_plan, plan, point_name, results_dir
from nemo_bench.launch.point import prepare_data
from nemo_bench.record import folder as record


@dataclass(frozen=True)
class SubmittedJob:
    """A row of the table and of `jobs.json`."""

    point: str
    overrides: list[str]
    job_id: str
    nodes: int
    gpus: int
    run_dir: str
    log: str


def submit_points(points: list[ComposedPoint], *, wait: bool) -> None:
    """Checks all points, then submits them (launch=run) or prints what would be submitted (launch=dry).

    Each point is a job of its own.

    Raises:
        BenchError: a point is refused, by our checks (then none was submitted) or by the scheduler.
        RunFailed: with `wait`, a job did not complete.
    """
    configs = [typed(point.config) for point in points]
    dry = any(cfg.launch is Launch.dry for cfg in configs)
    refused = {point.name: broken for point, cfg in zip(points, configs) if (broken := _problems(cfg, dry=dry))}
    if refused:
        raise BenchError(_all_problems(refused, len(points)))
    if dry:
        for point, cfg in zip(points, configs):
            _print_dry(point, cfg)
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
    folder = Path(configs[0].stage_path) / "submissions" / dated_name()
    jobs = _submit_all(points, configs, folder)
    from nemo_bench.report.terminal import make_console

    console = make_console()
    _print_table(console, jobs)
    console.print(f"submitted: {folder}/jobs.json", soft_wrap=True, highlight=False)
    if wait:
        from nemo_bench.launch.jobs import follow

        follow(console, [Path(job.run_dir) for job in jobs])
    else:
        console.print("python jobs.py lists them, shows a log, cancels and resubmits", highlight=False)


def _problems(cfg: TrainConfig, *, dry: bool) -> list[Problem]:
    need = Need(cfg)
    fix = "use cluster=slurm (scale=local brings cluster=local: add cluster=slurm too)"
    on_slurm = cfg.cluster.scheduler == "slurm"
    need(on_slurm, "cluster", "hydra/launcher=submitit_slurm submits to Slurm", fix, value=cfg.cluster.name)
    # launch=dry also serves to plan on a laptop, which has no stage folder and no GPU.
    return need.problems + [problem for problem in problems(cfg) if not problem.missing or (on_slurm and not dry)]


def _all_problems(refused: dict[str, list[Problem]], points: int) -> str:
    """Return every problem of every point; what several points share is said once."""
    shared: dict[str, list[str]] = {}
    for point, broken in refused.items():
        for problem in broken:
            shared.setdefault(str(problem), []).append(point)
    head = f"{len(shared)} problem{'s' if len(shared) > 1 else ''} in {len(refused)} of {points} points; "
    lines = [head + "nothing was submitted:"]
    for text, names in shared.items():
        lines += ["", f"  {text}"]
        if points > 1:
            lines.append(f"    in: {'; '.join(names)}")
    return "\n".join(lines)


def _print_dry(point: ComposedPoint, cfg: TrainConfig) -> None:
    run_dir = results_dir(cfg) / "<run>"
    print(f"# {point.name}")
    print(plan(cfg))
    if cfg.cluster.scheduler == "slurm":
        script = batch_script(cfg, run_dir)
        print(script)
        for text in files_plan(cfg):
            print(text)
        if slurm.have_sbatch():
            answer = slurm.test_only(script)
            print(f"sbatch --test-only: {'accepted' if answer.accepted else 'REFUSED'}: {answer.message}")
    print("launch=dry: nothing was submitted.\n")


def _submit_all(points: list[ComposedPoint], configs: list[TrainConfig], folder: Path) -> list[SubmittedJob]:
    jobs: list[SubmittedJob] = []
    try:
        for point, cfg in zip(points, configs):
            jobs.append(submit_run(cfg, _new_run(point, cfg), point.overrides))
    except (BenchError, OSError) as error:
        if not jobs:
            raise BenchError(str(error)) from None
        ids = " ".join(job.job_id for job in jobs)
        raise BenchError(
            f"{error}\n{len(jobs)} of {len(points)} points were submitted before that: `scancel {ids}` takes them back"
        ) from None
    finally:
        if jobs:
            _write_jobs(folder, jobs)
    return jobs


def _new_run(point: ComposedPoint, cfg: TrainConfig) -> Path:
    """A run folder with the point's configuration as it is now: what happens to conf/ later changes nothing in it."""
    run_dir = record.RunFolder.new(results_dir(cfg)).path
    record.RunFolder(run_dir).create(
        config_yaml=OmegaConf.to_yaml(OmegaConf.structured(cfg)),
        command=["python", *sys.argv],
        overrides=point.overrides,
        ranks=cfg.world_size,
        state="submitted",
    )
    return run_dir


def _write_jobs(folder: Path, jobs: list[SubmittedJob]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "jobs.json", [vars(job) for job in jobs])


def submit_run(cfg: TrainConfig, run_dir: Path, overrides: list[str]) -> SubmittedJob:
    """Submits the run that `run_dir` holds, as it is recorded there; a refused one is not left behind as if it waited.

    Raises:
        BenchError: the scheduler refused.
    """
    try:
        entrypoint_of(cfg).write_files(cfg, run_dir)
        job_id = slurm.submit(batch_script(cfg, run_dir), job_name(cfg), run_dir)
    except BenchError as error:
        record.RunFolder(run_dir).set_status(record.Status("failed", reason=str(error).splitlines()[0]))
        raise
    record.RunFolder(run_dir).set_job(job_id)
    return _submitted(cfg, run_dir, overrides, job_id)


def _submitted(cfg: TrainConfig, run_dir: Path, overrides: list[str], job_id: str) -> SubmittedJob:
    return SubmittedJob(
        point=point_name(cfg),
        overrides=overrides,
        job_id=job_id,
        nodes=cfg.trainer.num_nodes,
        gpus=cfg.world_size,
        run_dir=str(run_dir),
        log=str(record.RunFolder(run_dir).log(0)),
    )


def _print_table(console: Any, jobs: list[SubmittedJob]) -> None:
    from rich.table import Table

    from nemo_bench.launch.jobs import look

    states = {job.run_dir: job.state for job in look([Path(job.run_dir) for job in jobs])}
    table = Table(title=f"{len(jobs)} job{'s' if len(jobs) != 1 else ''} submitted", title_justify="left")
    for name in ("point", "job", "nodes", "GPUs", "state", "log"):
        table.add_column(name, justify="right" if name in ("nodes", "GPUs") else "left", overflow="fold")
    for job in jobs:
        state = states[Path(job.run_dir)]
        table.add_row(job.point, job.job_id, str(job.nodes), str(job.gpus), state, job.log)
    console.print(table)
