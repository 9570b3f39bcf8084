"""Lists the jobs submitted to Slurm, shows a log, cancels, resubmits (`--help`)."""

import nemo_bench.interrupt  # noqa: F401  # isort: skip  (first: quiet on Ctrl-C)
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
    commands.add_parser("log", help="why a job failed, and the end of its logs").add_argument("job")
    commands.add_parser("cancel", help="these jobs").add_argument("job", nargs="+")
    commands.add_parser(
        "resubmit", help="these jobs, or all failed ones, with the configuration they had"
    ).add_argument("job", nargs="*")
    arguments = parser.parse_args()
    run(arguments)


def run(arguments: argparse.Namespace) -> None:
    from nemo_bench.cluster import jobs, slurm
    from nemo_bench.launch.diagnosis import failure_text
    from nemo_bench.launch.submission import resubmit
    from nemo_bench.report.terminal import make_console

    stage = Path(arguments.stage).absolute()
    if not stage.is_dir() and (stage.exists() or str(stage) != default_stage_path()):
        raise BenchError(f"{stage} is not a folder: --stage (or STAGE_PATH) must name a stage folder")
    console, submitted = make_console(), jobs.submitted(stage)
    ids = [arguments.job] if arguments.command == "log" else getattr(arguments, "job", [])
    chosen = [jobs.find(submitted, job_id, stage) for job_id in ids]
    if arguments.command == "log":
        (job,) = chosen
        try:
            failure = failure_text(job.folder) if job.is_run and (job.failed or job.lost) else ""
        except (OSError, ValueError) as error:  # a full disk may have cut the record off
            failure = f"unreadable record: {error}"
        print("\n\n".join(filter(None, [failure, job.log_text()])))
    elif arguments.command == "cancel":
        cancelled = jobs.cancel(chosen)
        print(f"cancelled: {' '.join(cancelled) or 'none: they had ended'}")
    elif arguments.command == "follow":
        jobs.follow(console, chosen or [job for job in submitted if job.active])
    elif arguments.command == "resubmit":
        # What was cancelled was meant to end.
        failed = [job for job in submitted if job.is_run and job.state in slurm.FAILURES]
        again = chosen or [job for job in failed if "resubmitted_as" not in job.content]
        for job in again:
            print(f"job {resubmit(job).job_id}: {job.folder.name} again")
        if not again:
            print("no job has failed that was not submitted again")
    elif submitted:
        console.print(jobs.table(submitted))
    else:
        print(f"no job was submitted from {stage}")


if __name__ == "__main__":
    cli.Application().run(main)
