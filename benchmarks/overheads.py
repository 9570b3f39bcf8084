"""What this project itself costs: composing, submitting, listing, reading a log, writing a step's line.

    python benchmarks/overheads.py [--runs 1000] [--megabytes 60]
    python benchmarks/overheads.py --loggers tensorboard wandb mlflow      the last line alone, with each of them too

Prints CPU seconds, which a busy machine hardly changes, of whole processes (all but the last four lines) or of calls.
The telemetry needs what a rank needs (torch, Lightning) and measures the GPU's sampler too where there is a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

RECORD = PROJECT / "tests/runs/nemo-2.7.3/bf16/70b/1/20261122-172402-5f1a"
SCALES = "64gpu,128gpu,256gpu,512gpu,1024gpu,2048gpu"


def cpu_seconds(folder: Path, script: str, *arguments: str) -> float:
    """Run a script of this project, with Slurm's commands of `folder`/bin, and return its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "STAGE_PATH": str(folder / "stage"), "PATH": f"{folder}/bin:{os.environ['PATH']}"}
    command = [sys.executable, str(PROJECT / script), *arguments]
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def composing(folder: Path) -> dict[str, float]:
    """Return the CPU seconds of composing one point, and of each further one of a sweep, checks and plan included."""
    one = cpu_seconds(folder, "train.py", "--cfg", "job", "precision=fp8", "scale=128gpu")
    first = cpu_seconds(folder, "train.py", "-m", "launch=dry", "scale=64gpu")
    twelve = cpu_seconds(folder, "train.py", "-m", "launch=dry", "precision=bf16,fp8", f"scale={SCALES}")
    return {"train.py --cfg job": one, "each further point of a dry sweep": (twelve - first) / 11}


def submitting(folder: Path, runs: int) -> dict[str, float]:
    """Return the CPU seconds of submitting a point, and of listing many that have ended."""
    (folder / "bin").mkdir()
    for name, answer in {"sbatch": "1", "squeue": "", "sacct": "", "scontrol": ""}.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\necho {answer}\n")
        (folder / "bin" / name).chmod(0o755)
    point = ("hydra/launcher=submitit_slurm", "scale=64gpu", "data=mock", "cluster.container=null")
    seconds = cpu_seconds(folder, "train.py", *point)
    (job,) = (folder / "stage").glob("results/**/job.json")
    submitted, content = job.parent, json.loads(job.read_text())
    shutil.copy(RECORD / "steps.jsonl", submitted)
    (submitted / "exit.json").write_text('{"exit_code": 0, "ended_at": "2026-11-22T17:25:00Z"}\n')
    for number in range(2, runs + 1):
        copied = shutil.copytree(submitted, f"{submitted}-{number}")
        (Path(copied) / "job.json").write_text(json.dumps({**content, "id": str(number)}))
    return {"submitting a point": seconds, f"jobs.py with {runs} runs": cpu_seconds(folder, "jobs.py")}


def reading_a_log(folder: Path, megabytes: float) -> dict[str, float]:
    """Return the MB read in a CPU second of a log as jobs print it, NCCL's 99 lines before each step, and of steps."""
    from nemo_bench.report.logs import read_log

    rng, rates, path = random.Random(1), {}, folder / "log.out"
    for noise, name in ((99, "MB of a job's log in a second"), (0, "MB of steps alone in a second")):
        steps = 0
        with open(path, "w") as log:
            while log.tell() < megabytes * 1e6:
                for _ in range(noise):
                    node, rank, channel, peer = (rng.randrange(n) for n in (64, 512, 32, 512))
                    message = f"Channel {channel:02}/0 : {rank}[0] -> {peer}[0]"
                    log.write(f"gpu{node:03}:{rank}:{rank} [0] NCCL INFO {message}\n")
                log.write(
                    f"Training epoch 0, iteration {steps}/99999 | lr: {3e-4 * rng.random():.4} | "
                    f"global_batch_size: 128 | global_step: {steps} | reduced_train_loss: {12 * rng.random():.4} | "
                    f"train_step_timing in s: {11 + rng.random():.4} | consumed_samples: {128 * (steps + 1)}\n"
                )
                steps += 1
        began = time.process_time()
        read_log(path)
        rates[name] = path.stat().st_size / 1e6 / (time.process_time() - began)
    return rates


def telemetry(folder: Path, steps: int = 2000, logger: str = "none") -> dict[str, float]:
    """Return the median seconds that follow a step on rank 0: its measurements, its line in steps.jsonl, a logger.

    And the lower quartile of the steps' own seconds, a matrix product each, beside whatever the logger does meanwhile.
    """
    import torch

    from nemo_bench.config import load
    from nemo_bench.record.folder import RunFolder
    from nemo_bench.training.hooks import RankTelemetry, RunRecorder, Step
    from nemo_bench.training.loggers import MetricsLogger

    cfg, run = load(RECORD / "config.yaml"), RunFolder(folder)
    cfg.gpu.device = "cuda" if torch.cuda.is_available() else "cpu"
    cfg.logger.kind = logger
    measure = RankTelemetry(cfg, run, 0, None)
    recorder = RunRecorder(cfg, run, measure)
    hooks = [measure, recorder, *([] if logger == "none" else [MetricsLogger(cfg, recorder)])]
    for hook in hooks:
        hook.train_start(0)
    times_s, steps_s, matrix = [], [], torch.randn(512, 512)
    for number in range(steps):
        began = time.perf_counter()
        torch.mm(matrix, matrix)
        steps_s.append(time.perf_counter() - began)
        step = Step(number, 1.65, torch.tensor(2.5), torch.tensor(1.0), 3e-4)
        began = time.perf_counter()
        measure.step_start(number)
        for hook in hooks:
            hook.step_end(step)
        times_s.append(time.perf_counter() - began)
    if logger != "none":
        hooks[-1].train_end()
    quartile = statistics.quantiles(steps_s, n=4)[0]
    return {f"telemetry of a step, logger={logger}": statistics.median(times_s), f"a step, logger={logger}": quartile}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000, help="how many runs are listed")
    parser.add_argument("--megabytes", type=float, default=60, help="size of the log")
    parser.add_argument("--loggers", nargs="+", help="measure the telemetry alone, with these loggers")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        overheads = telemetry(folder)
        for logger in options.loggers or []:
            overheads |= telemetry(folder, 300, logger)
        if not options.loggers:
            overheads = composing(folder) | submitting(folder, options.runs) | overheads
            overheads |= reading_a_log(folder, options.megabytes)
        for what, value in overheads.items():
            print(f"{what:44} {value:10.6g}", flush=True)


if __name__ == "__main__":
    main()
