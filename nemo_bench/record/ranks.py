"""What each rank's device did during a run: `ranks.json`, written once after the last step."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_bench.files import write_json

RANKS = "ranks.json"
# The first steps choose kernels, allocate, and wait for each other.
UNSTEADY_STEPS = 3

_NUMBERS = (
    ("step_time_median_s", "train_step_timing_s", statistics.median),
    ("own_time_s", "own_time_s", statistics.median),
    ("power_w", "power_w", statistics.fmean),
    ("sm_clock_mhz", "sm_clock_mhz", statistics.fmean),
    ("sm_clock_min_mhz", "sm_clock_min_mhz", min),
    ("temperature_max_c", "temperature_max_c", max),
    ("peak_memory_gib", "peak_memory_gib", max),
)


def gathered(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return one rank's steps in numbers; rows are lines of steps.jsonl, or what other ranks have of them."""
    steady = rows[min(UNSTEADY_STEPS, len(rows) - 1) :] if rows else []
    numbers: dict[str, Any] = {"steps": len(steady)}
    for name, source, summary in _NUMBERS:
        if values := [float(row[source]) for row in steady if row.get(source) is not None]:
            numbers[name] = round(summary(values), 6)  # type: ignore[operator]  # each takes a list of floats
    if watched := [row["throttle_reasons"] for row in steady if row.get("throttle_reasons") is not None]:
        counts = Counter(reason for reasons in watched for reason in set(reasons))
        numbers["throttled"] = {reason: round(counts[reason] / len(watched), 4) for reason in sorted(counts)}
    return numbers


def write_ranks(run_dir: Path, ranks: Sequence[dict[str, Any]]) -> None:
    """Write `ranks.json`."""
    write_json(run_dir / RANKS, {"schema_version": 1, "ranks": [*ranks]})
