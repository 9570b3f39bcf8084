"""A rank that multiplies and reduces, with the hooks of real ones.

python -m benchmarks.peer_loop RUN_FOLDER STEPS GRADIENT_KIB
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch

from nemo_bench.config import load
from nemo_bench.record.folder import CONFIG, RunFolder
from nemo_bench.training.hooks import Hooks, RankTelemetry, RunRecorder, Step, call
from nemo_bench.training.peers import PeerWatch

if __name__ == "__main__":
    run, rank = RunFolder(Path(sys.argv[1])), int(os.environ["RANK"])
    cfg = load(run.path / CONFIG)
    torch.distributed.init_process_group("gloo")
    telemetry = RankTelemetry(cfg, run, rank, None)
    hooks: list[Hooks] = [telemetry, PeerWatch(cfg, run, rank, rank == 0, telemetry)]
    hooks += [RunRecorder(cfg, run, telemetry)] if rank == 0 else []
    matrix, gradient = torch.randn(384, 384), torch.ones(int(sys.argv[3]) << 8)
    call(hooks, "train_start", 0)
    for number in range(int(sys.argv[2])):
        began = time.perf_counter()
        call(hooks, "step_start", number)
        for _ in range(12):
            matrix @ matrix
        torch.distributed.all_reduce(gradient)
        call(hooks, "step_end", Step(number, time.perf_counter() - began, 1.0, None, 0.0))
    call(hooks, "train_end")
    os._exit(0)
