"""One rank of a program that is not ours: `python program_rank.py RUN_FOLDER [--on-ranks 0,8 PREFIX... --] COMMAND...`.

Rank 0 writes the machine's record first; then the command runs with this process's environment, its output and its exit
status. Called by path, not as a module: inside a container the program keeps the import path that its image gives it.
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

from nemo_bench.cluster import lifeline  # noqa: E402
from nemo_bench.record import folder as record  # noqa: E402
from nemo_bench.record.node import write_node  # noqa: E402
from nemo_bench.report import logs  # noqa: E402


class ProgramError(Exception):
    """The program ended with an exit status; the message is what its log says last of an error."""


def main(run_dir: Path, command: list[str]) -> int:
    """Runs the command and returns its exit status; ends by the signal that ended it.

    `--on-ranks` puts a profiler's command line in front of it on some ranks, with their number for `{rank}`.
    """
    rank = int(os.environ.get("RANK") or os.environ["SLURM_PROCID"])
    if command[0] == "--on-ranks":
        end = command.index("--")
        ranks, prefix, command = command[1].split(","), command[2:end], command[end + 1 :]
        if str(rank) in ranks:
            (run_dir / record.PROFILE).mkdir(exist_ok=True)
            command = [word.replace("{rank}", str(rank)) for word in prefix] + command
    lifeline.watch(lambda: record.RunFolder(run_dir).set_killed_with_launcher())
    events = record.EventLog(record.RunFolder(run_dir), enabled=rank == 0)
    if rank == 0:
        write_node(run_dir)
    events.write("importing")
    try:
        status = subprocess.call(command)
    except OSError as error:  # the program, or the profiler in front of it, is not there
        print(error, flush=True)
        record.RunFolder(run_dir).write_rank_error(rank, error)
        return 1
    if status < 0:
        with contextlib.suppress(OSError):  # SIGKILL has no other handler
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    if status:
        record.RunFolder(run_dir).write_rank_error(
            rank, ProgramError(_last_error(record.RunFolder(run_dir).log(rank), status))
        )
    else:
        events.write("done")
    return status


def _last_error(log: Path, status: int) -> str:
    with contextlib.suppress(OSError):
        if said := logs.read_log(log).last_error:
            return said
    return f"exit status {status}"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
