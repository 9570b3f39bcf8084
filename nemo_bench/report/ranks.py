"""The ranks of a run compared with each other, and what their devices did."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nemo_bench.record.folder import read_object, typed
from nemo_bench.record.ranks import RANKS, gathered
from nemo_bench.report.logs import Log
from nemo_bench.report.model import DeviceUse, RankTimes

# A rank this much slower than the others is a straggler, if it also stands out from their spread.
STRAGGLER = 0.1
_RATE = "matrix rate (TFLOP/s)"


def read_devices(run_dir: Path, rows: list[dict[str, Any]]) -> tuple[DeviceUse, ...]:
    """Return what the ranks' devices did: by `ranks.json` or, of a run that ended early, rank 0's by its steps."""
    watched = any("power_w" in row or "sm_clock_mhz" in row for row in rows)
    ranks: list[dict[str, Any]] = [{"rank": 0, **gathered(rows)}] if watched else []
    if (run_dir / RANKS).exists():
        ranks = read_object(run_dir / RANKS)["ranks"]
    return tuple(typed(DeviceUse, rank) for rank in ranks)


def compared(devices: Sequence[DeviceUse], peaks: dict[int, dict[str, Any]], log: Log) -> tuple[RankTimes, ...]:
    """Return the ranks by matrix rate and by step time."""
    rates = {rank: float(peak["tflops"]) for rank, peak in peaks.items()}
    rates |= {device.rank: device.matrix_tflops for device in devices if device.matrix_tflops}
    times = {device.rank: device.step_time_median_s for device in devices if device.step_time_median_s}
    return (*_compared(_RATE, rates), *_compared("step time (s)", times or log.rank_times_s))


def _compared(measure: str, values: dict[int, float]) -> Iterator[RankTimes]:
    """Yield each rank beside the median of the others."""
    if len(values) < 2:
        return
    ordered = sorted(values.values())
    middle = statistics.median(ordered)
    spread = 1.4826 * statistics.median(abs(value - middle) for value in ordered)
    for rank, value in values.items():
        at = ordered.index(value)
        others = statistics.median(ordered[:at] + ordered[at + 1 :])
        slower = (others / value if measure == _RATE else value / others) - 1
        stands_out = len(values) == 2 or abs(value - others) > 3 * spread
        yield RankTimes(rank, measure, value, others, slower, slower > STRAGGLER and stands_out)
