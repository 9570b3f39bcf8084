"""One benchmark point as one Slurm job: the request, the batch script, the submission.

The request comes from the point's own configuration. The script is written out whole, so that what runs can be read in
the run folder and run again by hand. It starts the ranks with srun; they find everything else in the run folder.
Nothing is pickled: the interpreter on the nodes (a container's) may be another one than this.

submitit submits it, and reads the job's id and state; its own script would start Python from a pickle, and leave no
place for what has to be done outside a container after srun has ended (exit status, requeue).
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_bench.config import ClusterConfig, TrainConfig
from nemo_bench.entrypoints import entrypoint
from nemo_bench.errors import BenchError
from nemo_bench.project import PROJECT, python_path
from nemo_bench.record.folder import EXIT, REQUEUE


def job_name(cfg: TrainConfig) -> str:
    """Never `bash` or `interactive`, which Lightning takes for a shell."""
    return f"nemo-bench-{cfg.model.name}-{cfg.precision.name}-{cfg.world_size}gpu"


def sbatch_options(cfg: TrainConfig, run_dir: Path) -> dict[str, Any]:
    """sbatch's long options and their values (True: no value) for this point, in a fixed order."""
    # Without checkpoints there is nothing to go on from: a requeued run would only start over.
    signal = f"USR1@{cfg.cluster.signal_s}" if _checkpoints(cfg) else None
    return _options(
        cfg.cluster,
        name=job_name(cfg),
        nodes=cfg.trainer.num_nodes,
        ntasks_per_node=cfg.trainer.devices,
        folder=run_dir,
        requeue=_checkpoints(cfg),
        signal=signal,
    )


def _options(
    c: ClusterConfig, *, name: str, nodes: int, ntasks_per_node: int, folder: Path, requeue: bool, signal: str | None
) -> dict[str, Any]:
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


def _flags(options: dict[str, Any]) -> list[str]:
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
    options = _options(cluster, name=name, nodes=1, ntasks_per_node=1, folder=folder, requeue=True, signal=None)
    # What this interpreter needs besides: a project unpacked from a bundle has its packages on the path.
    inherited = cluster.env.get("PYTHONPATH") or os.environ.get("PYTHONPATH")
    exports = {**cluster.env, "PYTHONPATH": python_path(inherited), "PYTHONUNBUFFERED": "1"}
    lines = [
        "#!/bin/bash",
        *_flags(options),
        "",
        f"FOLDER={shlex.quote(str(folder))}",
        f'rm -f "$FOLDER/{EXIT}"',
        *(f"export {variable}={shlex.quote(value)}" for variable, value in exports.items()),
        *cluster.setup,
        "",
        shlex.join(command),
        "status=$?",
        *_record_status("FOLDER"),
    ]
    return "\n".join(lines)


def _record_status(folder_variable: str) -> list[str]:
    """Shell lines that leave `$status` in the folder, in one step, and end the script with it."""
    folder = f"${folder_variable}"
    return [
        f'printf \'{{"exit_code": %d, "job_id": "%s", "ended_at": "%s"}}\\n\' "$status" "$SLURM_JOB_ID" '
        f'"$(date -u +%Y-%m-%dT%H:%M:%SZ)" > "{folder}/.{EXIT}.tmp"',
        f'mv "{folder}/.{EXIT}.tmp" "{folder}/{EXIT}"',
        'exit "$status"',
        "",
    ]


def _checkpoints(cfg: TrainConfig) -> bool:
    return cfg.checkpoint.every_n_steps is not None


def srun_command(cfg: TrainConfig, run_dir: Path) -> list[str]:
    """The srun line: one task a rank, all ended when one fails."""
    c = cfg.cluster
    command = [
        "srun",
        "--kill-on-bad-exit=1",
        # Named here too: sbatch's environment carries them, but a user's srun settings may not override them.
        f"--nodes={cfg.trainer.num_nodes}",
        f"--ntasks={cfg.world_size}",
        f"--ntasks-per-node={cfg.trainer.devices}",
        f"--output={run_dir}/rank%t.out",
        "--open-mode=append",
        "--unbuffered",
        *entrypoint.srun_options(cfg),
    ]
    if c.cpus_per_task is not None:
        command.append(f"--cpus-per-task={c.cpus_per_task}")  # srun does not inherit it
    python = sys.executable
    if c.container is not None:
        python = c.container.python
        mounts = [f"{path}:{path}" for path in _mounted_paths(cfg)] + list(c.container.mounts)
        command += [f"--container-image={c.container.image}", f"--container-mounts={','.join(mounts)}"]
        if c.container.writable:
            command.append("--container-writable")
        if not c.container.mount_home:
            command.append("--no-container-mount-home")
        # By default the image's own values win over those of the job.
        command.append(f"--container-env={','.join(rank_environment(cfg))}")
    return [*command, *c.srun_args, *entrypoint.rank_command(cfg, run_dir, python)]


def _mounted_paths(cfg: TrainConfig) -> list[str]:
    """The stage folder, the project, and what the configuration names outside of both."""
    paths = [cfg.stage_path, str(PROJECT)]
    data, checkpoint = cfg.data, cfg.checkpoint
    named = [data.folder, data.tokenizer, *(str(Path(prefix).parent) for prefix in data.paths)]
    for path in [*named, checkpoint.resume_from, checkpoint.weights_from]:
        if path is not None and not any(Path(path).is_relative_to(mounted) for mounted in paths):
            paths.append(path)
    return paths


def rank_environment(cfg: TrainConfig) -> dict[str, str]:
    """Environment of every rank, besides what Slurm sets."""
    path = {} if entrypoint.uses_own_import_path(cfg) else {"PYTHONPATH": str(PROJECT)}
    return {**entrypoint.environment(cfg), **cfg.cluster.env, **path, "PYTHONUNBUFFERED": "1"}


def batch_script(cfg: TrainConfig, run_dir: Path) -> str:
    """The whole sbatch script of one point."""
    exports = [f"export {name}={shlex.quote(value)}" for name, value in rank_environment(cfg).items()]
    run = shlex.quote(str(run_dir))
    lines = [
        "#!/bin/bash",
        *_flags(sbatch_options(cfg, run_dir)),
        "",
        f"RUN={run}",
        "# Left by an earlier start, where this one is a requeue.",
        f'rm -f "$RUN/{REQUEUE}" "$RUN/{EXIT}" "$RUN"/rank*.error.json',
        "",
        "# The ranks meet at the first node. A port of the job's own: nodes may be shared.",
        'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))",
        "# The ranks take their places from srun, whatever the submitting shell had.",
        "unset RANK LOCAL_RANK NODE_RANK WORLD_SIZE LOCAL_WORLD_SIZE",
        "export MASTER_ADDR MASTER_PORT",
        *exports,
        *cfg.cluster.setup,
        "",
        shlex.join(srun_command(cfg, run_dir)),
        "status=$?",
        "",
        "# Asked for by rank 0 after its last checkpoint; done here, since a container has no scontrol. A job that is",
        "# being cancelled is no longer RUNNING, and stays cancelled.",
        f'if [ -e "$RUN/{REQUEUE}" ] && scontrol show job "$SLURM_JOB_ID" | grep -q "JobState=RUNNING" &&',
        '  scontrol requeue "$SLURM_JOB_ID"; then exit 0; fi',
        *_record_status("RUN"),
    ]
    return "\n".join(lines)


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
