"""One run's numbers: step time, tokens/s, TFLOP/s, MFU and days to train, with what they assume."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

from nemo_bench import flops
from nemo_bench.config import TrainConfig, load, world_size
from nemo_bench.errors import BenchError
from nemo_bench.results import record
from nemo_bench.results.statistics import StepTimes, step_times

# Steps whose mean is called the last loss: a single step's is noisy.
LAST_LOSSES = 5


@dataclass(frozen=True)
class Summary:
    """Numbers of one run. Rates are at the median step time after the warm-up."""

    times: StepTimes
    num_gpus: int
    first_loss: float
    last_loss: float  # mean of the last steps
    tokens_per_s: float
    tflops_per_gpu: float  # recipe's FLOPs convention
    tflops_per_gpu_causal: float
    peak_tflops: float  # of one GPU (one process, on CPU)
    peak_source: str
    mfu: float  # fraction
    mfu_causal: float
    total_tokens: float
    days_to_train: float


def architecture(cfg: TrainConfig) -> flops.Architecture:
    """The sizes that the FLOPs and the number of parameters follow from."""
    m = cfg.model
    return {
        "num_layers": m.num_layers,
        "hidden_size": m.hidden_size,
        "ffn_hidden_size": m.ffn_hidden_size,
        "num_attention_heads": m.num_attention_heads,
        "num_query_groups": m.num_query_groups,
        "vocab_size": m.vocab_size,
    }


def model_flops(cfg: TrainConfig, convention: flops.FlopsConvention) -> float:
    """FLOPs a sequence of the configured model."""
    return flops.model_flops(seq_length=cfg.model.seq_length, convention=convention, **architecture(cfg)).total


def _peak(cfg: TrainConfig, run_dir: Path) -> tuple[float, str]:
    published = cfg.gpu.peak_tflops.get(cfg.precision.name)
    if published is not None:
        return published, f"{cfg.gpu.name} {cfg.precision.name}, dense, published"
    peaks = record.read_peaks(run_dir)
    if not peaks:
        raise BenchError(f"{run_dir} holds no measured matrix rate: MFU cannot be computed")
    rate = statistics.mean(peak["tflops"] for peak in peaks)
    first = peaks[0]
    return rate, (
        f"measured: {first['dtype']} matrix product of {first['size']}^3 on {first['threads']} threads a process"
    )


def summarise(run_dir: Path) -> Summary:
    """The numbers of the run in `run_dir`.

    Raises:
        BenchError: no step was recorded.
    """
    cfg = load(run_dir / record.CONFIG)
    rows_written, _ = record.read_lines(run_dir / record.STEPS)
    # A run that was requeued did some steps twice: the later one counts.
    steps = list({row["step"]: row for row in rows_written}.values())
    if not steps:
        raise BenchError(f"{run_dir} holds no training step: see {record.rank_log(run_dir, 0)}")
    times = step_times([float(row["train_step_timing_s"]) for row in steps])
    losses = [float(row["loss"]) for row in steps]
    gpus, batch = world_size(cfg), cfg.model.global_batch_size
    peak, source = _peak(cfg, run_dir)
    tokens_per_s = flops.tokens_per_second(
        seq_length=cfg.model.seq_length, global_batch_size=batch, step_time_s=times.median_s
    )
    recipe, causal = (
        flops.tflops_per_gpu(
            global_batch_size=batch,
            flops_per_sequence=model_flops(cfg, convention),
            step_time_s=times.median_s,
            num_gpus=gpus,
        )
        for convention in (flops.FlopsConvention.RECIPE, flops.FlopsConvention.CAUSAL)
    )
    return Summary(
        times=times,
        num_gpus=gpus,
        first_loss=losses[0],
        last_loss=statistics.mean(losses[-LAST_LOSSES:]),
        tokens_per_s=tokens_per_s,
        tflops_per_gpu=recipe,
        tflops_per_gpu_causal=causal,
        peak_tflops=peak,
        peak_source=source,
        mfu=recipe / peak,
        mfu_causal=causal / peak,
        total_tokens=cfg.total_tokens,
        days_to_train=flops.days_to_train(tokens=cfg.total_tokens, tokens_per_s=tokens_per_s),
    )


def rows(summary: Summary, cfg: TrainConfig) -> list[tuple[str, str, str]]:
    """(name, value, remark) of each number, for the terminal."""
    s, t = summary, summary.times
    unit = "GPU" if cfg.gpu.device == "cuda" else "process"
    remark = f"median of {t.steps - t.warmup_steps} steps after {t.warmup_steps} of warm-up"
    if not t.enough:
        remark = f"only {t.steps - t.warmup_steps} steps after {t.warmup_steps} of warm-up: not a measurement"
    return [
        ("loss", f"{s.first_loss:.3f} to {s.last_loss:.3f}", f"first step, mean of the last {LAST_LOSSES}"),
        ("step time (s)", f"{t.median_s:.4g}", f"{remark}, spread {t.spread_s:.2g}"),
        ("  last step (s)", f"{t.last_s:.4g}", "what the recipe reads"),
        (
            "tokens/s",
            f"{s.tokens_per_s:,.0f}",
            f"{s.tokens_per_s / s.num_gpus:,.0f} a {unit}, {s.num_gpus} in all",
        ),
        (f"TFLOP/s a {unit}", f"{s.tflops_per_gpu:.4g}", f"causal convention: {s.tflops_per_gpu_causal:.4g}"),
        ("MFU", f"{s.mfu:.2%}", f"causal convention: {s.mfu_causal:.2%}"),
        ("  of a peak of", f"{s.peak_tflops:.4g} TFLOP/s", s.peak_source),
        (f"days to {_tokens(s.total_tokens)} tokens", f"{s.days_to_train:,.2f}", "at this throughput"),
    ]


def _tokens(number: float) -> str:
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= unit:
            return f"{number / unit:g}{name}"
    return f"{number:g}"
