"""A rank of a test job: writes down every signal that it gets, and ends on the first that asks it to, or never.

    python recorder.py LOG_FILE EXIT_CODE|stay

A line of the log: seconds since the epoch, restart count, rank, signal (or `start`).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from types import FrameType


def main(log_file: str, ending: str) -> None:
    restart = os.environ.get("SLURM_RESTART_COUNT", "0")
    rank = os.environ["SLURM_PROCID"]
    asked = []

    with open(log_file, "a", buffering=1) as log:

        def write(event: str) -> None:
            log.write(f"{time.time():.3f} {restart} {rank} {event}\n")

        def on_signal(number: int, frame: FrameType | None) -> None:
            write(signal.Signals(number).name)
            if number != signal.SIGCONT:
                asked.append(number)

        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT):
            signal.signal(number, on_signal)
        write("start")
        while not asked or ending == "stay":
            time.sleep(0.05)
        time.sleep(0.2)  # for a second signal that comes with the first
    sys.exit(int(ending))


if __name__ == "__main__":
    main(*sys.argv[1:])
