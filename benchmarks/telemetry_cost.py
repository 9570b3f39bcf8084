"""What the measurements of every step cost it: the callbacks' own time, and on a GPU the sampler beside the work.

    python benchmarks/telemetry_cost.py

Needs what a rank needs (torch, NeMo). The callbacks are timed as they run behind each step, with the file they write.
On a GPU, steps of matrix products of about 1.5 s run by turns with and without the sampler; the difference of the
medians is what counts (target: below 0.5% of a step). The whole takes less than a minute, imports left out.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))
STEP_S = 1.5
PAIRS = 10


def callbacks_us(on_gpu: bool, batches: int = 2000) -> dict[str, float]:
    """Median and 99th percentile of what follows a step on rank 0: telemetry, and the line of steps.jsonl."""
    import torch
    from nemo_bench.training.telemetry import STEP_TIMING, RankTelemetry

    from nemo_bench.config import load
    from nemo_bench.record.folder import EventLog, RunFolder
    from nemo_bench.training.callbacks import StepRecorder

    cfg = load(PROJECT / "benchmarks/results/h200/bf16_4layers_5f1a/config.yaml")
    cfg.gpu.device = "cuda" if on_gpu else "cpu"
    timing: Any = SimpleNamespace(timer={STEP_TIMING: 1.65})
    metrics = {"reduced_train_loss": torch.tensor(2.5), "grad_norm": torch.tensor(1.0)}
    optimizer = SimpleNamespace(param_groups=[{"lr": 3e-4}])
    trainer: Any = SimpleNamespace(callback_metrics=metrics, global_step=1, optimizers=[optimizer])
    times = []
    with tempfile.TemporaryDirectory() as folder:
        telemetry = RankTelemetry(cfg, Path(folder), 0, timing, None)
        recorder = StepRecorder(cfg, timing, telemetry, Path(folder), EventLog(RunFolder(Path(folder))))
        for callback in (telemetry, recorder):
            callback.on_train_start(trainer, trainer)
        for batch in range(batches):
            began = time.perf_counter()
            telemetry.on_train_batch_start(trainer, trainer, None, batch)
            for callback in (telemetry, recorder):
                callback.on_train_batch_end(trainer, trainer, None, None, batch)
            times.append((time.perf_counter() - began) * 1e6)
        telemetry.on_exception(trainer, trainer, KeyboardInterrupt())
    times.sort()
    return {"median_us": round(statistics.median(times), 1), "p99_us": round(times[int(0.99 * batches)], 1)}


def sampler_cost() -> dict[str, Any]:
    """Steps of matrix products with and without the sampler, by turns."""
    import torch
    from nemo_bench.training.gpu_sampler import open_sampler

    a, b = (torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)

    def step(products: int) -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(products):
            torch.mm(a, b, out=out)
        torch.cuda.synchronize()
        return time.perf_counter() - began

    def watched() -> float:
        sampler = open_sampler(torch.cuda.get_device_properties(0), print)
        assert sampler is not None, "no NVML: see the line above"
        sampler.start()
        sampler.take()
        began = time.perf_counter()
        step(products)
        measured.append(sampler.take())
        seconds = time.perf_counter() - began
        sampler.stop()
        return seconds

    measured: list[dict[str, Any]] = []
    step(1000)  # clocks come up
    products = round(STEP_S / step(1000) * 1000)
    step(products)
    pairs = [(watched(), step(products)) if i % 2 else (step(products), watched())[::-1] for i in range(PAIRS)]
    with_s, without_s = (statistics.median(times) for times in zip(*pairs))
    return {
        "gpu": torch.cuda.get_device_name(0),
        "products_a_step": products,
        "step_s_without": round(without_s, 5),
        "step_s_with": round(with_s, 5),
        "difference": round(with_s / without_s - 1, 5),
        "spread_without": round(statistics.stdev(times[1] for times in pairs) / without_s, 5),
        "measured": measured[-1],
    }


def main() -> None:
    import torch

    on_gpu = torch.cuda.is_available()
    os.environ.setdefault("LOCAL_RANK", "0")
    found: dict[str, Any] = {"callbacks": callbacks_us(on_gpu)}
    if on_gpu:
        found["sampler"] = sampler_cost()
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
