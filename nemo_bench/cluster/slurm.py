"""Slurm's commands: the batch script of a command, its submission, and what Slurm knows of our jobs."""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from submitit.slurm.slurm import SlurmInfoWatcher

from nemo_bench.config import ClusterConfig
from nemo_bench.errors import BenchError
from nemo_bench.files import write_text
from nemo_bench.project import python_path
from nemo_bench.record.folder import EXIT, JOB

# Slurm's words for a job that runs, or will run (again) without anybody's help.
ACTIVE = (
    *("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED"),
    *("SIGNALING", "STOPPED", "STOPPING", "RESIZING", "RESV_DEL_HOLD", "SPECIAL_EXIT", "STAGE_OUT"),
)
FAILURES = ("FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "PREEMPTED", "REVOKED")
UNKNOWN = "UNKNOWN"  # Slurm did not answer, or has forgotten it: neither active nor failed
SCRIPT = "job.sbatch"
TIMEOUT_S = 30  # of sbatch, squeue, sacct and scontrol
ASK_EVERY_S = 10
ASK_SOON_S = 5  # about a job whose batch script has ended
# sbatch's words for a controller that may have taken the job all the same.
_NO_ANSWER = re.compile(
    r"timed out|Unable to contact|Zero Bytes|Unexpected message|connect failure|reset by peer", re.I
)


class Refused(BenchError):
    """The scheduler refused a job, in its own words."""


def sbatch_lines(
    c: ClusterConfig, *, name: str, nodes: int, ntasks_per_node: int, folder: Path, requeue: bool, signal: str | None
) -> list[str]:
    """Return the `#SBATCH` lines of a job whose log goes to `folder`."""
    options: dict[str, Any] = {
        "job-name": name,
        "account": c.account,
        "partition": c.partition,
        "qos": c.qos,
        "reservation": c.reservation,
        "constraint": c.constraint,
        "nodelist": c.nodelist,
        "exclude": c.exclude,
        "nodes": nodes,
        "ntasks-per-node": ntasks_per_node,
        "cpus-per-task": c.cpus_per_task,
        "gpus-per-node": c.gpus_per_node if c.gres is None else None,
        "gres": c.gres,
        "exclusive": c.exclusive,
        "mem": c.mem,
        "time": c.time,
        "dependency": c.dependency,
        "comment": c.comment,
        "output": f"{literal(folder)}/slurm-%j.out",
        "open-mode": "append",
        "signal": signal,
        "requeue": requeue,
        "no-requeue": not requeue,
        **{option.replace("_", "-"): value for option, value in c.additional_parameters.items()},
    }
    return [
        f"#SBATCH --{option}" if value is True else f"#SBATCH --{option}={shlex.quote(str(value))}"
        for option, value in options.items()
        if value is not None and value is not False
    ]


def command_script(cluster: ClusterConfig, name: str, command: list[str], folder: Path) -> str:
    """Return the batch script of one command on one node, with this interpreter and all the node's cores.

    The command must bear being killed and run again: the job is requeued when it is preempted or its node fails.
    """
    # What this interpreter needs besides: a project unpacked from a bundle has its packages on the path.
    inherited = cluster.env.get("PYTHONPATH") or os.environ.get("PYTHONPATH")
    exports = {**cluster.env, "PYTHONPATH": python_path(inherited), "PYTHONUNBUFFERED": "1"}
    lines = [
        "#!/bin/bash",
        *sbatch_lines(cluster, name=name, nodes=1, ntasks_per_node=1, folder=folder, requeue=True, signal=None),
        "",
        f"FOLDER={shlex.quote(str(folder))}",
        record_id("FOLDER"),
        f'rm -f "$FOLDER/{EXIT}"',
        *(f"export {variable}={shlex.quote(value)}" for variable, value in exports.items()),
        *cluster.setup,
        "",
        # No srun: a step of one task would be bound to one core.
        shlex.join(command),
        "status=$?",
        *record_status("FOLDER"),
    ]
    return "\n".join(lines)


def literal(path: Path) -> str:
    """Return a path as Slurm's file name patterns have it: `%` stands for a number there."""
    return str(path).replace("%", "%%")


def record_id(folder_variable: str) -> str:
    """Return the shell lines that put the job's id into `job.json`."""
    return (
        "# The process that submitted this may not have got to it.\n"
        f"""sed -i 's/"id": null/"id": "'$SLURM_JOB_ID'"/' "${folder_variable}/{JOB}\""""
    )


def record_status(folder_variable: str) -> list[str]:
    """Return the shell lines that leave `$status` in the folder, in one step, and end the script with it."""
    folder = f"${folder_variable}"
    return [
        f'printf \'{{"exit_code": %d, "job_id": "%s", "ended_at": "%s"}}\\n\' "$status" "$SLURM_JOB_ID" '
        f'"$(date -u +%Y-%m-%dT%H:%M:%SZ)" > "{folder}/.{EXIT}.tmp" &&',
        f'  mv "{folder}/.{EXIT}.tmp" "{folder}/{EXIT}"',
        'exit "$status"',
        "",
    ]


def environment() -> dict[str, str]:
    """Return the environment of Slurm's commands, and so of the jobs.

    sbatch would put the variables of a job that this process runs in before the script's own options; what MPI and CUDA
    have here is not what a node has; HYDRA_FULL_ERROR is this process's own. SLURM_CONF says which cluster is meant.
    """
    hidden = ("SLURM_", "SBATCH_", "SRUN_", "SQUEUE_", "SACCT_", "HYDRA_", "PMI_", "PMIX_", "CUDA_VISIBLE_DEVICES")
    return {name: value for name, value in os.environ.items() if name == "SLURM_CONF" or not name.startswith(hidden)}


def have_sbatch() -> bool:
    return shutil.which("sbatch") is not None


def test_only(script: str) -> tuple[bool, str]:
    """Return whether the scheduler would take the job, and what it says; nothing is submitted.

    A controller that cannot be asked refuses nothing.
    """
    try:
        done = _run(["sbatch", "--test-only"], input=script)
    except subprocess.TimeoutExpired:
        return True, f"no answer within {TIMEOUT_S} s"
    words = _scheduler_words(done.stderr)
    if done.returncode and (_NO_ANSWER.search(words) or "configuration source" in words):
        return True, f"no answer: {words}"
    return done.returncode == 0, f"{'REFUSED' if done.returncode else 'accepted'}: {words}"


def submit(script: str, folder: Path, name: str) -> str:
    """Submit the batch script of job `name`, which is kept in `folder`, and return the job's id.

    Raises:
        Refused: the scheduler does not take the job.
        BenchError: nobody knows whether it took the job.
    """
    path = folder / SCRIPT
    write_text(path, script)
    try:
        done = _run(["sbatch", "--parsable", str(path)])
        words = _scheduler_words(done.stderr)
        if done.returncode and not _NO_ANSWER.search(words):
            raise Refused(
                f"Slurm refused {name}: {words}\n"
                "it checks cluster.account, cluster.partition, cluster.qos, cluster.time and the number of nodes"
            )
        # A site's own sbatch may print more; a federation adds `;cluster`.
        job_id = (done.stdout.split() or [""])[-1].partition(";")[0]
        if done.returncode == 0 and job_id.isdigit():
            return job_id
    except subprocess.TimeoutExpired:
        words = f"no answer within {TIMEOUT_S} s"
    if (known := find(folder, name)) is not None:
        return known
    raise BenchError(
        f"sbatch did not say whether Slurm took {name}: {words}\n"
        f"if it did, python jobs.py lists the job; its batch script is {path}"
    )


def find(folder: Path, name: str) -> str | None:
    """Return the id of the job whose batch script lies in `folder`, if Slurm has one."""
    rows = _answer("squeue", "-h", "-t", "all", "-n", name, "-o", "%i|%o") or ""
    ids = [row.partition("|")[0] for row in rows.splitlines() if str(folder / SCRIPT) in row]
    return ids[-1] if ids else None


def job_name(script: str) -> str:
    """Return the name that a batch script asks for."""
    (line,) = re.findall(r"^#SBATCH --job-name=(.*)$", script, re.MULTILINE)
    return shlex.split(line)[0]


@functools.cache
def cluster_name() -> str | None:
    """Return the name of the cluster that this machine submits to."""
    match = re.search(r"^ClusterName\s*= (\S+)", _answer("scontrol", "show", "config") or "", re.MULTILINE)
    return match[1] if match else None


class Books(SlurmInfoWatcher):
    """What Slurm knows of all registered jobs, asked for at once.

    submitit's own asks sacct alone, and waits for it for ever. squeue knows more of the last minutes, and is there
    where the cluster keeps no accounts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.answered = False  # whether a job that is in neither list is unknown to Slurm

    def refresh(self, *, soon: bool) -> None:
        """Ask again, if the last time is long enough ago."""
        if time.time() - self._last_status_check > (ASK_SOON_S if soon else ASK_EVERY_S):
            self.update()

    def update(self) -> None:
        self._last_status_check = time.time()
        if not self._registered:
            return
        # By name: squeue fails as a whole over the id of one job that it has forgotten.
        squeue = _answer("squeue", "-h", "-t", "all", "-n", ",".join(self.names), "-o", "%i|%T|%V|%j")
        ids = ",".join(sorted(self._registered))
        sacct = _answer("sacct", "-n", "-a", "-X", "-P", "-o", "JobID,State,Submit,JobName", "-j", ids)
        self.answered = squeue is not None
        for rows in (sacct, squeue):
            self._info_dict.update(self.read_info(f"JobID|State|Submit|JobName\n{rows or ''}"))


def _run(command: list[str], input: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, input=input, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment(), check=False
    )


def _answer(*command: str) -> str | None:
    """Return what a Slurm command prints; None if it is missing, fails or does not answer in time."""
    try:
        done = _run(list(command))
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _scheduler_words(stderr: str) -> str:
    lines = [re.sub(r"^(sbatch|allocation failure): (error: )?", "", line) for line in stderr.strip().splitlines()]
    return "; ".join(dict.fromkeys(line for line in lines if line)) or "no reason given"
