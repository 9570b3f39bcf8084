"""A point's estimate with all that is said beside it: throughput, memory, published rows, calibration."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from nemo_bench import flops
from nemo_bench.config import TrainConfig
from nemo_bench.entrypoints import entrypoint_of
from nemo_bench.errors import BenchError
from nemo_bench.estimate.rates import constant
from nemo_bench.estimate.step import Estimate, estimate_of
from nemo_bench.flops import FlopsConvention
from nemo_bench.memory import GIB, estimate_memory
from nemo_bench.report import references
from nemo_bench.report.model import point_name
from nemo_bench.report.references import ReferencePoint
from nemo_bench.report.runs import load_run


@dataclass(frozen=True)
class Calibration:
    """How much slower than its estimate a measured point was."""

    factor: float
    source: str  # the point, and where its time comes from


@dataclass(frozen=True)
class Answer:
    """What is said about a point."""

    name: str
    layout: str
    estimate: Estimate
    calibration: Calibration | None
    tokens_per_s: float
    mfu: float | None
    mfu_causal: float | None
    days: float  # for the budget of tokens
    total_tokens: float
    memory_gib: float | None
    gpu_memory_gib: float | None
    published: tuple[ReferencePoint, ...]

    @property
    def step_time_s(self) -> float:
        """With the calibration, if there is one."""
        return self.estimate.step_time_s * (self.calibration.factor if self.calibration else 1.0)

    @property
    def range_s(self) -> tuple[float, float]:
        if self.calibration is None:
            return self.estimate.low_s, self.estimate.high_s
        error = constant("error")["calibrated"]
        return self.step_time_s * (1 - error), self.step_time_s * (1 + error)

    def to_dict(self) -> dict[str, Any]:
        """Return what estimate.json holds."""
        e = self.estimate
        return {
            "point": self.name,
            "layout": self.layout,
            "step_time_s": self.step_time_s,
            "range_s": list(self.range_s),
            "uncalibrated_step_time_s": e.step_time_s,
            "calibration": None if self.calibration is None else vars(self.calibration),
            "tokens_per_s": self.tokens_per_s,
            "mfu": self.mfu,
            "mfu_causal": self.mfu_causal,
            "days": self.days,
            "total_tokens": self.total_tokens,
            "memory_gib": self.memory_gib,
            "breakdown_s": e.breakdown_s,
            "critical_stage": e.critical_stage,
            "stage_busy": list(e.stage_busy),
            "layer_gpu_ms": e.layer_gpu_ms,
            "layer_host_ms": e.layer_host_ms,
            "host_is_limit": e.host_is_limit,
            "measured_shape": e.measured_shape,
            "rates": {
                "gpu": e.rates.gpu,
                "hardware": e.rates.hardware,
                "derived_from": e.rates.derived_from,
                "date": e.rates.date,
                "versions": e.rates.versions,
            },
            "published": [
                {
                    "reference": row.reference,
                    "step_time_s": row.step_time_s,
                    "error": self.step_time_s / row.step_time_s - 1,
                }
                for row in self.published
            ],
        }


def answer_of(cfg: TrainConfig, calibration: Calibration | None = None) -> Answer:
    """Return what is said about a point whose layout has passed the checks."""
    estimate, m = estimate_of(cfg), cfg.model
    step_time_s = estimate.step_time_s * (calibration.factor if calibration else 1.0)
    batch = m.global_batch_size
    tokens_per_s = flops.tokens_per_second(seq_length=m.seq_length, global_batch_size=batch, step_time_s=step_time_s)
    peak = cfg.gpu.peak_tflops.get(cfg.precision.name)
    mfu: dict[FlopsConvention, float | None] = {}
    for convention in FlopsConvention:
        per_sequence = cfg.architecture.flops_per_sequence(m.seq_length, convention)
        reached = flops.tflops_per_gpu(
            global_batch_size=batch,
            flops_per_sequence=per_sequence,
            step_time_s=step_time_s,
            num_gpus=cfg.world_size,
        )
        mfu[convention] = None if peak is None else reached / peak
    return Answer(
        name=point_name(cfg.model.name, cfg.precision.name, cfg.world_size),
        layout=layout_text(cfg),
        estimate=estimate,
        calibration=calibration,
        tokens_per_s=tokens_per_s,
        mfu=mfu[FlopsConvention.RECIPE],
        mfu_causal=mfu[FlopsConvention.CAUSAL],
        days=flops.days_to_train(tokens=cfg.total_tokens, tokens_per_s=tokens_per_s),
        total_tokens=cfg.total_tokens,
        memory_gib=estimate_memory(cfg).total_bytes / GIB if entrypoint_of(cfg).memory_is_estimated else None,
        gpu_memory_gib=cfg.gpu.memory_gib,
        published=published_rows(cfg),
    )


def layout_text(cfg: TrainConfig) -> str:
    """Return a point's layout in the field's short names."""
    m = cfg.model
    parts = {
        "TP": m.tensor_model_parallel_size,
        "PP": m.pipeline_model_parallel_size,
        "VP": m.virtual_pipeline_model_parallel_size or 1,
        "CP": m.context_parallel_size,
        "DP": cfg.data_parallel_size,
    }
    sizes = " ".join(f"{name}{size}" for name, size in parts.items())
    return f"{sizes}, MBS {m.micro_batch_size}, GBS {m.global_batch_size}, GA {cfg.num_micro_batches}"


@cache
def _published() -> tuple[ReferencePoint, ...]:
    return tuple(point for name in references.names() for point in references.load(name).points)


def published_rows(cfg: TrainConfig) -> tuple[ReferencePoint, ...]:
    """Return what was published for this point: model, GPU, precision, batch, layers and layout are the same."""
    m = cfg.model
    layout = {
        "TP": m.tensor_model_parallel_size,
        "PP": m.pipeline_model_parallel_size,
        "VP": m.virtual_pipeline_model_parallel_size or 1,
        "CP": m.context_parallel_size,
        "MBS": m.micro_batch_size,
    }
    own = (cfg.gpu.name, cfg.precision.name, cfg.world_size, m.global_batch_size, m.seq_length, m.num_layers)
    return tuple(
        row
        for row in _published()
        if own
        == (row.gpu, row.precision, row.gpus, row.global_batch_size, row.seq_length, row.architecture["num_layers"])
        and row.architecture["hidden_size"] == m.hidden_size
        and all(row.layout.get(name, 1) == size for name, size in layout.items())
    )


def calibration_by_run(path: Path) -> Calibration:
    """Return the factor of a measured run: its step time (mean of the steps that count) over its own estimate.

    Raises:
        BenchError: nothing can be read there, or no step of it counts.
    """
    from nemo_bench.config import load

    if not (path / "config.yaml").is_file():
        raise BenchError(f"calibrate={path}: not a run folder (no config.yaml), nor a number of seconds")
    run, cfg = load_run(path), load(path / "config.yaml")
    if run.times is None:
        raise BenchError(f"calibrate={path}: no step of this run counts; python report.py {path} says why")
    measured_s = run.times.mean_s
    return Calibration(
        measured_s / estimate_of(cfg).step_time_s,
        f"{point_name(cfg.model.name, cfg.precision.name, cfg.world_size)}, {measured_s:.4g} s in {path}",
    )


def calibration_by_seconds(cfg: TrainConfig, seconds: float) -> Calibration:
    """Return the factor of a point that took so many seconds."""
    return Calibration(
        seconds / estimate_of(cfg).step_time_s,
        f"{point_name(cfg.model.name, cfg.precision.name, cfg.world_size)}, {seconds:g} s as given",
    )
