"""Lists the jobs submitted to Slurm, shows a log, cancels, resubmits (`--help`)."""

import argparse
from pathlib import Path
from typing import Any

from nemo_bench import cli
from nemo_bench.config import default_stage_path
from nemo_bench.errors import BenchError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", type=Path, default=default_stage_path(), help="stage folder (STAGE_PATH)")
    commands = parser.add_subparsers(dest="command", metavar="command")
    commands.add_parser("list", help="all submitted runs: state, step reached, step time (the default)")
    commands.add_parser("follow", help="the active ones, until they end").add_argument("job", nargs="*")
    commands.add_parser("log", help="why a job failed, and the end of its logs").add_argument("job")
    commands.add_parser("cancel", help="these jobs").add_argument("job", nargs="+")
    commands.add_parser(
        "resubmit", help="these jobs, or all failed ones, with the configuration they had"
    ).add_argument("job", nargs="*")
    arguments = parser.parse_args()
    cli.guard(run, arguments)
    cli.end()


def run(arguments: argparse.Namespace) -> None:
    from nemo_bench.cluster import jobs as command_jobs
    from nemo_bench.cluster import slurm
    from nemo_bench.launch import jobs
    from nemo_bench.report.terminal import make_console

    console, stage = make_console(), Path(arguments.stage).absolute()
    if not stage.is_dir() and (stage.exists() or str(stage) != default_stage_path()):
        raise BenchError(f"{stage} is no folder: --stage (or STAGE_PATH) must name a stage folder")
    chosen: Any = getattr(arguments, "job", None)  # one id, or a list of them
    commands = {job.job_id: job for job in command_jobs.submitted(stage)}  # of prepare_data.py and setup_stage.py
    if arguments.command == "log":
        print(
            command_jobs.log_text(commands[chosen]) if chosen in commands else jobs.log_text(jobs.find(stage, chosen))
        )
    elif arguments.command == "cancel":
        runs = [jobs.find(stage, job_id) for job_id in chosen if job_id not in commands]
        active = [job_id for job_id in chosen if job_id in commands and commands[job_id].state in slurm.ACTIVE]
        slurm.scancel(active)
        ids = [*jobs.cancel(runs), *active]
        console.print(f"cancelled: {' '.join(ids) or 'none: they had ended'}")
    elif arguments.command == "follow":
        runs = [jobs.find(stage, job_id) for job_id in chosen if job_id not in commands]
        followed = [commands[job_id] for job_id in chosen if job_id in commands]
        if not chosen:
            runs = [job.run_dir for job in jobs.look(jobs.submitted_runs(stage)) if job.active]
            followed = [job for job in commands.values() if job.state in slurm.ACTIVE]
        if followed:
            cli.guard(command_jobs.follow_to_end, followed)  # whose failure does not keep the runs from being followed
        if runs or not followed:
            jobs.follow(console, runs)
    elif arguments.command == "resubmit":
        for job_id in chosen:
            if job_id in commands:
                raise command_jobs.not_resubmitted(commands[job_id])
        runs = [jobs.find(stage, job_id) for job_id in chosen]
        runs = runs or jobs.to_resubmit(stage)
        for run_dir in runs:
            console.print(f"job {jobs.resubmit(run_dir).job_id}: {run_dir.name} again")
        if not runs:
            console.print("no job has failed that was not submitted again")
    else:
        found = jobs.look(jobs.submitted_runs(stage))
        if found or not commands:
            console.print(jobs.table(found) if found else f"no run was submitted under {stage}")
        if commands:
            console.print(command_jobs.table(list(commands.values())))


if __name__ == "__main__":
    main()
