"""What a profile needs, and what is said before it is started."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from nemo_bench.checks.configuration import configuration_problems, machine_problems
from nemo_bench.checks.profile import profile_plan
from nemo_bench.config import TrainConfig, typed

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def hydra_composes() -> Iterator[None]:
    with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
        yield


def composed(*overrides: str) -> TrainConfig:
    return typed(compose("train", list(overrides)))


GPU = ("scale=64gpu", "precision=bf16")


@pytest.mark.parametrize(
    ("overrides", "key", "rule", "fix"),
    [
        (["profile=torch", "profile.kind=perf"], "profile.kind", "no profiler", "none, torch, nsys"),
        (["profile=torch", "profile.start_step=0"], "profile.start_step", "between 1 (step 0 warms", "works: 1;"),
        (["profile=torch", "profile.start_step=60"], "profile.start_step", "49, the last step", "works: 49;"),
        (["profile=torch", "profile.end_step=50"], "profile.end_step", "start_step=10 and 49", "works: 49;"),
        (["profile=torch", "profile.end_step=9"], "profile.end_step", "start_step=10 and 49", "works: 10;"),
        (["profile=torch", "trainer.max_steps=1"], "profile", "warms the profiler up", "max_steps=2"),
        (["profile=torch", "profile.ranks=[1]"], "profile.ranks", "the one rank, 0", "[0]"),
        ([*GPU, "profile=torch", "profile.ranks=[]"], "profile.ranks", "one at least", "[0]"),
        ([*GPU, "profile=nsys", "profile.ranks=[0,64]"], "profile.ranks", "of 0 to 63", "[0]"),
        ([*GPU, "profile=nsys", "profile.ranks=[3,3]"], "profile.ranks", "each once", "[0]"),
        (["profile=nsys"], "profile", "profiles GPUs (gpu=cpu", "profile=torch"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_broken_rule_names_key_rule_and_fix(overrides: list[str], key: str, rule: str, fix: str) -> None:
    (found,) = configuration_problems(composed(*overrides))
    assert found.key == key and rule in found.rule and fix in found.fix, found


@pytest.mark.parametrize(
    "overrides",
    [
        ["profile.start_step=0"],  # nothing is profiled
        ["profile=torch"],
        ["profile=torch", "profile.start_step=1", "profile.end_step=49"],
        [*GPU, "profile=torch", "profile.ranks=[0,8,63]"],
        [*GPU, "profile=nsys"],
    ],
    ids=" ".join,
)
def test_what_works_is_not_refused(overrides: list[str]) -> None:
    assert configuration_problems(composed(*overrides)) == []


def test_nsys_must_be_where_the_ranks_are_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = composed("scale=8gpu", "cluster=local", "profile=nsys", "data=mock")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no `nsys` on PATH" in {problem.key: problem.rule for problem in machine_problems(cfg)}["profile"]
    (tmp_path / "nsys").touch(mode=0o755)
    assert "profile" not in {problem.key for problem in machine_problems(cfg)}


def test_a_run_that_goes_on_behind_the_profile_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoints/step=19/weights").mkdir(parents=True)
    resumed = (f"checkpoint.resume_from={tmp_path}", "trainer.max_steps=60", "profile=torch")
    (found,) = machine_problems(composed(*resumed))
    assert found.key == "profile.start_step" and "goes on at step 20" in found.rule and found.fix.endswith("21")
    assert machine_problems(composed(*resumed, "profile.start_step=21", "profile.end_step=22")) == []


def test_the_plan_says_what_will_be_profiled() -> None:
    assert profile_plan(composed()) == []
    (line,) = profile_plan(composed(*GPU, "profile=torch", "profile.ranks=[0,8]"))
    assert "torch: steps 10 to 12 of ranks 0, 8" in line
    first, command = profile_plan(composed(*GPU, "profile=nsys", "profile.end_step=10", "profile.ranks=[8]"))
    assert "nsys: step 10 of rank 8" in first
    assert "nsys profile '--output=<run>/profile/rank8'" in command and "--trace=cuda,nvtx" in command


def test_dry_and_help_tell_of_it(train_cli: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    shown = train_cli("scale=64gpu", "profile=nsys", "launch=dry", "profile.nsys_args=['--gpu-metrics-devices=all']")
    assert shown.returncode == 0, shown.stderr
    assert "nsys: steps 10 to 12 of rank 0" in shown.stdout and "--gpu-metrics-devices=all" in shown.stdout
    shown = train_cli("--help")
    assert "profile: none, nsys, torch" in shown.stdout and "profile=torch" in shown.stdout
    refused = train_cli("profile=perf")
    assert refused.returncode == 2 and "torch" in refused.stderr and os.linesep in refused.stderr
