"""Every rule about a configuration: what breaks it, what the message names, and what next to it stays allowed."""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nemo_bench.checks.configuration import configuration_problems
from nemo_bench.checks.problems import problems
from nemo_bench.config import TrainConfig
from nemo_bench.errors import Problem
from nemo_bench.fields import field_problems, settings
from tests import composing

SHORT = {
    "LAYOUT": "model.tensor_model_parallel_size * model.pipeline_model_parallel_size * model.context_parallel_size",
    "TP": "model.tensor_model_parallel_size",
    "VP": "model.virtual_pipeline_model_parallel_size",
}
# Overrides | the key that is named | a part of the rule | a part of the fix; "ok:" lines are allowed as they are.
LINES = [line for line in Path(__file__).with_name("rules.txt").read_text().splitlines() if line]
BROKEN = [[column.strip() for column in line.split(" | ")] for line in LINES if not line.startswith("ok: ")]
ALLOWED = [line.removeprefix("ok: ") for line in LINES if line.startswith("ok: ")]


def composed(overrides: str) -> TrainConfig:
    return composing.composed(*shlex.split(overrides.replace("'", '"\'"').replace("NEWLINE", "\n")))


def broken(overrides: str) -> list[Problem]:
    return configuration_problems(composed(overrides))


@pytest.mark.parametrize(("overrides", "key", "rule", "fix"), BROKEN, ids=[row[0] for row in BROKEN])
def test_a_broken_rule_names_key_rule_and_fix(overrides: str, key: str, rule: str, fix: str) -> None:
    named = [problem for problem in broken(overrides) if problem.key == SHORT.get(key, key)]
    assert any(rule in problem.rule and fix in problem.fix for problem in named), broken(overrides)


@pytest.mark.parametrize("overrides", ALLOWED)
def test_what_works_is_not_refused(overrides: str) -> None:
    assert broken(overrides) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1, 10**20])
def test_every_number_of_the_configuration_has_a_range(value: float) -> None:
    cfg = composed("scale=64gpu")
    numbers = [setting for setting in settings(cfg) if re.search(r"\b(int|float)\b", str(setting[2].type))]
    assert len(numbers) > 40
    for _, owner, field in numbers:
        setattr(owner, field.name, value)
    # A float may be as large as one likes, unless its field says otherwise.
    limited = {key for key, _, field in numbers if "int" in str(field.type) or {"most", "below"} & {*field.metadata}}
    outside = limited if value == 10**20 else {key for key, _, _ in numbers}
    assert {problem.key for problem in field_problems(cfg)} == outside


def test_all_problems_are_named_at_once() -> None:
    named = {problem.key for problem in broken("scale=64gpu gpu=a100 precision=fp8 model.num_layers=81 data.split=x")}
    assert named == {"precision", "model.num_layers", "data.split"}
    assert len(broken("trainer.max_steps=0 data.kind=x model.optim.lr=-1")) == 3


EIGHT = (
    "scale=8gpu model=8b model.context_parallel_size=1 trainer.devices=4096 model.global_batch_size=4096 cluster=local"
)
# 8B on one H200 needs about 156 GiB.
MEMORY = "model=8b scale=1gpu gpu=h200 data=mock model.context_parallel_size=1 cluster.container=null"
# Overrides | what is wrong | what is missing where it is to run.
PLACES = f"""
scale=64gpu data=mock model.num_layers=81 | model.num_layers | cluster.container.image
scale=64gpu data=mock stage_path=STAGE/file | | cluster.container.image stage_path
scale=64gpu data=mock cluster.container=null | |
data=mock stage_path=STAGE/file/stage | | stage_path
scale=64gpu cluster.container=null | | data.paths data.paths data.tokenizer
{EIGHT} data=mock checkpoint.resume_from=STAGE | | trainer.devices checkpoint.resume_from
{EIGHT} data=mock checkpoint.weights_from=/nowhere | | trainer.devices checkpoint.weights_from
{EIGHT} data=mock profile=nsys | | profile.kind trainer.devices
data.split='999,1,0' | data.split |
{MEMORY} | gpu.memory_gib |
{MEMORY} gpu.memory_gib=150 | |
{MEMORY} check_memory=false | |
{MEMORY} gpu.memory_gib=null | |
"""


@pytest.mark.parametrize("row", PLACES.strip().splitlines())
def test_a_point_is_held_against_the_place_where_it_runs(
    row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PATH", str(tmp_path))  # without nsys
    overrides, wrong, missing = (column.strip() for column in row.split("|"))
    broken_rules = problems(composed(f"stage_path={tmp_path} {overrides.replace('STAGE', str(tmp_path))}"))
    assert [problem.key for problem in broken_rules if not problem.missing] == wrong.split()
    assert [problem.key for problem in broken_rules if problem.missing] == missing.split()


def resumed(folder: Path, overrides: str) -> list[str]:
    """Return what is wrong with a run that starts from a checkpoint of the tiny model; nothing is missing."""
    broken_rules = problems(composed(f"checkpoint.resume_from='{folder}' {overrides}"))
    assert not any(problem.missing for problem in broken_rules)
    return [f"{problem.key}: {problem.rule}; {problem.fix}" for problem in broken_rules]


def test_a_continued_run_has_the_same_model_steps_left_and_comes_to_its_profile(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints/step=19"
    (checkpoint / "weights").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(composed(""))))
    for folder in (tmp_path, checkpoint):
        assert resumed(folder, "profile=torch profile.start_step=21 profile.end_step=22") == []
        (other,) = resumed(folder, "model.num_layers=5")
        assert "was written by a model of other sizes: num_layers=4" in other
    (late,) = resumed(tmp_path, "trainer.max_steps=20")
    assert "checkpoint.resume_from: its last checkpoint is of step 20" in late
    (profile,) = resumed(tmp_path, "profile=torch")
    assert "profile.start_step: the run continues at step 20" in profile and profile.endswith("works: 21")
    assert resumed(tmp_path, f"checkpoint.resume_from=null checkpoint.weights_from='{tmp_path}' model.num_layers=5")
