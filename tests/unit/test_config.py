"""Every shipped configuration composes and passes its checks; the groups say what DESIGN and the recipe say."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from nemo_bench import cli, config
from nemo_bench.checks.configuration import configuration_problems
from nemo_bench.checks.problems import problems
from nemo_bench.launch.plan import plan, point_name

from ..composing import PROJECT, composed

PUBLISHED = {64: 128, 128: 256, 256: 512, 512: 1024, 1024: 2048, 2048: 4096}
EXPERIMENTS, ENTRYPOINTS = (
    sorted(path.stem for path in (PROJECT / "conf" / group).glob("*.yaml")) for group in ("experiment", "entrypoint")
)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STAGE_PATH", raising=False)
    monkeypatch.delenv("GSW_VERSION", raising=False)


@pytest.mark.parametrize(("precision", "gpus"), list(product(("bf16", "fp8"), PUBLISHED)))
def test_the_recipes_twelve_points(precision: str, gpus: int) -> None:
    cfg = composed(f"precision={precision}", f"scale={gpus}gpu")
    m = cfg.model
    assert configuration_problems(cfg) == []
    assert (cfg.trainer.num_nodes, cfg.trainer.devices) == (gpus // 8, 8)
    assert m.name == "70b"
    assert m.global_batch_size == PUBLISHED[gpus] == cfg.trainer.num_nodes * 16
    assert (m.tensor_model_parallel_size, m.pipeline_model_parallel_size) == (4, 4)
    assert (m.virtual_pipeline_model_parallel_size, m.context_parallel_size, m.micro_batch_size) == (5, 2, 1)
    assert cfg.num_micro_batches == 64  # the tables' GA
    assert cfg.trainer.max_steps == 50


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_is_the_point_its_name_says_with_every_entrypoint(experiment: str) -> None:
    for entrypoint in ENTRYPOINTS:
        cfg = composed(f"experiment={experiment}", f"entrypoint={entrypoint}")
        assert [problem for problem in problems(cfg) if not problem.missing] == []
        assert point_name(cfg).replace(" ", "_") == experiment.removeprefix("llama31_")
        assert cfg.entrypoint.image and "does not fit" not in plan(cfg)


def test_the_published_points_have_an_experiment_each() -> None:
    points = {f"llama31_70b_{precision}_{gpus}gpu" for precision, gpus in product(("bf16", "fp8"), PUBLISHED)}
    assert points <= set(EXPERIMENTS)


@pytest.mark.parametrize(
    ("overrides", "batch"),
    [
        (("model=8b", "scale=8gpu"), 128),
        (("model=8b", "scale=128gpu"), 2048),
        (("model=405b", "scale=576gpu", "data=mock"), 252),
    ],
)
def test_other_models_follow_their_own_batch_rule(overrides: tuple[str, ...], batch: int) -> None:
    cfg = composed(*overrides)
    assert cfg.model.global_batch_size == batch
    assert configuration_problems(cfg) == []


def test_bare_defaults_are_local_and_tiny() -> None:
    cfg = composed()
    assert configuration_problems(cfg) == []
    assert (cfg.model.name, cfg.data.name, cfg.gpu.name, cfg.cluster.name) == ("tiny", "local", "cpu", "local")


def test_the_command_line_wins_over_scale_local() -> None:
    cfg = composed("scale=local", "model=8b", "data=mock", "precision=bf16", "gpu=h200", "model.num_layers=8")
    assert (cfg.model.name, cfg.data.name, cfg.gpu.name, cfg.model.num_layers) == ("8b", "mock", "h200", 8)


@pytest.mark.parametrize("group", ["model", "precision", "scale", "data", "gpu", "cluster", "entrypoint"])
def test_every_option_of_every_group_composes(group: str) -> None:
    for option in (PROJECT / "conf" / group).glob("*.yaml"):
        composed(f"{group}={option.stem}")


def test_stage_path_and_results_version_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAGE_PATH", "/lustre/nemo")
    monkeypatch.setenv("GSW_VERSION", "24.11")
    cfg = composed("scale=64gpu")
    assert cfg.data.tokenizer == "/lustre/nemo/llama3.1-dataset/llama"
    assert cfg.results_version == "24.11"


def test_a_stored_configuration_loads_as_it_was(tmp_path: Path) -> None:
    cfg = composed("precision=fp8", "scale=256gpu")
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(cfg)))
    assert config.load(tmp_path / "config.yaml") == cfg


def test_vocabulary_is_padded_for_tensor_parallelism() -> None:
    assert composed("scale=64gpu").padded_vocab_size == 128512
    assert composed("model=8b", "scale=8gpu").padded_vocab_size == 128256


PATHS = ["/data/my-llama_00", "/a=b,c", "/$HOME", "/it's", '/"said"', "/Größe☃", "null", "1"]
PATHS += ["", "/a b", "/$(x) $", "/[a]{b: c}", "/ends with \\", "/two of them\\\\", "/before a quote\\'"]


@pytest.mark.parametrize("path", PATHS)
def test_a_quoted_path_is_read_as_it_was(path: str) -> None:
    quoted = cli.quoted_path(path)
    with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
        cfg = compose("train", [f"checkpoint.weights_from={quoted}", f"data.paths=[{quoted},{quoted}]"])
    assert cfg.checkpoint.weights_from == path
    assert cfg.data.paths == [path, path]
    assert path != PATHS[0] or quoted == path  # a plain path needs no quotes


def test_every_case_of_the_gpu_benchmark_passes_the_checks() -> None:
    content = OmegaConf.to_container(OmegaConf.load(PROJECT / "benchmarks" / "gpu_speed.yaml"))
    assert isinstance(content, dict)
    for name, case in content["cases"].items():
        cfg = composed(f"scale={case['gpus']}gpu", *content["common"].split(), *case["overrides"].split())
        assert configuration_problems(cfg) == [], name
        assert cfg.world_size == case["gpus"]


def test_a_slice_is_the_70b_but_for_its_layers_and_layout() -> None:
    whole, part = vars(composed("scale=64gpu").model), vars(composed("scale=1gpu", "model=70b_slice").model)
    sizes = {f"{parallel}_model_parallel_size" for parallel in ("tensor", "pipeline", "virtual_pipeline")}
    differing = {key for key in whole if whole[key] != part[key]}
    assert differing == {"name", "num_layers", "context_parallel_size", "global_batch_size"} | sizes
