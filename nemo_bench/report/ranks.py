"""The ranks of a run compared with each other, and what their devices did."""

from __future__ import annotations

import json
import statistics
from dataclasses import fields
from pathlib import Path
from typing import Any

from nemo_bench.record.folder import RunFolder
from nemo_bench.record.ranks import read_ranks
from nemo_bench.report.logs import Log
from nemo_bench.report.model import DeviceUse, RankTimes

# A rank this much slower than the others is a straggler, if it also stands out from their spread.
STRAGGLER = 0.1
_MATRIX_RATE, _STEP_TIME = "matrix rate (TFLOP/s)", "step time (s)"
_DEVICE_FIELDS = [field.name for field in fields(DeviceUse)]


def read_devices(run_dir: Path, rows: list[dict[str, Any]], warnings: list[str]) -> tuple[DeviceUse, ...]:
    """Return what the ranks' devices did; empty where nothing measured it."""
    try:
        ranks = read_ranks(run_dir, rows)
        known = ({name: rank[name] for name in _DEVICE_FIELDS if rank.get(name) is not None} for rank in ranks)
        return tuple(DeviceUse(**{**values, "rank": int(values["rank"])}) for values in known)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # of a file that people may edit
        warnings.append(f"what the devices did cannot be read ({type(error).__name__}: {error})")
        return ()


def measured_peaks(folder: RunFolder) -> dict[int, dict[str, Any]]:
    """Return the matrix rate that each rank measured; those that are damaged are left out."""
    files = {path.stem.removeprefix("peak_rank"): read_json(path) for path in folder.path.glob("peak_rank*.json")}
    known = {int(number): peak for number, peak in files.items() if isinstance(peak.get("tflops"), (int, float))}
    return dict(sorted(known.items()))


def of_peaks(peaks: dict[int, dict[str, Any]]) -> tuple[RankTimes, ...]:
    """Return the matrix rates that processes on a CPU measured, all at once, before they trained."""
    return _compared(_MATRIX_RATE, {rank: float(peak["tflops"]) for rank, peak in peaks.items()})


def of_devices(devices: tuple[DeviceUse, ...]) -> tuple[RankTimes, ...]:
    """Return the matrix rates of the ranks' own GPUs, and their step times."""
    rates = {device.rank: device.matrix_tflops for device in devices if device.matrix_tflops}
    times = {device.rank: device.step_time_median_s for device in devices if device.step_time_median_s}
    return _compared(_MATRIX_RATE, rates) + _compared(_STEP_TIME, times)


def of_log(log: Log) -> tuple[RankTimes, ...]:
    """Return the step times of labelled ranks, and whom NVIDIA's straggler detection names."""
    ranks = _compared(_STEP_TIME, log.rank_times_s)
    named = {rank.rank for rank in ranks if rank.straggler}
    return ranks + tuple(
        RankTimes(rank, "NVIDIA's straggler detection", None, None, None, True)
        for rank in log.stragglers
        if rank not in named
    )


def _compared(measure: str, values: dict[int, float]) -> tuple[RankTimes, ...]:
    """Return each rank beside the median of the others."""
    if len(values) < 2:
        return ()
    ordered = sorted(values.values())
    middle = statistics.median(ordered)
    spread = 1.4826 * statistics.median(abs(value - middle) for value in ordered)
    ranks = []
    for rank, value in values.items():
        at = ordered.index(value)
        others = statistics.median(ordered[:at] + ordered[at + 1 :])
        slower = (others / value if measure == _MATRIX_RATE else value / others) - 1
        stands_out = len(values) == 2 or abs(value - others) > 3 * spread
        ranks.append(RankTimes(rank, measure, value, others, slower, slower > STRAGGLER and stands_out))
    return tuple(ranks)


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object; empty where there is none: a run that ended early lacks some files."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
