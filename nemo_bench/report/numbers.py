"""One run's numbers: step time, tokens/s, TFLOP/s, MFU and days to train, with what they assume."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nemo_bench import flops
from nemo_bench.config import TrainConfig
from nemo_bench.report.model import Numbers, Run
from nemo_bench.report.statistics import MIN_STEADY_STEPS, StepTimes

# Steps whose mean is called the last loss: a single step's is noisy.
LAST_LOSSES = 5


def numbers_at(
    step_time_s: float,
    *,
    seq_length: int,
    global_batch_size: int,
    gpus: int,
    sizes: flops.Architecture | None,
    peak_tflops: float | None,
    peak_source: str | None,
    total_tokens: float,
) -> Numbers:
    """All that follows from a step time; no FLOPs without the model's `sizes`, no MFU without a peak."""
    tokens_per_s = flops.tokens_per_second(
        seq_length=seq_length, global_batch_size=global_batch_size, step_time_s=step_time_s
    )
    per_sequence, recipe, causal = None, None, None
    if sizes is not None:
        per_sequence, causal_flops = (
            sizes.flops_per_sequence(seq_length, convention)
            for convention in (flops.FlopsConvention.RECIPE, flops.FlopsConvention.CAUSAL)
        )
        recipe, causal = (
            flops.tflops_per_gpu(
                global_batch_size=global_batch_size, flops_per_sequence=each, step_time_s=step_time_s, num_gpus=gpus
            )
            for each in (per_sequence, causal_flops)
        )
    return Numbers(
        step_time_s=step_time_s,
        tokens_per_s=tokens_per_s,
        tokens_per_s_per_gpu=tokens_per_s / gpus,
        tflops_per_gpu=recipe,
        tflops_per_gpu_causal=causal,
        peak_tflops=peak_tflops,
        peak_source=peak_source,
        mfu=recipe / peak_tflops if recipe is not None and peak_tflops else None,
        mfu_causal=causal / peak_tflops if causal is not None and peak_tflops else None,
        flops_per_sequence=per_sequence,
        total_tokens=total_tokens,
        days_to_train=flops.days_to_train(tokens=total_tokens, tokens_per_s=tokens_per_s),
    )


@dataclass(frozen=True)
class Rates:
    """What a step time means for one GPU (one process, on CPU), as rates at a step time of a second.

    MFU is the recipe's; None without a peak.
    """

    tokens_per_s_per_gpu: float
    tflops_per_gpu: float
    mfu: float | None

    def at(self, step_time_s: float) -> dict[str, float]:
        """The rates of a step, by the names of steps.jsonl; none of a step without a time."""
        if not step_time_s > 0:
            return {}
        return {name: value / step_time_s for name, value in asdict(self).items() if value is not None}


def rates(cfg: TrainConfig, measured_peaks: Sequence[float]) -> Rates:
    """The rates of a configuration.

    Args:
        cfg: the configuration.
        measured_peaks: TFLOP/s of each rank, for a device without a published peak.
    """
    peak = cfg.gpu.peak_tflops.get(cfg.precision.name)
    if peak is None and measured_peaks:
        peak = statistics.fmean(measured_peaks)
    at = numbers_at(
        1.0,
        seq_length=cfg.model.seq_length,
        global_batch_size=cfg.model.global_batch_size,
        gpus=cfg.world_size,
        sizes=cfg.architecture,
        peak_tflops=peak,
        peak_source=None,
        total_tokens=cfg.total_tokens,
    )
    assert at.tflops_per_gpu is not None
    return Rates(at.tokens_per_s_per_gpu, at.tflops_per_gpu, at.mfu)


def summarise(run_dir: Path) -> Run:
    """The run in `run_dir`, with its numbers at the token budget that its configuration names.

    Raises:
        BenchError: the folder holds no readable record.
    """
    from nemo_bench.report.runs import load_run

    return load_run(run_dir)


def rows(run: Run) -> list[tuple[str, str, str]]:
    """(name, value, remark) of each number, for the terminal. A run that is not final shows why, and no results."""
    unit = unit_name(run)
    shown = []
    if run.first_loss is not None and run.last_loss is not None:
        shown.append(
            ("loss", f"{run.first_loss:.3f} to {run.last_loss:.3f}", f"first step, mean of the last {LAST_LOSSES}")
        )
    t, n = run.times, run.numbers
    if t is not None:
        remark = f"median of {counted(t)}, spread {t.spread_s:.2g}"
        shown.append(("step time (s)" if run.final else "step time so far (s)", f"{t.median_s:.4g}", remark))
        shown.append(("  last step (s)", f"{t.last_s:.4g}", "what the recipe reads"))
    if n is not None:
        shown += [
            (
                "tokens/s",
                f"{n.tokens_per_s:,.0f}",
                f"{n.tokens_per_s_per_gpu:,.0f} a {unit}, {run.gpus} in all",
            ),
            (f"days to {tokens_text(n.total_tokens)} tokens", f"{n.days_to_train:,.2f}", "at this throughput"),
        ]
        if n.tflops_per_gpu is not None:
            shown.insert(
                -1,
                (f"TFLOP/s a {unit}", f"{n.tflops_per_gpu:.4g}", f"causal convention: {n.tflops_per_gpu_causal:.4g}"),
            )
        if n.mfu is not None:
            shown.insert(-1, ("MFU", f"{n.mfu:.2%}", f"causal convention: {n.mfu_causal:.2%}"))
            shown.insert(-1, ("  of a peak of", f"{n.peak_tflops:.4g} TFLOP/s", n.peak_source or ""))
    if run.peak_memory_gib is not None:
        shown.append(("peak memory (GiB)", f"{run.peak_memory_gib:.1f}", f"of one {unit}"))
    shown += device_rows(run)
    if not run.final:
        shown.append(("no result", "", run.why_not_final or ""))
    return shown


def device_rows(run: Run) -> list[tuple[str, str, str]]:
    """(name, value, remark) of what the GPUs did: power, energy, clocks, and what held these back."""
    shown = []
    asked = "" if len(run.devices) == 1 else f"of {len(run.devices)} GPUs"
    powers = [each.power_w for each in run.devices if each.power_w is not None]
    if powers:
        power_w = statistics.fmean(powers)
        energy = ""
        if run.numbers is not None:
            per_joule = run.numbers.tokens_per_s_per_gpu / power_w
            energy = f"{power_w * run.numbers.step_time_s:,.0f} J a step and GPU, {per_joule:.3g} tokens/J"
        shown.append(
            ("power (W)", f"{power_w:,.0f}", ", ".join(text for text in (f"mean {asked}".strip(), energy) if text))
        )
    clocks = [each.sm_clock_mhz for each in run.devices if each.sm_clock_mhz is not None]
    lowest = [(each.sm_clock_min_mhz, each.rank) for each in run.devices if each.sm_clock_min_mhz is not None]
    if clocks and lowest:
        low, rank = min(lowest)
        remark = f"mean {asked}".strip() + f", lowest {low:,.0f}" + (f" (rank {rank})" if len(lowest) > 1 else "")
        shown.append(("SM clock (MHz)", f"{statistics.fmean(clocks):,.0f}", remark))
    hottest = [(each.temperature_max_c, each.rank) for each in run.devices if each.temperature_max_c is not None]
    if hottest:
        degrees, rank = max(hottest)
        shown.append(("temperature (°C)", f"{degrees:.0f}", "highest" + (f", rank {rank}" if len(hottest) > 1 else "")))
    reasons: dict[str, list[float]] = {}
    for each in run.devices:
        for reason, share in each.throttled.items():
            reasons.setdefault(reason, []).append(share)
    for reason, shares in sorted(reasons.items()):
        where = f" on {len(shares)} of {len(run.devices)} GPUs" if len(run.devices) > 1 else ""
        usual = ", usual at full load" if reason == "sw_power_cap" else ""
        shown.append((f"  {reason.replace('_', ' ')}", f"{max(shares):.0%}", f"of the steps{where}{usual}"))
    return shown


def counted(times: StepTimes) -> str:
    """How many steps a median is of, and which were left out: "48 steps after 1 of warm-up, without 1 (checkpoint)"."""
    text = f"{times.counted} step{'' if times.counted == 1 else 's'} after {times.warmup_steps} of warm-up"
    if times.excluded:
        text += ", without " + " and ".join(f"{number} ({reason})" for reason, number in times.excluded.items())
    return text


def too_few(times: StepTimes) -> str | None:
    """Why so few steps are no measurement; None where there are enough."""
    if times.enough:
        return None
    return f"only {counted(times)}: not a measurement (it takes {MIN_STEADY_STEPS})"


def unit_name(run: Run) -> str:
    """What one of `Run.gpus` is: a GPU, or a process where there is none."""
    return "process" if run.gpu == "cpu" else "GPU"


def tokens_text(number: float) -> str:
    """1e12 as 1T."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= unit:
            return f"{number / unit:g}{name}"
    return f"{number:g}"
