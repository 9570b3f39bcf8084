"""Slurm's commands: batch scripts, their submission, and what Slurm knows of our jobs."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from submitit.slurm.slurm import SlurmInfoWatcher

from nemo_bench.config import ClusterConfig
from nemo_bench.errors import BenchError
from nemo_bench.files import write_text
from nemo_bench.project import PROJECT

FAILURES = ("FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "PREEMPTED", "REVOKED")
UNKNOWN = "UNKNOWN"  # Slurm did not answer, or has forgotten the job
SCRIPT = "job.sbatch"
TIMEOUT_S = 30  # of sbatch, squeue, sacct and scontrol
ASK_EVERY_S = 10
# sbatch's words for a controller that may have taken the job all the same.
_NO_ANSWER = re.compile(
    "timed out|Unable to contact|Zero Bytes|Unexpected message|connect failure|reset by|configuration source", re.I
)


class Refused(BenchError):
    """The scheduler refused a job, in its own words."""


def batch_script(
    c: ClusterConfig,
    *,
    name: str,
    folder: Path,
    command: list[str],
    environment: Mapping[str, str],
    nodes: int = 1,
    ntasks_per_node: int = 1,
    requeue: bool = True,
    signal: str | None = None,
    template: str = "cluster/job.sbatch.j2",
) -> str:
    """Return the batch script of a command whose log and records go to `folder`; `template` is within nemo_bench/."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    where = ("account", "partition", "qos", "reservation", "constraint", "nodelist", "exclude")
    options: dict[str, Any] = {
        "job-name": name,
        **{option: getattr(c, option) for option in where},
        "nodes": nodes,
        "ntasks-per-node": ntasks_per_node,
        "cpus-per-task": c.cpus_per_task,
        "gpus-per-node": c.gpus_per_node if c.gres is None else None,
        **{option: getattr(c, option) for option in ("gres", "exclusive", "mem", "time", "dependency", "comment")},
        "output": f"{literal(folder)}/slurm-%j.out",
        "open-mode": "append",
        "signal": signal,
        "requeue" if requeue else "no-requeue": True,
        **{option.replace("_", "-"): value for option, value in c.additional_parameters.items()},
    }
    lines = [
        f"#SBATCH --{option}" if value is True else f"#SBATCH --{option}={shlex.quote(str(value))}"
        for option, value in options.items()
        if value is not None and value is not False
    ]
    loader = FileSystemLoader(PROJECT / "nemo_bench")
    jinja = Environment(loader=loader, trim_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined)
    jinja.filters["quoted"] = shlex.quote
    values = {"folder": str(folder), "environment": environment, "setup": c.setup, "command": shlex.join(command)}
    return jinja.get_template(template).render(sbatch_lines="\n".join(lines), **values)


def literal(path: Path) -> str:
    """Return a path as Slurm's file name patterns have it: `%` stands for a number there."""
    return str(path).replace("%", "%%")


def submit(script: str, folder: Path, name: str) -> str:
    """Submit the batch script of job `name`, which is kept in `folder`, and return the job's id.

    Raises Refused; or BenchError, where nobody knows whether the scheduler took the job.
    """
    path = folder / SCRIPT
    write_text(path, script)
    printed, refused, words = sbatch("--parsable", str(path))
    if refused:
        checked = "cluster.account, cluster.partition, cluster.qos, cluster.time and the number of nodes"
        raise Refused(f"Slurm refused {name}: {words}\nit checks {checked}")
    # A site's own sbatch may print more; a federation adds `;cluster`.
    job_id = (printed.split() or [""])[-1].partition(";")[0]
    if job_id.isdigit():
        return job_id
    if (known := find(folder, name)) is not None:
        return known
    advice = f"if it did, python jobs.py lists the job; its batch script is {path}"
    raise BenchError(f"sbatch did not say whether Slurm took {name}: {words}\n{advice}")


def find(folder: Path, name: str) -> str | None:
    """Return the id of the job whose batch script lies in `folder`, if Slurm has one."""
    rows = _answer("squeue", "-h", "-t", "all", "-n", name, "-o", "%i|%o") or ""
    ids = [row.partition("|")[0] for row in rows.splitlines() if is_script_of(folder, row)]
    return ids[-1] if ids else None


def is_script_of(folder: Path, command: str) -> bool:
    """Return whether a command that Slurm shows is the batch script in `folder`, however its stage folder is reached.

    It tells jobs apart: the name of the folder, or of its parent, holds a date and a random number.
    """
    return "/".join([*folder.parts[-2:], SCRIPT]) in command


class Books(SlurmInfoWatcher):
    """What Slurm knows of all registered jobs, asked for at once.

    submitit's own asks sacct alone, and waits for ever. squeue is fresher, and there where no accounts are kept.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.answered = False  # whether a job that is in neither list is unknown to Slurm

    def update_if_long_enough(self, mode: str) -> None:
        if time.time() - self._last_status_check > ASK_EVERY_S:
            self.update()

    def update(self) -> None:
        self._last_status_check = time.time()
        # By name: squeue fails as a whole over the id of one job that it has forgotten.
        squeue = _answer("squeue", "-h", "-t", "all", "-n", ",".join(self.names), "-o", "%i|%T|%o")
        ids = ",".join(sorted(self._registered))
        sacct = _answer("sacct", "-n", "-a", "-X", "-P", "-o", "JobID,State,SubmitLine", "-j", ids)
        self.answered = squeue is not None
        for rows in (sacct, squeue):
            self._info_dict.update(self.read_info(f"JobID|State|Command\n{rows or ''}"))


def sbatch(*arguments: str, input: str | None = None) -> tuple[str, bool, str]:
    """Return what sbatch prints if it succeeds, whether the scheduler refuses the job, and the scheduler's words.

    A scheduler that cannot be asked refuses nothing.
    """
    try:
        done = _run("sbatch", *arguments, input=input)
    except subprocess.TimeoutExpired:
        return "", False, f"no answer within {TIMEOUT_S} s"
    lines = [re.sub(r"^(sbatch|allocation failure): (error: )?", "", line) for line in done.stderr.splitlines()]
    words = "; ".join(dict.fromkeys(filter(None, lines))) or "no reason given"
    if done.returncode:
        return "", not _NO_ANSWER.search(words), words
    return done.stdout, False, words


def _run(*command: str, input: str | None = None) -> subprocess.CompletedProcess[str]:
    # The variables of a job that this process runs in would win over the script's own options; what MPI and CUDA have
    # here is not what a node has. SLURM_CONF says which cluster is meant; cli.py sets HYDRA_FULL_ERROR for itself.
    hidden = ("SLURM_", "SBATCH_", "SRUN_", "SQUEUE_", "SACCT_", "HYDRA_", "PMI_", "PMIX_", "CUDA_VISIBLE_DEVICES")
    env = {name: value for name, value in os.environ.items() if name == "SLURM_CONF" or not name.startswith(hidden)}
    # As paths are read, which may hold bytes that are no text in this locale.
    encoding, errors = sys.getfilesystemencoding(), "surrogateescape"
    return subprocess.run(
        command, input=input, capture_output=True, timeout=TIMEOUT_S, env=env, encoding=encoding, errors=errors
    )


def _answer(*command: str) -> str | None:
    """Return what a Slurm command prints; None if it is missing, fails or does not answer in time."""
    try:
        done = _run(*command)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
