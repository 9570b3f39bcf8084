"""What is said about a point before it is started."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

from nemo_bench.launch.plan import profile_plan

from ..composing import composed


def test_the_plan_says_what_will_be_profiled() -> None:
    assert profile_plan(composed()) == []
    (line,) = profile_plan(composed("scale=64gpu", "profile=torch", "profile.ranks=[0,8]"))
    assert "torch: steps 10 to 12 of ranks 0, 8" in line
    first, command = profile_plan(composed("scale=64gpu", "profile=nsys", "profile.end_step=10", "profile.ranks=[8]"))
    assert "nsys: step 10 of rank 8" in first
    assert "nsys profile '--output=<run>/profile/rank8'" in command and "--trace=cuda,nvtx" in command


def test_dry_and_help_tell_of_it(train_cli: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    shown = train_cli("scale=64gpu", "profile=nsys", "launch=dry", "profile.nsys_args=['--gpu-metrics-devices=all']")
    assert shown.returncode == 0, shown.stderr
    assert "nsys: steps 10 to 12 of rank 0" in shown.stdout and "--gpu-metrics-devices=all" in shown.stdout
    shown = train_cli("--help")
    assert "profile: none, nsys, torch" in shown.stdout and "profile=torch" in shown.stdout
    refused = train_cli("profile=perf")
    assert refused.returncode == 2 and "torch" in refused.stderr and "\n" in refused.stderr
