"""One run's numbers: step time, tokens/s, TFLOP/s, MFU and days to train, with what they assume."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from nemo_bench import flops
from nemo_bench.config import TrainConfig
from nemo_bench.report.model import Numbers, Run


def numbers_at(
    step_time_s: float, run: Run, peak_tflops: float | None, peak_source: str | None, total_tokens: float
) -> Numbers | None:
    """Return all that follows from a step time: no FLOPs without the model's sizes, no MFU without a peak.

    None where the run's GPUs, batch or sequence are not known.
    """
    batch, seq_length, gpus = run.global_batch_size, run.seq_length, run.gpus
    if not (seq_length and batch and gpus):
        return None
    step: dict[str, Any] = {"global_batch_size": batch, "step_time_s": step_time_s}
    tokens_per_s = flops.tokens_per_second(seq_length=seq_length, **step)
    recipe, causal = None, None
    if run.architecture is not None:
        works = [run.architecture.flops_per_sequence(seq_length, causal=causal) for causal in (False, True)]
        recipe, causal = (flops.tflops_per_gpu(flops_per_sequence=work, num_gpus=gpus, **step) for work in works)
    return Numbers(
        step_time_s=step_time_s,
        tokens_per_s=tokens_per_s,
        tokens_per_s_per_gpu=tokens_per_s / gpus,
        tflops_per_gpu=recipe,
        tflops_per_gpu_causal=causal,
        peak_tflops=peak_tflops,
        peak_source=peak_source,
        mfu=recipe / peak_tflops if recipe and peak_tflops else None,
        mfu_causal=causal / peak_tflops if causal and peak_tflops else None,
        total_tokens=total_tokens,
        days_to_train=flops.days_to_train(tokens=total_tokens, tokens_per_s=tokens_per_s),
    )


def rates_of_step(cfg: TrainConfig, measured_peaks: Sequence[float], step_time_s: float) -> dict[str, float]:
    """Return a step's rates by the names of steps.jsonl; none of a step without a time, no MFU without a peak.

    `measured_peaks` (TFLOP/s of each rank) count where no peak is published.
    """
    if step_time_s <= 0:
        return {}
    m, peak = cfg.model, cfg.gpu.peak_tflops.get(cfg.precision.name)
    if peak is None and measured_peaks:
        peak = statistics.fmean(measured_peaks)
    sizes: dict[str, Any] = {"gpus": cfg.world_size, "architecture": cfg.architecture, "seq_length": m.seq_length}
    run = Run(name="", path="", source="", global_batch_size=m.global_batch_size, **sizes)
    numbers = numbers_at(step_time_s, run, peak, None, total_tokens=cfg.total_tokens)
    rates = {name: getattr(numbers, name) for name in ("tokens_per_s_per_gpu", "tflops_per_gpu", "mfu")}
    return {name: rate for name, rate in rates.items() if rate is not None}
