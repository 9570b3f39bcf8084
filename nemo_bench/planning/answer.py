"""A point's estimate with all that is said beside it: throughput, memory, published rows, calibration."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from nemo_bench.config import TrainConfig, load
from nemo_bench.entrypoints import entrypoint_of
from nemo_bench.errors import BenchError
from nemo_bench.estimate.rates import constant
from nemo_bench.estimate.step import Estimate, estimate_of
from nemo_bench.flops import FlopsConvention, days_to_train
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

    def error(self, row: ReferencePoint) -> float:
        """Return how much longer than a published step this one is, as a share of it."""
        return self.step_time_s / row.step_time_s - 1

    @property
    def range_s(self) -> tuple[float, float]:
        if self.calibration is None:
            return self.estimate.low_s, self.estimate.high_s
        error = constant("error")["calibrated"]
        return self.step_time_s * (1 - error), self.step_time_s * (1 + error)

    def to_dict(self) -> dict[str, Any]:
        """Return what estimate.json holds."""
        estimate = {name: value for name, value in vars(self.estimate).items() if name not in ("rates", "timeline")}
        rates = self.estimate.rates
        rows = [
            {"reference": row.reference, "step_time_s": row.step_time_s, "error": self.error(row)}
            for row in self.published
        ]
        own: dict[str, Any] = {**vars(self), "published": rows}
        own["calibration"] = self.calibration and vars(self.calibration)
        own["estimate"] = {**estimate, "host_is_limit": self.estimate.host_is_limit}
        described = {name: rates.tables[name] for name in ("date", "versions")}
        described |= {"gpu": rates.gpu, "hardware": rates.hardware, "derived_from": rates.derived_from}
        return {"step_time_s": self.step_time_s, "range_s": self.range_s, **own, "rates": described}


def answer_of(cfg: TrainConfig, calibration: Calibration | None = None) -> Answer:
    """Return what is said about a point whose layout has passed the checks."""
    estimate, m, peak = estimate_of(cfg), cfg.model, cfg.gpu.peak_tflops.get(cfg.precision.name)
    step_time_s = estimate.step_time_s * (calibration.factor if calibration else 1.0)
    tokens_per_s = m.seq_length * m.global_batch_size / step_time_s

    def mfu(convention: FlopsConvention) -> float | None:
        step_flops = m.global_batch_size * cfg.architecture.flops_per_sequence(m.seq_length, convention)
        return step_flops / step_time_s / cfg.world_size / 1e12 / peak if peak else None

    return Answer(
        name=_name(cfg),
        layout=layout_text(cfg),
        estimate=estimate,
        calibration=calibration,
        tokens_per_s=tokens_per_s,
        mfu=mfu(FlopsConvention.RECIPE),
        mfu_causal=mfu(FlopsConvention.CAUSAL),
        days=days_to_train(tokens=cfg.total_tokens, tokens_per_s=tokens_per_s),
        total_tokens=cfg.total_tokens,
        memory_gib=estimate_memory(cfg).total_bytes / GIB if entrypoint_of(cfg).memory_is_estimated else None,
        gpu_memory_gib=cfg.gpu.memory_gib,
        published=published_rows(cfg),
    )


def _name(cfg: TrainConfig) -> str:
    return point_name(cfg.model.name, cfg.precision.name, cfg.world_size)


def _layout(cfg: TrainConfig) -> dict[str, int]:
    m = cfg.model
    return {
        "TP": m.tensor_model_parallel_size,
        "PP": m.pipeline_model_parallel_size,
        "VP": m.virtual_pipeline_model_parallel_size or 1,
        "CP": m.context_parallel_size,
    }


def layout_text(cfg: TrainConfig) -> str:
    """Return a point's layout in the field's short names."""
    m = cfg.model
    sizes = " ".join(f"{name}{size}" for name, size in {**_layout(cfg), "DP": cfg.data_parallel_size}.items())
    return f"{sizes}, MBS {m.micro_batch_size}, GBS {m.global_batch_size}, GA {cfg.num_micro_batches}"


@cache
def _published() -> tuple[ReferencePoint, ...]:
    return tuple(point for name in references.names() for point in references.load(name).points)


def published_rows(cfg: TrainConfig) -> tuple[ReferencePoint, ...]:
    """Return what was published for this point: GPU, number format, batch, sizes and layout are the same."""
    m, layout = cfg.model, {**_layout(cfg), "MBS": cfg.model.micro_batch_size}
    own = (cfg.gpu.name, cfg.precision.name, cfg.world_size, m.global_batch_size, m.seq_length)
    return tuple(
        row
        for row in _published()
        if own == (row.gpu, row.precision, row.gpus, row.global_batch_size, row.seq_length)
        and all(row.architecture[name] == getattr(m, name) for name in ("num_layers", "hidden_size"))
        and all(row.layout.get(name, 1) == size for name, size in layout.items())
    )


def calibration_by(cfg: TrainConfig, calibrate: str) -> Calibration:
    """Return the factor of a point that took so many seconds, or of a run folder's own point.

    Raises:
        BenchError: it is neither, or no step of the run counts.
    """
    if re.fullmatch(r"\d+(\.\d+)?", calibrate):
        measured_s, source = float(calibrate), "as given"
        if measured_s == 0:
            raise BenchError("calibrate=0: give the seconds of a step, or a run folder")
    else:
        path, source = Path(calibrate), f"in {calibrate}"
        if not (path / "config.yaml").is_file():
            raise BenchError(f"calibrate={path}: not a run folder (no config.yaml), nor a number of seconds")
        run, cfg = load_run(path), load(path / "config.yaml")
        if run.times is None:
            raise BenchError(f"calibrate={path}: no step of this run counts; python report.py {path} says why")
        measured_s = run.times.mean_s
    return Calibration(measured_s / estimate_of(cfg).step_time_s, f"{_name(cfg)}, {measured_s:.4g} s {source}")
