"""Jobs, runs of train.py and other commands alike, each a folder: submitted, listed, followed, cancelled."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from nemo_bench.cli import quoted_path
from nemo_bench.cluster import slurm
from nemo_bench.cluster.job import Job
from nemo_bench.cluster.request import slurm_rules
from nemo_bench.errors import BenchError, ConfigurationRefused, Need, RunFailed
from nemo_bench.files import explained_disk_errors, write_json, write_text
from nemo_bench.project import PROJECT, python_path
from nemo_bench.record import folder as record
from nemo_bench.report.build import build_report
from nemo_bench.report.runs import load_run
from nemo_bench.report.terminal import make_console, print_summary

FOLDERS = ("results/*/*/*/*/*", "results.data_preparation/*/*", "results.stage_setup/*", "results.machine_check/*")
TICK_S = 1.0


def require_slurm(cfg: Any) -> None:
    """Raise BenchError where the jobs of a configuration cannot be submitted."""
    if cfg.cluster.scheduler != "slurm":
        raise BenchError(f"cluster={cfg.cluster.name}: hydra/launcher=submitit_slurm needs cluster=slurm")
    if cfg.launch != "dry" and shutil.which("sbatch") is None:
        others = "without hydra/launcher=... (train.py: and with scale=local) it is done here"
        login = "sbatch is not on this machine: submit from a login node of the cluster."
        raise BenchError(f"{login}\nlaunch=dry prints the scripts; {others}")


def check_command(cfg: Any) -> None:
    """Raise BenchError if the configuration of a command, not of a run, asks Slurm for what it cannot give."""
    slurm_rules(cfg, need := Need(cfg))
    if need.problems:
        raise ConfigurationRefused(need.problems)
    require_slurm(cfg)


def show_scripts(scripts: Sequence[str], texts: Sequence[str] = ()) -> None:
    """Print what launch=dry does not submit: batch scripts, or `texts` about them; BenchError if Slurm refuses one."""
    refused = 0
    for script, text in zip(scripts, texts or scripts):
        print(text)
        if shutil.which("sbatch") is not None:
            _, is_refused, words = slurm.sbatch("--test-only", input=script)
            print(f"sbatch --test-only: {'REFUSED: ' if is_refused else ''}{words}")
            refused += is_refused
    print("launch=dry: nothing was submitted.")
    if refused:
        raise BenchError(f"Slurm refuses {refused} of {len(scripts)} jobs, as sbatch says above")


def command_script(script: str, overrides: list[str], cfg: Any, name: str, folder: Path) -> str:
    """Return the batch script that does on one node, in our working folder, what these overrides ask of a script.

    The command must bear being killed and run again: it is requeued.
    """
    # What concerns the submission alone, or is given as this process sees it, is left out.
    kept = [text for text in overrides if not re.match(r"\+*(cluster|launch|stage_path|wait)\b", text)]
    command = [sys.executable, "-u", str(PROJECT / script), "cluster=local", *kept]
    command.append(f"stage_path={quoted_path(cfg.stage_path)}")
    # No srun: a step of one task would be bound to one core. Its path: a project unpacked from a bundle needs it.
    inherited = cfg.cluster.env.get("PYTHONPATH") or os.environ.get("PYTHONPATH")
    environment = {**cfg.cluster.env, "PYTHONPATH": python_path(inherited), "PYTHONUNBUFFERED": "1"}
    return slurm.batch_script(cfg.cluster, name=name, folder=folder, command=command, environment=environment)


def submit_commands(scripts: Sequence[tuple[str, Path]], stage: Path, hint: str, *, dry: bool, wait: bool) -> None:
    """Submit each batch script as the job of a new folder, and with `wait` follow the jobs; `dry` only shows them.

    What a job of this stage folder does already, or will, is not submitted again.
    """
    if dry:
        show_scripts([script for script, _ in scripts])
        return
    active = {_work(job.folder, (job.folder / slurm.SCRIPT).read_text()): job for job in submitted(stage) if job.active}
    followed = []
    for script, folder in scripts:
        if job := active.get(_work(folder, script)):
            print(f"job {job.job_id} does this already: {job.name}, log {job.log}", flush=True)
            followed.append(job)
            continue
        with explained_disk_errors(folder.parents[1], "choose another stage folder (STAGE_PATH, or stage_path=...)"):
            folder.mkdir(parents=True)
            followed.append(job := submit(script, folder))
        print(f"job {job.job_id}: {job.name}, log {job.log}", flush=True)
    print(f"{hint}; python jobs.py lists the jobs", flush=True)
    if wait:
        follow(followed)


def _work(folder: Path, script: str) -> str:
    """Return a batch script without the folder of its job: what two of the same work have in common."""
    return script.replace(str(folder), "")


def submit(script: str, folder: Path, **details: Any) -> Job:
    """Submit a batch script as the job of `folder`; `details` are what `job.json` is to hold besides.

    `job.json` is there before the job is, without an id: whatever happens then, the job is looked for by its script.
    Raises slurm.Refused, with no `job.json` left; or BenchError, where the job may have been submitted.
    """
    (quoted_name,) = re.findall(r"^#SBATCH --job-name=(.*)$", script, re.MULTILINE)
    job = _recorded(folder, None, shlex.split(quoted_name)[0], details)
    try:
        job_id = slurm.submit(script, folder, job.name)
    except slurm.Refused:
        (folder / record.JOB).unlink()
        raise
    try:
        return _recorded(folder, job_id, job.name, details)
    except OSError as error:
        raise BenchError(f"job {job_id} was submitted, then: {error}\n`scancel {job_id}` takes it back") from None


def adopt(script: str, folder: Path, **details: Any) -> Job:
    """Keep a batch script in `folder` as one that runs in the job that this process is part of."""
    write_text(folder / slurm.SCRIPT, script)
    name = os.environ.get("SLURM_JOB_NAME")
    return _recorded(folder, os.environ["SLURM_JOB_ID"], name, {"adopted": True, **details})


def _recorded(folder: Path, job_id: str | None, name: str | None, details: dict[str, Any]) -> Job:
    content = {"id": job_id, "name": name, "submitted_at": record.timestamp()}
    content |= {"command": shlex.join(["python", *sys.argv]), **details}
    write_json(folder / record.JOB, content)
    return Job(folder, content)


def submitted(stage: Path) -> list[Job]:
    """Return all jobs that were submitted from this stage folder, the oldest first, as they stand now."""
    folders = [path.parent for pattern in FOLDERS for path in stage.glob(f"{pattern}/{record.JOB}")]
    contents = [(folder, _content(folder)) for folder in folders]
    contents.sort(key=lambda job: (str(job[1].get("submitted_at")), len(str(job[1].get("id"))), str(job[1].get("id"))))
    jobs = [Job(folder, content) for folder, content in contents]
    for job in jobs:
        job.done()
    return jobs


def _content(folder: Path) -> dict[str, Any]:
    """Return what `job.json` holds, with the id that Slurm knows where its submission was interrupted."""
    try:
        content = record.read_object(folder / record.JOB)
    except (OSError, ValueError) as error:
        return {"problem": f"unreadable {record.JOB}: {error}"}
    if content.get("id") is None:
        content["id"] = slurm.find(folder, str(content.get("name")))
        if content["id"] is None:
            return {**content, "problem": "its submission was interrupted, and Slurm knows no job of this folder"}
        with suppress(OSError):  # another user's
            write_json(folder / record.JOB, content)
    return content


def find(jobs: Sequence[Job], job_id: str, stage: Path) -> Job:
    """Return the job of that id among those of a stage folder; raise BenchError if there is none."""
    for job in reversed(jobs):
        if job.job_id == job_id:
            return job
    last = ", ".join(job.job_id for job in jobs[-12:]) or "none"
    hint = "--stage (or STAGE_PATH) names another stage folder"
    raise BenchError(f"no job {job_id} was submitted from {stage}; the last ones: {last}\n{hint}")


def cancel(jobs: Iterable[Job]) -> list[str]:
    """Cancel the jobs that are still active and return their ids; raise BenchError if scancel refuses."""
    active = [job for job in jobs if job.active]
    try:
        for job in active:
            job.cancel()
    except subprocess.CalledProcessError as error:
        raise BenchError(f"{shlex.join(error.cmd)} failed") from None
    return [job.job_id for job in active]


def table(jobs: Sequence[Job]) -> Group:
    """Return the listing: a table, then for each job its folder, and what there is to say of it."""
    results = ("TFLOP/s", "MFU", "verdict") if any(job.is_run and job.state == "COMPLETED" for job in jobs) else ()
    columns = [Column("job", no_wrap=True), Column("state", no_wrap=True), Column("point or command", overflow="fold")]
    for name in ("step", "step time (s)", *results):
        columns.append(Column(name, justify="right", no_wrap=name != "verdict"))
    listing = Table(*columns, box=box.SIMPLE_HEAD)
    above = Path(os.path.commonpath([job.folder.parent for job in jobs]))
    notes = [] if Job.watcher.answered else ["Slurm does not answer: the states are what the jobs have left"]
    notes.append(f"folders, in {above}:")
    for job in jobs:
        cells = [job.job_id, job.state, job.what]
        if job.is_run:
            cells += [f"{job.progress.steps}/{job.content.get('max_steps', 0)}", *_result(job)]
        listing.add_row(*map(Text, cells))  # plain: an error may hold square brackets, rich's own markup
        notes.append(f"{job.job_id}  {job.folder.relative_to(above)}")
        if job.reason:
            notes.append(f"    {job.state}: {job.reason}")
    return Group(listing, Text("\n".join(notes)))


def _result(job: Job) -> list[str]:
    """Return the step time; of a completed run also TFLOP/s a GPU, MFU and verdict, which are kept in `job.json`."""
    if job.state == "COMPLETED" and "result" not in job.content:
        with suppress(BenchError, ValueError):  # its record is damaged, or names no point
            (point,) = build_report([job.folder]).points
            numbers = point.numbers
            values = (numbers.step_time_s, numbers.tflops_per_gpu, numbers.mfu) if numbers else (None, None, None)
            forms = (".4g", ".4g", ".1%")
            shown = ["" if value is None else f"{value:{form}}" for value, form in zip(values, forms)]
            job.content = {**job.content, "result": [*shown, point.verdict.value]}
            with suppress(OSError):  # another user's
                write_json(job.folder / record.JOB, job.content)
    step_time_s = job.progress.step_time_s
    return list(job.content.get("result", [f"{step_time_s:.4g}" if step_time_s else ""]))


def follow(jobs: Sequence[Job], explain: Callable[[Path], str] | None = None) -> None:
    """Show these jobs until all are over, then the numbers of the runs and the logs of the commands.

    Raises RunFailed if a job did not complete, with the words of `explain` about its folder, or on Ctrl-C, which leaves
    the jobs running.
    """
    console = make_console()
    if not jobs:
        console.print("no job is active")
        return
    try:
        with Live(console=console, refresh_per_second=2) as live:
            while not all([job.done() for job in jobs]):
                live.update(table(jobs))
                time.sleep(TICK_S)
            live.update(table(jobs))
    except KeyboardInterrupt:
        ids = " ".join(job.job_id for job in jobs if not job.over)
        raise RunFailed(f"stopped watching; the jobs go on ({ids}): python jobs.py follow shows them", 130) from None
    for job in jobs:
        if not job.is_run:
            print(f"\n{job.log_text()}")  # where there is no terminal, the table has no last line end
        elif job.state == "COMPLETED":
            print_summary(console, load_run(job.folder))
    failed = [job for job in jobs if job.state != "COMPLETED"]
    if not failed:
        print(f"all {len(jobs)} jobs completed")
        return
    lines = [f"{len(failed)} of {len(jobs)} jobs did not complete:"]
    for job in failed:
        lines.append(f"  job {job.job_id} ({job.what}): {job.state}: {job.reason or 'see its log'}")
        if explain is not None and job.is_run:
            lines += [f"    {line}" for line in explain(job.folder).splitlines()]
    lines += ["python jobs.py log JOB shows more"]
    raise RunFailed("\n".join(lines), 1 if failed[0].is_run else failed[0].exit_code or 1)
