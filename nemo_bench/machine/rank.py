"""One rank of a machine check: `python rank.py RUN_FOLDER`, with its place in RANK, LOCAL_RANK, … or from srun.

It is called by path: in a container it keeps the image's import path. Rank 0's process coordinates, and forks another
that measures, so that it can tell of that one, too.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from pathlib import Path

# In place of this file's folder, whose modules have names that others may have too.
sys.path[0] = str(Path(__file__).resolve().parents[2])

from nemo_bench.cluster import lifeline  # noqa: E402
from nemo_bench.config import TrainConfig, load  # noqa: E402
from nemo_bench.machine import check  # noqa: E402
from nemo_bench.machine.coordination import Seat  # noqa: E402
from nemo_bench.record.folder import CONFIG, RunFolder  # noqa: E402


def main(folder: Path) -> int:
    """Return the exit status: 1 where the check has findings, or this rank lost its coordinator."""
    cfg, rank = load(folder / CONFIG), int(os.environ.get("RANK") or os.environ["SLURM_PROCID"])
    measuring = 0 if rank else os.fork()
    lifeline.watch(lambda: None)
    if not measuring:
        return _measure(cfg, folder, rank)
    try:
        return check.run(cfg, folder, int(os.environ["MASTER_PORT"]))
    finally:
        os.kill(measuring, signal.SIGKILL)


def _measure(cfg: TrainConfig, folder: Path, rank: int) -> int:
    """Do the coordinator's tasks until it ends."""
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    terminal = os.fdopen(os.dup(1), "w")
    with open(RunFolder(folder).log(rank), "ab") as log:
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
    try:
        seat = Seat(place, rank, socket.gethostname(), within_s=check.LIMIT_S)
        from nemo_bench.machine.measure import Measures  # torch, in some seconds

        measures = Measures(cfg, rank, folder)
        print(f"rank {rank} on {socket.gethostname()} measures", flush=True)
        for task, argument in seat:
            try:
                seat.send({"result": getattr(measures, task)(argument)})
            except Exception as error:
                traceback.print_exc()
                seat.send({"error": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"})
    except OSError as error:
        print(f"rank {rank}: no word from the coordinator on {place[0]}: {error}", file=terminal, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    status = main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(status)  # without torch's destructors: a communicator may wait for a rank that is gone
