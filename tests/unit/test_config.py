"""Every shipped configuration composes and passes its checks; the groups say what DESIGN and the recipe say."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from nemo_bench import cli, config
from nemo_bench.checks.configuration import configuration_problems
from nemo_bench.errors import value_of

from ..composing import PROJECT, composed


@pytest.mark.parametrize(
    ("overrides", "values"),
    [
        ("", "model.name=tiny data.name=local gpu.name=cpu cluster.name=local"),
        # The command line wins over what scale=local chooses.
        ("scale=local model=8b data=mock gpu=h200 precision=bf16", "model.name=8b data.name=mock gpu.name=h200"),
        ("model=8b scale=8gpu", "model.global_batch_size=128 padded_vocab_size=128256"),
        ("model=8b scale=128gpu", "model.global_batch_size=2048"),
        ("stage_path='~/x'", f"stage_path={Path.home()}/x data.folder={Path.home()}/x/data"),
        ("model=405b scale=576gpu data=mock", "model.global_batch_size=252"),
        # From STAGE_PATH and GSW_VERSION; the vocabulary is padded for tensor parallelism.
        ("scale=64gpu", "data.tokenizer=/lustre/llama3.1-dataset/llama results_version=24.11 padded_vocab_size=128512"),
    ],
)
def test_what_the_groups_choose(overrides: str, values: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAGE_PATH", "/lustre")
    monkeypatch.setenv("GSW_VERSION", "24.11")
    cfg = composed(*overrides.split())
    for key, value in (pair.split("=") for pair in values.split()):
        assert str(value_of(cfg, key)) == value


@pytest.mark.parametrize("group", ["model", "precision", "scale", "data", "gpu", "cluster", "entrypoint"])
def test_every_option_of_every_group_composes(group: str) -> None:
    for option in (PROJECT / "conf" / group).glob("*.yaml"):
        composed(f"{group}={option.stem}")


def test_a_stored_configuration_loads_as_it_was(tmp_path: Path) -> None:
    cfg = composed("precision=fp8", "scale=256gpu")
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(cfg)))
    assert config.load(tmp_path / "config.yaml") == cfg


PATHS = ["/data/my-llama_00", "/a=b,c", "/$HOME", "/it's", '/"said"', "/Größe☃", "null", "1"]
PATHS += ["", "/a b", "/$(x) $", "/[a]{b: c}", "/ends with \\", "/two of them\\\\", "/before a quote\\'"]


@pytest.mark.parametrize("path", PATHS)
def test_a_quoted_path_is_read_as_it_was(path: str) -> None:
    quoted = cli.quoted_path(path)
    with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
        cfg = compose("train", [f"checkpoint.weights_from={quoted}", f"data.paths=[{quoted},{quoted}]"])
    assert [cfg.checkpoint.weights_from, *cfg.data.paths] == [path] * 3
    assert path != PATHS[0] or quoted == path  # a plain path needs no quotes


def test_every_case_of_the_gpu_benchmark_passes_the_checks() -> None:
    benchmark = OmegaConf.load(PROJECT / "benchmarks" / "gpu_speed.yaml")
    for name, case in benchmark.cases.items():
        cfg = composed(f"scale={case.gpus}gpu", *benchmark.common.split(), *case.overrides.split())
        assert configuration_problems(cfg) == [], name
        assert cfg.world_size == case.gpus
