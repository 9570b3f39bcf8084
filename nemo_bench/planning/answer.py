"""A point's estimate with all that is said beside it: throughput, memory, published rows, calibration."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_bench.config import TrainConfig, load
from nemo_bench.entrypoints import entrypoint_of
from nemo_bench.errors import BenchError
from nemo_bench.estimate.rates import constant
from nemo_bench.estimate.step import Estimate, estimate_of
from nemo_bench.flops import days_to_train
from nemo_bench.memory import GIB, estimate_memory
from nemo_bench.report import references
from nemo_bench.report.model import SHORT_NAMES, point_name
from nemo_bench.report.references import ReferencePoint
from nemo_bench.report.runs import load_run


@dataclass(frozen=True)
class Calibration:
    """How much slower than its estimate a measured point was."""

    factor: float
    source: str  # the point, and where its time comes from


@dataclass(frozen=True)
class Answer:
    """What is said about a point whose layout has passed the checks."""

    cfg: TrainConfig
    estimate: Estimate
    calibration: Calibration | None = None

    @property
    def name(self) -> str:
        return point_name(self.cfg.model.name, self.cfg.precision.name, self.cfg.world_size)

    @property
    def layout(self) -> str:
        """The layout in the field's short names."""
        sizes = {**self._sizes, "DP": self.cfg.data_parallel_size}
        batch = f"MBS {sizes.pop('MBS')}, GBS {sizes.pop('GBS')}, GA {self.cfg.num_micro_batches}"
        return f"{' '.join(f'{name}{size}' for name, size in sizes.items())}, {batch}"

    @property
    def _sizes(self) -> dict[str, int]:
        return {short: getattr(self.cfg.model, name) or 1 for name, short in SHORT_NAMES.items()}

    @property
    def step_time_s(self) -> float:
        """With the calibration, if there is one."""
        return self.estimate.step_time_s * (self.calibration.factor if self.calibration else 1.0)

    @property
    def range_s(self) -> tuple[float, float]:
        error = constant("error")["calibrated"] if self.calibration else self.estimate.error
        return self.step_time_s * (1 - error), self.step_time_s * (1 + error)

    @property
    def tokens_per_s(self) -> float:
        return self.cfg.model.seq_length * self.cfg.model.global_batch_size / self.step_time_s

    @property
    def days(self) -> float:
        return days_to_train(tokens=self.cfg.total_tokens, tokens_per_s=self.tokens_per_s)

    @property
    def memory_gib(self) -> float | None:
        known = entrypoint_of(self.cfg).memory_is_estimated
        return estimate_memory(self.cfg).total_bytes / GIB if known else None

    def mfu(self, *, causal: bool = False) -> float | None:
        """Return the model FLOPs utilisation, None for a number format without a peak."""
        cfg, peak = self.cfg, self.cfg.gpu.peak_tflops.get(self.cfg.precision.name)
        per_token = cfg.architecture.flops_per_sequence(cfg.model.seq_length, causal=causal) / cfg.model.seq_length
        return per_token * self.tokens_per_s / cfg.world_size / 1e12 / peak if peak else None

    def published(self) -> list[tuple[ReferencePoint, float]]:
        """Return what was published for this point, its entrypoint's own table first, with the estimate's error."""
        m, sizes = self.cfg.model, self._sizes
        own = (self.cfg.gpu.name, self.cfg.precision.name, self.cfg.world_size, sizes.pop("GBS"), m.seq_length)
        rows = (
            row
            for table in references.names()
            for row in references.load(table).points
            if own == (row.gpu, row.precision, row.gpus, row.global_batch_size, row.seq_length)
            and all(row.architecture[name] == getattr(m, name) for name in ("num_layers", "hidden_size"))
            and all(row.layout.get(name, 1) == size for name, size in sizes.items())
        )
        own_first = sorted(rows, key=lambda row: row.entrypoint != self.cfg.entrypoint.name)
        return [(row, self.step_time_s / row.step_time_s - 1) for row in own_first]

    def to_dict(self) -> dict[str, Any]:
        """Return what estimate.json holds."""
        own = ("layout", "step_time_s", "range_s", "tokens_per_s", "days", "memory_gib")
        estimate, rates = {**vars(self.estimate), "host_is_limit": self.estimate.host_is_limit}, self.estimate.rates
        del estimate["rates"], estimate["timeline"]
        return {
            "point": self.name,
            **{name: getattr(self, name) for name in own},
            "mfu_recipe": self.mfu(),
            "mfu_causal": self.mfu(causal=True),
            "calibration": self.calibration and vars(self.calibration),
            "published": {row.reference: {"step_time_s": row.step_time_s, "error": e} for row, e in self.published()},
            "estimate": estimate,
            "rates": {"gpu": rates.gpu, "derived_from": rates.derived_from}
            | {name: rates.tables[name] for name in ("hardware", "date", "versions")},
        }


def calibration_by(cfg: TrainConfig, calibrate: str) -> Calibration:
    """Return the factor of a point that took so many seconds, or of a run folder's own; BenchError for neither."""
    path = Path(calibrate)
    if re.fullmatch(r"\d+(\.\d+)?", calibrate) and float(calibrate) > 0:
        measured_s, source = float(calibrate), "as given"
    elif (path / "config.yaml").is_file():
        run, cfg, source = load_run(path), load(path / "config.yaml"), f"in {calibrate}"
        if run.times is None:
            raise BenchError(f"calibrate={path}: no step of this run counts; python report.py {path} says why")
        measured_s = run.times.mean_s
    else:
        raise BenchError(f"calibrate={calibrate}: give a run folder (with its config.yaml), or the seconds of a step")
    answer = Answer(cfg, estimate_of(cfg))
    return Calibration(measured_s / answer.step_time_s, f"{answer.name}, {measured_s:.4g} s {source}")
