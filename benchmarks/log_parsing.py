"""Speed and memory of reading logs: MB/s of one core, and the most memory that the process held.

    python benchmarks/log_parsing.py [megabytes]

Three logs of this size (default 1000) are written to a temporary folder, each is read by a process of its own:
mixed   what a job of 512 GPUs prints: NCCL's lines, and a step in every hundredth
steps   NeMo 2's step lines and nothing else
bar     NeMo 1's progress bar and nothing else
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]

READ = """
import resource, sys, time
from pathlib import Path
from nemo_bench.results.logs import read_log
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
wall, cpu = time.perf_counter(), time.process_time()
log = read_log(Path(sys.argv[1]))
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(log.size_bytes / wall / 1e6, log.size_bytes / cpu / 1e6, (peak - start) / 1024, peak / 1024,
      len(log.step) + log.dropped, log.unreadable)
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


def bar_line(step: int, rng: random.Random) -> str:
    return (
        f"\rEpoch 0: :   7%|▋         | {step + 1}/99999999 [20:15<00:00, reduced_train_loss={12 * rng.random():.3f}, "
        f"global_step={step}.0, consumed_samples={128 * (step + 1)}.0, train_step_timing in s={11 + rng.random():.2f}]"
    )


def pieces(kind: str, rng: random.Random) -> Iterator[str]:
    step = 0
    while True:
        if kind == "mixed":
            yield from (noise(rng) for _ in range(99))
        yield bar_line(step, rng) if kind == "bar" else step_line(step, rng)
        step += 1


def write(path: Path, kind: str, size_bytes: int) -> int:
    """Writes a log of that kind; returns how many steps are in it."""
    steps, written = 0, 0
    with open(path, "wb") as file:
        for piece in pieces(kind, random.Random(1)):
            written += file.write(piece.encode())
            steps += "train_step" in piece
            if written >= size_bytes:
                return steps
    raise AssertionError("pieces() does not end")


def main() -> None:
    size_bytes = int(float(sys.argv[1]) * 1e6) if len(sys.argv) > 1 else 10**9
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("mixed", "steps", "bar"):
            path = Path(folder) / "log.out"
            steps = write(path, kind, size_bytes)
            best: list[float] = []
            for _ in range(3):
                done = subprocess.run(
                    [sys.executable, "-c", READ, str(path)], cwd=PROJECT, check=True, capture_output=True, text=True
                )
                values = [float(value) for value in done.stdout.split()]
                assert values[4:] == [steps, 0], (values, steps)
                best = max(best, values)
            print(
                f"{kind:6} {size_bytes / 1e6:.0f} MB, {steps:,} steps: {best[0]:.0f} MB/s "
                f"({best[1]:.0f} MB a CPU second), {best[2]:.0f} MiB more than at the start ({best[3]:.0f} in all)"
            )


if __name__ == "__main__":
    main()
