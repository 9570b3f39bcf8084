"""What can be known wrong about a profile before anything is started, and what is going to be profiled, in words."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

from nemo_bench.cluster import nsys
from nemo_bench.config import TrainConfig
from nemo_bench.errors import Problem

KINDS = ("none", "torch", "nsys")


def profile_problems(cfg: TrainConfig) -> list[Problem]:
    """Rules about the numbers themselves."""
    p, last, ranks = cfg.profile, cfg.trainer.max_steps - 1, cfg.world_size
    if p.kind not in KINDS:
        return [Problem("profile.kind", p.kind, "is no profiler", f"valid: {', '.join(KINDS)}")]
    if p.kind == "none":
        return []
    found: list[Problem] = []
    if p.kind == "nsys" and cfg.gpu.device != "cuda":
        found.append(Problem("profile", "nsys", f"profiles GPUs (gpu={cfg.gpu.name} is chosen)", "profile=torch works"))
    if last < 1:
        rule = f"needs a step that warms the profiler up, and trainer.max_steps={cfg.trainer.max_steps}"
        found.append(Problem("profile", p.kind, rule, "trainer.max_steps=2 or more; or profile=none"))
    else:
        if not 1 <= p.start_step <= last:
            rule = f"must be between 1 (step 0 warms the profiler up) and {last}, the last step"
            fix = f"nearest that works: {min(max(p.start_step, 1), last)}; or more trainer.max_steps"
            found.append(Problem("profile.start_step", p.start_step, rule, fix))
        elif not p.start_step <= p.end_step <= last:
            rule = f"must be between profile.start_step={p.start_step} and {last}, the last step"
            fix = f"nearest that works: {min(max(p.end_step, p.start_step), last)}; or more trainer.max_steps"
            found.append(Problem("profile.end_step", p.end_step, rule, fix))
    if not p.ranks or len(set(p.ranks)) < len(p.ranks) or not all(0 <= rank < ranks for rank in p.ranks):
        several = f"must name ranks of 0 to {ranks - 1}, one at least, each once"
        rule = several if ranks > 1 else "must name the one rank, 0"
        found.append(Problem("profile.ranks", p.ranks, rule, "such as [0]"))
    return found


def profile_machine_problems(cfg: TrainConfig) -> list[Problem]:
    """What keeps this machine from profiling as `cfg` says."""
    p = cfg.profile
    if p.kind == "none":
        return []
    found: list[Problem] = []
    if p.kind == "nsys" and shutil.which("nsys") is None:
        fix = "install NVIDIA Nsight Systems, or name its folder in PATH; profile=torch needs nothing"
        found.append(Problem("profile", "nsys", "there is no `nsys` on PATH here", fix))
    return found


def resumed_profile_problems(cfg: TrainConfig) -> list[Problem]:
    """A continued run must come to the profiled steps."""
    from nemo_bench.record.folder import RunFolder

    folder = cfg.checkpoint.resume_from
    checkpoint = (
        RunFolder(Path(folder)).last_checkpoint() if folder is not None and cfg.profile.kind != "none" else None
    )
    if checkpoint is None:
        return []
    first = int(checkpoint.name.partition("=")[2]) + 1  # the step that it goes on with
    if cfg.profile.start_step > first:
        return []
    rule = f"the run goes on at step {first} (checkpoint.resume_from), and a step ahead warms the profiler up"
    return [Problem("profile.start_step", cfg.profile.start_step, rule, f"nearest that works: {first + 1}")]


def profile_plan(cfg: TrainConfig) -> list[str]:
    """Lines of the plan of a point; none where nothing is profiled."""
    p = cfg.profile
    if p.kind == "none":
        return []
    steps = f"step {p.start_step}" if p.start_step == p.end_step else f"steps {p.start_step} to {p.end_step}"
    where = f"rank{'s' if len(p.ranks) > 1 else ''} {', '.join(map(str, p.ranks))}"
    lines = [
        f"  profile    {p.kind}: {steps} of {where}, to <run>/profile/; they and the steps beside them do not count"
    ]
    if p.kind == "nsys":
        command = nsys.command(cfg.profile, Path("<run>"), p.ranks[0])
        lines.append(f"             around the rank's command: {shlex.join(command)}")
    return lines
