"""Speed and memory of reading logs: MB/s of one core, and the most memory that the process held.

    python benchmarks/log_parsing.py [--megabytes 1000] [--repeats 5] [--output FILE.json]

Logs of this size are written to a temporary folder, and each is read by a process of its own, on one core, several
times; the fastest counts, since whatever else the machine does can only slow it down:
mixed   what a job of 512 GPUs prints: NCCL's lines, and a step in every hundredth
steps   NeMo 2's step lines and nothing else
bar     NeMo 1's progress bar and nothing else, once a step
twice   the same as Lightning draws it: twice a step, first with the values of the step before
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
KINDS = ("mixed", "steps", "bar", "twice")

READ = """
import json, os, resource, sys, time
from pathlib import Path
from nemo_bench.report.logs import read_log
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
start_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
wall, cpu = time.perf_counter(), time.process_time()
log = read_log(Path(sys.argv[1]))
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({
    "mb_per_s": log.size_bytes / wall / 1e6,
    "mb_per_cpu_s": log.size_bytes / cpu / 1e6,
    "peak_memory_mib": peak_kib / 1024,
    "peak_memory_above_start_mib": (peak_kib - start_kib) / 1024,
    "steps": len(log.step) + log.dropped,
    "unreadable": log.unreadable + log.several + log.repeated,
}))
"""


def noise(rng: random.Random) -> str:
    return (
        f"gpu{rng.randrange(512):03d}:{rng.randrange(99999)}:{rng.randrange(99999)} [{rng.randrange(8)}] NCCL INFO "
        f"Channel {rng.randrange(32):02d}/0 : {rng.randrange(64)}[{rng.randrange(8)}] -> {rng.randrange(64)}"
        f"[{rng.randrange(8)}] via P2P/CUMEM/read\n"
    )


def step_line(step: int, rng: random.Random) -> str:
    return (
        f"Training epoch 0, iteration {step}/99999999 | lr: {3e-4 * rng.random():.4} | global_batch_size: 128 | "
        f"global_step: {step} | reduced_train_loss: {12 * rng.random():.4} | train_step_timing in s: "
        f"{11 + rng.random():.4} | consumed_samples: {128 * (step + 1)}\n"
    )


def bar(shown: int, values: str) -> str:
    return f"\rEpoch 0: :   7%|▋         | {shown}/99999999 [20:15<00:00, {values}]"


def bar_values(step: int, rng: random.Random) -> str:
    return (
        f"reduced_train_loss={12 * rng.random():.3f}, global_step={step}.0, consumed_samples={128 * (step + 1)}.0, "
        f"train_step_timing in s={11 + rng.random():.2f}"
    )


def pieces(kind: str, rng: random.Random) -> Iterator[str]:
    """The log, a step in each piece."""
    before, step = "", 0
    while True:
        if kind in ("bar", "twice"):
            values = bar_values(step, rng)
            again = bar(step + 1, before) if kind == "twice" and before else ""
            yield again + bar(step + 1, values)
            before = values
        else:
            yield "".join(noise(rng) for _ in range(99 if kind == "mixed" else 0)) + step_line(step, rng)
        step += 1


def write(path: Path, kind: str, size_bytes: int) -> int:
    """Writes a log of that kind; returns how many steps are in it."""
    written = 0
    with open(path, "wb") as file:
        for steps, piece in enumerate(pieces(kind, random.Random(1)), 1):
            written += file.write(piece.encode())
            if written >= size_bytes:
                return steps
    raise AssertionError("pieces() does not end")


def cpu_model() -> str:
    """The processor as Linux names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def measure(path: Path, repeats: int) -> list[dict[str, Any]]:
    """Each reading's figures, the fastest first."""
    command = [sys.executable, "-c", READ, str(path)]
    found = [
        json.loads(subprocess.run(command, cwd=PROJECT, check=True, capture_output=True, text=True).stdout)
        for _ in range(repeats)
    ]
    return sorted(found, key=lambda each: -float(each["mb_per_s"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--note", help="what a reader of the file should know of the machine")
    arguments = parser.parse_args()
    logs: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            path = Path(folder) / "log.out"
            steps = write(path, kind, int(arguments.megabytes * 1e6))
            best, *_ = found = measure(path, arguments.repeats)
            assert (best["steps"], best["unreadable"]) == (steps, 0), (best, steps)
            logs[kind] = {**best, "all_mb_per_s": [each["mb_per_s"] for each in found]}
            print(
                f"{kind:6} {steps:>9,} steps: {best['mb_per_s']:.0f} MB/s, the slowest of {arguments.repeats} "
                f"{found[-1]['mb_per_s']:.0f}; {best['peak_memory_above_start_mib']:.0f} MiB more than at the start "
                f"({best['peak_memory_mib']:.0f} in all)",
                flush=True,
            )
    if arguments.output is not None:
        about = {
            "command": ["python", "benchmarks/log_parsing.py", *sys.argv[1:]],
            "cpu": cpu_model(),
            "versions": {"python": platform.python_version()},
            "statistic": f"the fastest of {arguments.repeats} readings, each by a process of its own on one core",
            "note": arguments.note,
            "log_bytes": int(arguments.megabytes * 1e6),
        }
        arguments.output.write_text(json.dumps({**about, "logs": logs}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
