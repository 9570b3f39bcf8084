"""Jobs submitted to Slurm. Commands:

list      all submitted runs: state, step reached, step time (the default)
follow    the active ones, or these, until they end
log       why a job failed, and the end of its logs
show      a run's numbers; --path: a job's folder
cancel    these jobs
resubmit  these jobs, or all failed ones, with the configuration they had
"""

import nemo_bench.startup  # noqa: F401  # isort: skip  (first)
import argparse
from pathlib import Path

from nemo_bench import cli
from nemo_bench.composition import default_stage_path
from nemo_bench.errors import BenchError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = ("list", "follow", "log", "show", "cancel", "resubmit")
    parser.add_argument("command", nargs="?", choices=commands, default="list")
    parser.add_argument("job", nargs="*")
    parser.add_argument("--path", action="store_true")
    parser.add_argument("--stage", type=Path, default=default_stage_path(), help="stage folder (STAGE_PATH)")
    arguments = parser.parse_intermixed_args()
    command, ids = arguments.command, arguments.job
    if (command in ("log", "show") and len(ids) != 1) or (command == "cancel" and not ids):
        parser.error(f"{command} takes the id of a job")
    run("path" if arguments.path else command, arguments.stage.absolute(), ids)


def run(command: str, stage: Path, ids: list[str]) -> None:
    from nemo_bench.cluster import jobs
    from nemo_bench.launch.diagnosis import failure_text
    from nemo_bench.launch.submission import resubmit
    from nemo_bench.report.runs import load_run
    from nemo_bench.report.terminal import make_console, print_summary

    if not stage.is_dir() and (stage.exists() or str(stage) != default_stage_path()):
        raise BenchError(f"{stage} is not a folder: --stage (or STAGE_PATH) must name a stage folder")
    console, submitted = make_console(), jobs.submitted(stage)
    chosen = [jobs.find(submitted, job_id, stage) for job_id in ids]
    if command == "log":
        failed = chosen[0].is_run and not chosen[0].active and chosen[0].state != "COMPLETED"
        failure = failure_text(chosen[0].folder) if failed else ""
        print("\n\n".join(filter(None, [failure, chosen[0].log_text()])))
    elif command == "path":
        print(*[job.folder for job in chosen], sep="\n")
    elif command == "show" and chosen[0].is_run and chosen[0].progress.steps:
        print_summary(console, load_run(chosen[0].folder))
    elif command == "cancel":
        print(f"cancelled: {' '.join(jobs.cancel(chosen)) or 'none: they had ended'}")
    elif command == "follow":
        jobs.follow(chosen or [job for job in submitted if job.active], failure_text)
    elif not submitted:
        print(f"no job was submitted from {stage}")
    elif command == "resubmit":
        resubmit(stage, ids)
    else:
        console.print(jobs.table(chosen or submitted))


if __name__ == "__main__":
    cli.Application().run(main)
