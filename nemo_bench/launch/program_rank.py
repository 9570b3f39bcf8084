"""One rank of a program that is not ours.

    python program_rank.py RUN_FOLDER [--in=FOLDER] [--on-ranks 0,8 PREFIX... --] COMMAND...

It is called by path, not as a module: inside a container the program keeps the image's import path.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

# In place of this file's folder, whose modules have names that others may have too.
sys.path[0] = str(Path(__file__).resolve().parents[2])

from nemo_bench.cluster.processes import end_with_launcher  # noqa: E402
from nemo_bench.record.first_error import error_in  # noqa: E402
from nemo_bench.record.folder import PROFILE, RunFolder  # noqa: E402
from nemo_bench.record.node import write_node  # noqa: E402


class ProgramError(Exception):
    """The program ended with an exit status; the message is what its log says from its first error on."""


def main(run: RunFolder, command: list[str]) -> int:
    """Run the command and return its exit status, or end by the signal that ended it; rank 0 records the machine first.

    `--in`: the folder to run in and import from. `--on-ranks`: a profiler, with the rank's number for `{rank}`.
    """
    rank, folder = int(os.environ.get("RANK") or os.environ["SLURM_PROCID"]), None
    if command[0].startswith("--in="):
        folder = command.pop(0).removeprefix("--in=")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
    if command[0] == "--on-ranks":
        end = command.index("--")
        ranks, prefix, command = command[1].split(","), command[2:end], command[end + 1 :]
        if str(rank) in ranks:
            (run.path / PROFILE).mkdir(exist_ok=True)
            command = [word.replace("{rank}", str(rank)) for word in prefix] + command
    end_with_launcher()
    if rank == 0:
        write_node(run.path)
        if job_id := os.environ.get("SLURM_JOB_ID"):
            # Rank 0's log has the name of the recipe's own, beside the run folders of its point.
            gpus, model = run.path.parent.name, run.path.parents[1].name
            with contextlib.suppress(FileExistsError):  # the job was requeued
                link = run.path.parent / f"log-nemo_llama3.1_{model}_{gpus}_{job_id}.out"
                link.symlink_to(Path(run.path.name) / run.log(0).name)
        run.write_event("importing")
    try:
        status = subprocess.call(command, cwd=folder)
    except OSError as error:  # the program, or the profiler in front of it, is not there
        print(error, flush=True)
        run.write_rank_error(rank, error)
        return 1
    if status < 0:
        with contextlib.suppress(OSError):  # SIGKILL has no other handler
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    if status:
        error_in_log = error_in(run.log(rank))
        lines = error_in_log.text.splitlines() if error_in_log else [f"exit status {status}"]
        run.write_rank_error(rank, ProgramError("\n".join(lines[:8])))  # a message of NCCL or CUDA has several
    elif rank == 0:
        run.write_event("done")
    return status


if __name__ == "__main__":
    sys.exit(main(RunFolder(Path(sys.argv[1])), sys.argv[2:]))
