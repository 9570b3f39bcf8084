"""A command as one Slurm job: the request, the batch script, the submission, and Slurm's words for its state.

submitit submits it, and reads the job's id; its own script would start Python from a pickle, and leave no place for
what has to be done outside a container after srun has ended (exit status, requeue).
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_bench.config import ClusterConfig
from nemo_bench.errors import BenchError
from nemo_bench.project import python_path
from nemo_bench.record.folder import EXIT

# Slurm's words for a job that will run (again) without anybody's help, or runs.
ACTIVE = (
    *("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED"),
    *("SIGNALING", "STOPPED", "STOPPING", "RESIZING", "RESV_DEL_HOLD", "SPECIAL_EXIT", "STAGE_OUT"),
)
UNKNOWN = "UNKNOWN"  # Slurm did not answer, or has forgotten it: neither active nor failed
FAILURES = ("FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "PREEMPTED", "REVOKED")


def sbatch_options(
    c: ClusterConfig, *, name: str, nodes: int, ntasks_per_node: int, folder: Path, requeue: bool, signal: str | None
) -> dict[str, Any]:
    """sbatch\'s long options and their values (True: no value), in a fixed order."""
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
        "gpus-per-node": c.requested_gpus_per_node if c.gres is None else None,
        "gres": c.gres,
        "exclusive": c.exclusive or None,
        "mem": c.mem,
        "time": c.time,
        "dependency": c.dependency,
        "comment": c.comment,
        "output": f"{folder}/slurm-%j.out",
        "open-mode": "append",
        "signal": signal,
        "requeue": requeue or None,
        "no-requeue": not requeue or None,
        **{option.replace("_", "-"): value for option, value in c.additional_parameters.items()},
    }
    return {option: value for option, value in options.items() if value is not None and value is not False}


def sbatch_lines(options: dict[str, Any]) -> list[str]:
    """The `#SBATCH` lines of these options."""
    return [
        f"#SBATCH --{name}" if value is True else f"#SBATCH --{name}={shlex.quote(str(value))}"
        for name, value in options.items()
    ]


def command_script(cluster: ClusterConfig, name: str, command: list[str], folder: Path) -> str:
    """The sbatch script of one command on one node, with this interpreter's environment and all the node's cores.

    Its exit status goes to `folder`/exit.json. The command must be one that can be killed and run again: the job is
    requeued when it is preempted or its node fails.
    """
    # No srun: a step of one task would be bound to one core.
    options = sbatch_options(cluster, name=name, nodes=1, ntasks_per_node=1, folder=folder, requeue=True, signal=None)
    # What this interpreter needs besides: a project unpacked from a bundle has its packages on the path.
    inherited = cluster.env.get("PYTHONPATH") or os.environ.get("PYTHONPATH")
    exports = {**cluster.env, "PYTHONPATH": python_path(inherited), "PYTHONUNBUFFERED": "1"}
    lines = [
        "#!/bin/bash",
        *sbatch_lines(options),
        "",
        f"FOLDER={shlex.quote(str(folder))}",
        f'rm -f "$FOLDER/{EXIT}"',
        *(f"export {variable}={shlex.quote(value)}" for variable, value in exports.items()),
        *cluster.setup,
        "",
        shlex.join(command),
        "status=$?",
        *record_status("FOLDER"),
    ]
    return "\n".join(lines)


def record_status(folder_variable: str) -> list[str]:
    """Shell lines that leave `$status` in the folder, in one step, and end the script with it."""
    folder = f"${folder_variable}"
    return [
        f'printf \'{{"exit_code": %d, "job_id": "%s", "ended_at": "%s"}}\\n\' "$status" "$SLURM_JOB_ID" '
        f'"$(date -u +%Y-%m-%dT%H:%M:%SZ)" > "{folder}/.{EXIT}.tmp"',
        f'mv "{folder}/.{EXIT}.tmp" "{folder}/{EXIT}"',
        'exit "$status"',
        "",
    ]


@contextlib.contextmanager
def _outside_of_any_job() -> Iterator[None]:
    """Hides the environment's SLURM_* and SBATCH_*: sbatch would put them before the script's own options.

    What conf/cluster/slurm.yaml reads of them is in the configuration by now; SLURM_CONF says which cluster is meant.
    Also HYDRA_FULL_ERROR, which cli.py sets for this process alone: a job is to end in a message too.
    """
    hidden = {
        name: os.environ.pop(name)
        for name in list(os.environ)
        if name.startswith(("SLURM_", "SBATCH_", "SRUN_", "HYDRA_")) and name != "SLURM_CONF"
    }
    try:
        yield
    finally:
        os.environ.update(hidden)


@dataclass(frozen=True)
class TestOnly:
    """What `sbatch --test-only` said."""

    accepted: bool
    message: str


def have_sbatch() -> bool:
    """Whether this machine can submit."""
    return shutil.which("sbatch") is not None


def test_only(script: str) -> TestOnly:
    """Asks the scheduler whether it would take the job, and submits nothing."""
    with _outside_of_any_job():
        done = subprocess.run(
            ["sbatch", "--test-only"], input=script, capture_output=True, text=True, timeout=60, check=False
        )
    return TestOnly(done.returncode == 0, _scheduler_words(done.stderr))


def _scheduler_words(stderr: str) -> str:
    lines = [re.sub(r"^(sbatch|allocation failure): (error: )?", "", line) for line in stderr.strip().splitlines()]
    return "; ".join(dict.fromkeys(line for line in lines if line)) or "no reason given"


def submit(script: str, name: str, folder: Path) -> str:
    """Submits a batch script and returns the job's id; submitit keeps the script in `folder`.

    Raises:
        BenchError: the scheduler refused `name`, in its own words.
    """
    import submitit
    from submitit.core.utils import FailedJobError

    class Executor(submitit.SlurmExecutor):
        """submitit's, with our script in place of its own."""

        def _make_submission_file_text(self, command: str, uid: str) -> str:
            return script

    executor = Executor(folder=folder)
    try:
        # submitit repeats sbatch's words on stderr; ours below say them once
        with _outside_of_any_job(), contextlib.redirect_stderr(io.StringIO()):
            return str(executor._submit_command("").job_id)
    except (FailedJobError, subprocess.SubprocessError) as error:
        words = [line for line in str(error).splitlines() if "error" in line.lower()]
        raise BenchError(
            f"Slurm refused {name}: {_scheduler_words(chr(10).join(words) or str(error))}\n"
            "cluster.account, cluster.partition, cluster.qos, cluster.time and the number of nodes are what it checks"
        ) from None


def _ask(command: list[str]) -> list[list[str]]:
    """Rows of a Slurm command's `|`-separated output; none where it is missing or knows nothing."""
    if shutil.which(command[0]) is None:
        return []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return []
    return [line.split("|") for line in done.stdout.splitlines() if line.strip()]


def states(job_ids: Iterable[str]) -> dict[str, str]:
    """Slurm's state of each job that Slurm still knows, such as RUNNING or TIMEOUT."""
    ids = list(job_ids)
    states: dict[str, str] = {}
    if ids:
        # "CANCELLED by 0" is CANCELLED
        for job_id, state in _ask(["sacct", "-n", "-P", "-X", "-o", "JobID,State", "-j", ",".join(ids)]):
            states[job_id] = state.split()[0]
        # All of the user's, rather than these: squeue fails as a whole over one job that it has forgotten.
        for job_id, state in _ask(["squeue", "-h", "-t", "all", "--me", "-o", "%i|%T"]):
            if job_id in ids:
                states[job_id] = state
    return states


def scancel(job_ids: list[str]) -> None:
    """Raises BenchError where scancel refuses."""
    if job_ids:
        done = subprocess.run(["scancel", *job_ids], capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            raise BenchError(f"scancel {' '.join(job_ids)}: {done.stderr.strip()}")
