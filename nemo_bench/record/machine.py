"""The last machine check of each cluster: its file in the stage folder, written by check_machine.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_bench.files import write_json
from nemo_bench.record.folder import read_object

CHECKS = "results.machine_check"  # in the stage folder: a folder for each check, and the last one of each cluster
CHECK, EVIDENCE = "check.json", "evidence.json"


def write_latest(stage: Path, content: dict[str, Any]) -> None:
    """Keep a check as the last of its cluster and GPU kind."""
    write_json(stage / CHECKS / f"{content['cluster']}-{content['gpu']}.json", content)


def latest(stage: Path, cluster: str, gpu: str) -> dict[str, Any] | None:
    """Return the last check of a cluster's GPUs; None if there was none, or its file is damaged."""
    try:
        return read_object(stage / CHECKS / f"{cluster}-{gpu}.json")
    except (OSError, ValueError):
        return None
