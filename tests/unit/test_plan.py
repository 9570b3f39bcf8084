"""What is said about a point before it is started."""

from __future__ import annotations

import subprocess
from collections.abc import Callable


def test_dry_and_help_tell_of_a_profile(train_cli: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    shown = train_cli("scale=64gpu", "profile=nsys", "launch=dry", "profile.ranks=[0,8]", "profile.end_step=10")
    assert shown.returncode == 0, shown.stderr
    assert "nsys: steps 10 to 10 of ranks 0, 8" in shown.stdout
    assert "nsys profile '--output=<run>/profile/rank0'" in shown.stdout and "--trace=cuda,nvtx" in shown.stdout
    shown = train_cli("--help")
    assert "profile: none, nsys, nsys_recipe, torch" in shown.stdout and "profile=torch" in shown.stdout
    refused = train_cli("profile=perf")
    assert refused.returncode == 2 and "torch" in refused.stderr and "\n" in refused.stderr
