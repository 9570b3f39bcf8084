"""Lists the jobs submitted to Slurm, shows a log, cancels, resubmits (`--help`)."""

import nemo_bench.startup  # noqa: F401  # isort: skip  (first)
import argparse
from pathlib import Path

from nemo_bench import cli
from nemo_bench.composition import default_stage_path
from nemo_bench.errors import BenchError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", type=Path, default=default_stage_path(), help="stage folder (STAGE_PATH)")
    commands = parser.add_subparsers(dest="command", metavar="command")
    commands.add_parser("list", help="all submitted runs: state, step reached, step time (the default)")
    commands.add_parser("follow", help="the active ones, until they end").add_argument("job", nargs="*")
    commands.add_parser("log", help="why a job failed, and the end of its logs").add_argument("job", nargs=1)
    show = commands.add_parser("show", help="a run's numbers; --path: a job's folder")
    show.add_argument("job", nargs=1)
    show.add_argument("--path", action="store_true")
    commands.add_parser("cancel", help="these jobs").add_argument("job", nargs="+")
    resubmit_help = "these jobs, or all failed ones, with the configuration they had"
    commands.add_parser("resubmit", help=resubmit_help).add_argument("job", nargs="*")
    arguments = parser.parse_args()
    ids = getattr(arguments, "job", [])
    run("path" if getattr(arguments, "path", False) else arguments.command, arguments.stage.absolute(), ids)


def run(command: str, stage: Path, ids: list[str]) -> None:
    from nemo_bench.cluster import jobs
    from nemo_bench.launch.diagnosis import failure_text
    from nemo_bench.report.runs import load_run
    from nemo_bench.report.terminal import make_console, print_summary

    if not stage.is_dir() and (stage.exists() or str(stage) != default_stage_path()):
        raise BenchError(f"{stage} is not a folder: --stage (or STAGE_PATH) must name a stage folder")
    console, submitted = make_console(), jobs.submitted(stage)
    chosen = [jobs.find(submitted, job_id, stage) for job_id in ids]
    if command == "log":
        (job,) = chosen
        failed = job.is_run and not job.active and job.state != "COMPLETED"
        failure = failure_text(job.folder) if failed else ""
        print("\n\n".join(filter(None, [failure, job.log_text()])))
    elif command == "path":
        print(chosen[0].folder)
    elif command == "show":
        (job,) = chosen
        if job.is_run and job.progress.steps:
            print_summary(console, load_run(job.folder))
        else:
            console.print(jobs.table(chosen))
    elif command == "cancel":
        cancelled = jobs.cancel(chosen)
        print(f"cancelled: {' '.join(cancelled) or 'none: they had ended'}")
    elif command == "follow":
        jobs.follow(console, chosen or [job for job in submitted if job.active], failure_text)
    elif not submitted:
        print(f"no job was submitted from {stage}")
    elif command == "resubmit":
        resubmit(stage, ids)
    else:
        console.print(jobs.table(submitted))


def resubmit(stage: Path, ids: list[str]) -> None:
    """Submit these jobs again, or all that failed; of two such commands at once the second finds nothing to do."""
    from nemo_bench.cluster import jobs
    from nemo_bench.cluster.job import FAILURES
    from nemo_bench.files import locked
    from nemo_bench.launch import submission

    with locked(stage / ".resubmit.lock", "resubmits jobs", print):
        submitted = jobs.submitted(stage)
        # What was cancelled was meant to end.
        failed = [job for job in submitted if job.is_run and job.state in FAILURES]
        chosen = [jobs.find(submitted, job_id, stage) for job_id in ids] if ids else failed
        again = [job for job in chosen if "resubmitted_as" not in job.content]
        for job in again:
            print(f"job {submission.resubmit(job).job_id}: {job.folder.name} again")
    if not again:
        print("no job to resubmit: none has failed that was not submitted again")


if __name__ == "__main__":
    cli.Application().run(main)
