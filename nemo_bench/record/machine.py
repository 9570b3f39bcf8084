"""The last machine check of each cluster, in the stage folder."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from nemo_bench.record.folder import read_object

CHECKS = "results.machine_check"  # in the stage folder: a folder for each check, and the last one of each cluster
CHECK, EVIDENCE, READ_FILE = "check.json", "evidence.json", "read_me.bin"


def latest_path(stage: str, cluster: str, gpu: str) -> Path:
    return Path(stage, CHECKS, f"{cluster}-{gpu}.json")


def latest_check(stage: str, cluster: str, gpu: str) -> dict[str, Any] | None:
    """Return the last check of a cluster's GPUs that came to its end; None if there is none."""
    with contextlib.suppress(OSError, ValueError):
        return read_object(latest_path(stage, cluster, gpu))
    return None


def check_line(check: dict[str, Any]) -> str:
    """Return a check in a line: when, findings, rates."""
    findings = "; ".join(f"{each['where'][0]['host']}: {each['what']}" for each in check["findings"]) or "no findings"
    rates = ", ".join(f"{name} {rate['middle']:.4g}" for name, rate in check["rates"].items() if " " not in name)
    return "{cluster}, {gpus} x {gpu}, {checked_at}: ".format(**check) + f"{findings}. {rates}"
