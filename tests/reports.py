"""Logs with all kinds of outcomes, to make reports of."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

from nemo_bench import flops
from nemo_bench.record import folder as record
from nemo_bench.record.node import NODE
from nemo_bench.report.bare_logs import Given
from nemo_bench.report.build import build_report
from nemo_bench.report.model import Point, Report

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


H200 = Path(__file__).parent / "runs/nemo-2.7.3/bf16/70b/1/20261122-172402-5f1a"
H100 = Given(gpu="h100")
SIZES = flops.Architecture(80, 8192, 28672, 64, 8, 128256)


def log_text(times: list[float], *, batch: int = 128, of: int | None = None, end: str = "", **fields: Any) -> str:
    """A log of NeMo 1; each field is a value, or a function of the step."""
    text, of = "", of or len(times)
    for step, time_s in enumerate(times):
        values = {"reduced_train_loss": f"{9 - step / 100:.3f}", "grad_norm": "1.5", **fields}
        printed = ", ".join(f"{key}={value(step) if callable(value) else value}" for key, value in values.items())
        text += (
            f"Epoch 0: : 2%|#| {step + 1}/{of} [00:01<00:09, {printed}, global_batch_size={batch}, "
            f"global_step={step}.0, train_step_timing in s={time_s:.4g}]\n"
        )
    return text + end


def write(root: Path, text: str, precision: str = "fp8", gpus: int = 64, name: str = "a") -> Path:
    path = root / f"24.09/{precision}/70b/{gpus}/{name}.out"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def judged(tmp_path: Path, text: str, given: Given = H100, **options: Any) -> tuple[Report, Point]:
    report = build_report([write(tmp_path, text)], given=given, **options)
    (point,) = report.points
    return report, point


STEADY = [30.0, *[11.0, 11.05, 10.95] * 16, 11.0]


def published_run(folder: Path, **changes: str) -> Path:
    """A run folder that does what the 24.09 table's bf16 point of 64 GPUs did, at its step time."""
    run = Path(shutil.copytree(H200, folder))
    config = (run / record.CONFIG).read_text()
    for old, new in {
        "num_layers: 4": "num_layers: 80",
        "global_batch_size: 4\n": "global_batch_size: 128\n",
        "num_nodes: 1": "num_nodes: 8",
        "devices: 1": "devices: 8",
        "  name: h200": "  name: h100",
        **changes,
    }.items():
        assert old in config, old
        config = config.replace(old, new)
    (run / record.CONFIG).write_text(config)
    node = json.loads((run / NODE).read_text())
    node["gpus"] = [{"name": "NVIDIA H100 80GB HBM3"}]
    node["environment"]["NCCL_NVLS_ENABLE"] = "1"
    (run / NODE).write_text(json.dumps(node))
    (run / "rank0.out").unlink()  # of one GPU
    rows = record.read_lines(run / record.STEPS)[0]
    lines = [json.dumps({**row, "train_step_timing_s": 14.7 + 0.01 * (row["step"] % 3)}) for row in rows]
    (run / record.STEPS).write_text("\n".join(lines) + "\n")
    return run
