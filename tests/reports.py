"""Logs with all kinds of outcomes, to make reports of."""

from __future__ import annotations

import random
from pathlib import Path

PUBLISHED_S = {"bf16": [14.72, 14.73, 14.8, 14.89], "fp8": [11.01, 10.93, 11.16, 11.18]}


def write_log(path: Path, step_time_s: float, batch: int, *, steps: int = 50, nan_from: int = 50) -> None:
    """Write a log in the recipe's form with a slow start, a validation and a little noise."""
    rng, text = random.Random(str(path.relative_to(path.parents[3]))), "srun: job 4711 queued\n"
    for step in range(steps):
        time = step_time_s * (1 + rng.gauss(0, 0.003)) * (4 if step == 0 else 1)
        loss = "nan" if step >= nan_from else f"{12.1 * 0.985**step:.3f}"
        text += (
            f"\rEpoch 0: : {2 * step + 2:3d}%|##| {step + 1}/50 [00:01<00:09, reduced_train_loss={loss}, "
            f"global_step={step}.0, consumed_samples={batch * (step + 1)}.0, train_step_timing in s={time:.3f}]"
        )
        if step == 24:
            text += "\nValidation: 0it [00:00, ?it/s]\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + ("\nslurmstepd: error: CANCELLED <by> 'root' & co\n" if steps < 50 else "\n"))


def write_logs(root: Path, factor: float) -> Path:
    """Write bf16 and fp8 from 64 to 512 GPUs; one fails, one is cut off, one has a loss of NaN, two are repeated."""
    for precision, times in PUBLISHED_S.items():
        for number, time in enumerate(times):
            gpus = 64 * 2**number
            slow = 1.1 if (precision, gpus) == ("bf16", 256) else 0.9 if (precision, gpus) == ("fp8", 128) else 1.0
            for repeat in range(2 if gpus == 64 else 1):
                path = root / f"24.09/{precision}/70b/{gpus}/log_{repeat}.out"
                steps = 31 if (precision, gpus) == ("fp8", 512) else 50
                nan_from = 20 if (precision, gpus) == ("bf16", 512) else 50
                write_log(path, time * slow * factor, 2 * gpus, steps=steps, nan_from=nan_from)
    return root
