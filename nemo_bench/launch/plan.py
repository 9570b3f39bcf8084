"""What a point is, in words."""

from __future__ import annotations

import shlex
from pathlib import Path

from nemo_bench.cluster import nsys
from nemo_bench.config import TrainConfig


def profile_plan(cfg: TrainConfig) -> list[str]:
    """Return the plan's lines about the profile; none where nothing is profiled."""
    p = cfg.profile
    if p.kind == "none":
        return []
    steps = f"step {p.start_step}" if p.start_step == p.end_step else f"steps {p.start_step} to {p.end_step}"
    where = f"rank{'s' if len(p.ranks) > 1 else ''} {', '.join(map(str, p.ranks))}"
    lines = [
        f"  profile    {p.kind}: {steps} of {where}, to <run>/profile/; these and the steps next to them do not count"
    ]
    if p.kind == "nsys":
        command = nsys.command(cfg.profile, Path("<run>"), p.ranks[0])
        lines.append(f"             around the rank's command: {shlex.join(command)}")
    return lines
