"""entrypoint=nemo_24_09: its NeMo 1 configuration against the recipe's, its command line, its batch script.

`NEMO_BENCH_WRITE_GOLDEN=1 pytest tests/unit/test_nemo_24_09.py` writes the golden files anew; read the diff.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from nemo_bench.checks.configuration import configuration_problems
from nemo_bench.config import TrainConfig
from nemo_bench.entrypoints import entrypoint_of, nemo_24_09
from nemo_bench.errors import ConfigurationRefused
from nemo_bench.launch.batch_script import batch_script, rank_environment
from nemo_bench.launch.plan import results_dir

from .. import composing

PROJECT = composing.PROJECT
GOLDEN = PROJECT / "tests" / "golden"
FACTS = PROJECT / "tests" / "nemo_24_09"
DIFFERENCES = yaml.safe_load((FACTS / "differences.yaml").read_text())
STAGE = "/lustre/nemo"
GPUS = (64, 128, 256, 512, 1024, 2048)


@pytest.fixture(autouse=True)
def stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAGE_PATH", STAGE)


def composed(*overrides: str) -> TrainConfig:
    return composing.composed("entrypoint=nemo_24_09", *overrides)


def run_dir(cfg: TrainConfig) -> Path:
    return results_dir(cfg) / "20261122-120000-abcd"


def nemo(*overrides: str) -> dict[str, Any]:
    cfg = composed(*overrides)
    assert configuration_problems(cfg) + entrypoint_of(cfg).problems(cfg) == []
    return nemo_24_09.configuration(cfg, run_dir(cfg))


def leaves(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def recipe(model: str, precision: str, gpus: int) -> dict[str, Any]:
    """The recipe's whole configuration: its own file's values, and what its configure.sh puts over them."""
    with (FACTS / "recipe_24.11_values.tsv").open() as file:
        rows = csv.DictReader(
            (line for line in file if not line.startswith("#")), delimiter="\t", quoting=csv.QUOTE_NONE
        )
        values = {row["key"]: json.loads(row[model]) for row in rows if row[model] != "absent"}
    fp8, sequences = precision == "fp8", {"8b": 128 * gpus // 8, "70b": 128 * gpus // 64, "405b": 252 * gpus // 576}
    values |= {
        **{"trainer.num_nodes": gpus // 8, "trainer.devices": 8, "trainer.max_steps": 50},
        **{"trainer.val_check_interval": 50, "model.global_batch_size": sequences[model]},
        **{f"model.{name}": fp8 for name in ("fp8", "fp8_hybrid", "fp8_params")},
        **{"data_dir": "/dataset", "run.results_dir": None, "model.tokenizer.type": "/dataset/llama"},
        "model.data.index_mapping_dir": f"{STAGE}/index_mapping",
    }
    if model == "405b":
        values |= {"model.data.data_impl": "mock", "model.data.data_prefix": ""}
        values |= {f"model.ub_tp_comm_overlap_cfg.{layer}_fprop.fp8_buf": fp8 for layer in ("proj", "fc2")}
    return values


@pytest.mark.parametrize(
    ("model", "gpus"), [("8b", 8), ("8b", 128), *(("70b", gpus) for gpus in GPUS), ("405b", 576), ("405b", 2304)]
)
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_every_key_is_the_recipes_or_a_named_difference(model: str, gpus: int, precision: str) -> None:
    overrides = [f"model={model}", f"precision={precision}", f"scale={gpus}gpu", *["data=mock"] * (model == "405b")]
    ours, theirs = dict(leaves(nemo(*overrides))), recipe(model, precision, gpus)
    theirs |= {key: pytest.approx(value) for key, value in theirs.items() if isinstance(value, float)}
    differing = {key for key in {*ours, *theirs} if (key in ours, ours.get(key)) != (key in theirs, theirs.get(key))}
    listed = [
        key
        for difference in DIFFERENCES
        if model in difference.get("models", [model]) and difference["why"]
        for key in difference["keys"]
    ]
    named = {key: [name for name in listed if f"{key}.".startswith(f"{name}.")] for key in differing}
    assert [key for key, names in named.items() if not names] == []
    # Nothing is listed that does not differ.
    assert {*listed} == {name for names in named.values() for name in names}


def test_the_ranks_have_the_recipes_environment() -> None:
    """What its configure.sh exports, but for CUDA_VISIBLE_DEVICES, which Slurm sets, and the folder of NeMo."""
    text = """PYTHONUNBUFFERED=1 SLURM_UNBUFFEREDIO=1 TORCHX_MAX_RETRIES=0 CUDA_DEVICE_MAX_CONNECTIONS=1
        TOKENIZERS_PARALLELISM=False TRANSFORMERS_OFFLINE=1 TORCH_NCCL_AVOID_RECORD_STREAMS=1 NCCL_NVLS_ENABLE=0
        NVTE_DP_AMAX_REDUCE_INTERVAL=0 NVTE_ASYNC_AMAX_REDUCTION=1 NVTE_APPLY_QK_LAYER_SCALING=0 NVTE_FLASH_ATTN=0
        NVTE_FUSED_ATTN=1 NEMO_LOG_MEMORY_USAGE=1 NVTE_FWD_LAYERNORM_SM_MARGIN=8 NVTE_BWD_LAYERNORM_SM_MARGIN=8
        HYDRA_FULL_ERROR=1"""
    expected = dict(pair.split("=") for pair in text.split())
    assert rank_environment(composed("scale=64gpu")) == expected
    large = rank_environment(composed("scale=576gpu", "model=405b"))
    assert large == {**expected, "NCCL_P2P_NET_CHUNKSIZE": "262144"}
    words = entrypoint_of(composed("scale=64gpu")).rank_command(composed("scale=64gpu"), Path("/run"), "python3")
    assert words[3:5] == ["/run", "--in=/opt/NeMo"]


@pytest.mark.parametrize(
    ("gpus", "layers", "pp", "vp", "batch"), [(32, 7, 1, None, 126), (96, 21, 3, 7, 126), (192, 42, 3, 7, 252)]
)
def test_the_recipes_stand_ins_for_the_405b(gpus: int, layers: int, pp: int, vp: int | None, batch: int) -> None:
    model = nemo(f"experiment=llama31_405b_fp8_{gpus}gpu")["model"]
    assert (model["num_layers"], model["global_batch_size"]) == (layers, batch)
    assert (model["pipeline_model_parallel_size"], model["virtual_pipeline_model_parallel_size"]) == (pp, vp)
    # Deferral is of a pipeline, and Megatron refuses it without one.
    assert model["defer_embedding_wgrad_compute"] == (pp > 1)


AWKWARD = ("a b", "a=b,c", "it's", 'say "hi"', "$HOME", "${oc.env:HOME}", "\\${x}", "größe", "[x]{y}", "a\\", "x: #")


@pytest.mark.parametrize("name", AWKWARD)
def test_any_path_survives_yaml_shell_and_hydras_grammar(name: str, tmp_path: Path) -> None:
    cfg = composed("scale=64gpu")
    folder = tmp_path / name / "run"
    folder.mkdir(parents=True)
    cfg.stage_path = str(tmp_path / name)
    cfg.data.tokenizer = f"{cfg.stage_path}/tokenizer"
    cfg.data.paths = [f"{cfg.stage_path}/{part}" for part in ("one", "two")]
    for path, text in entrypoint_of(cfg).files(cfg, folder).items():
        path.write_text(text)
    expected = nemo_24_09.configuration(cfg, folder)
    # The file alone, and the command line as a shell takes it apart and NeMo's Hydra reads it.
    loaded = OmegaConf.load(folder / nemo_24_09.CONFIG_FILE)
    assert OmegaConf.to_container(loaded, resolve=True) == expected
    (line,) = [line for line in batch_script(cfg, folder).splitlines() if line.startswith("srun ")]
    shown = subprocess.run(["bash", "-c", f"set -- {line}\nprintf '%s\\0' \"$@\""], capture_output=True, check=True)
    words = shown.stdout.decode().split("\0")[:-1]
    at = words.index(str(cfg.entrypoint.program))
    assert words[at + 1 : at + 3] == [f"--config-path={folder}", "--config-name=nemo_24_09.yaml"]
    with initialize_config_dir(str(folder), version_base=None):
        again = compose("nemo_24_09", words[at + 3 :])
    assert OmegaConf.to_container(again, resolve=True) == expected


@pytest.mark.parametrize(("precision", "gpus"), [("bf16", 64), ("fp8", 2048)])
def test_script_and_configuration_are_the_golden_ones(
    precision: str, gpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"ACCOUNT": "account_name", "PARTITION": "batch", "GPUS_PER_NODE": "8"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    cfg = composed(f"scale={gpus}gpu", f"precision={precision}")
    texts = {"sbatch": batch_script(cfg, run_dir(cfg)), "yaml": nemo_24_09.yaml_text(cfg, run_dir(cfg))}
    for suffix, text in texts.items():
        text = text.replace(str(PROJECT), "/home/user/nemo-bench")
        golden = GOLDEN / f"nemo_24_09_70b_{precision}_{gpus}gpu.{suffix}"
        if os.environ.get("NEMO_BENCH_WRITE_GOLDEN"):
            golden.write_text(text)
        assert text == golden.read_text()


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        ("precision=fp8 model.tp_comm_overlap_cfg=launcher_fp8", "model.ub_tp_comm_overlap_cfg.proj_fprop.fp8_buf", 1),
        ("model.tp_comm_overlap_cfg=null", "model.ub_tp_comm_overlap_cfg", None),
        # settings of NeMo 1 win over all others
        ("+entrypoint.settings.model.optim.bucket_cap_mb=400", "model.optim.bucket_cap_mb", 400),
        ("+entrypoint.settings.model.gc_interval=0", "model.gc_interval", 0),
    ],
)
def test_what_else_can_be_chosen(overrides: str, key: str, value: object) -> None:
    content: Any = nemo("scale=64gpu", *overrides.split())
    for name in key.split("."):
        content = content[name]
    assert content == value


def test_the_environment_follows_the_device_and_the_attention() -> None:
    flash = rank_environment(composed("scale=64gpu", "model.attention_backend=flash"))
    assert (flash["NVTE_FLASH_ATTN"], flash["NVTE_FUSED_ATTN"]) == ("1", "0")
    auto = rank_environment(composed("scale=64gpu", "model.attention_backend=auto"))
    assert "NVTE_FLASH_ATTN" not in auto and "PYTHONPATH" not in auto
    # On a CPU a module of this project stands before the program.
    assert rank_environment(composed("scale=local", "cluster=slurm"))["PYTHONPATH"] == str(PROJECT)


def test_a_profile_is_nsys_on_its_ranks_around_the_steps(tmp_path: Path) -> None:
    cfg = composed("scale=64gpu", "profile=nsys", "profile.start_step=20", "profile.end_step=22", "profile.ranks=[0,8]")
    block = nemo_24_09.configuration(cfg, tmp_path)["model"]["nsys_profile"]
    assert block == {"enabled": True, "start_step": 20, "end_step": 22, "ranks": [0, 8], "gen_shape": False}
    words = entrypoint_of(cfg).rank_command(cfg, tmp_path, "python3")
    at = words.index("--on-ranks")
    assert words[at + 1 : at + 4] == ["0,8", "nsys", "profile"]
    assert f"--output={tmp_path}/profile/rank{{rank}}" in words[at : words.index("--")]
    assert words[words.index("--") + 1] == "python3"


@pytest.mark.parametrize(
    ("overrides", "key", "fix"),
    [
        (["scale=64gpu", "precision=fp8", "precision.fp8_recipe=tensorwise"], "precision.fp8_recipe", "delayed"),
        (["scale=64gpu", "model.cuda_graph_impl=local"], "model.cuda_graph_impl", "leave it out (none)"),
        (["scale=64gpu", "model.optim.exp_avg_dtype=bf16"], "model.optim.exp_avg_dtype", "leave it out (fp32)"),
        (["scale=64gpu", "profile=torch"], "profile.kind", "use profile=nsys"),
        (["scale=64gpu", "checkpoint.every_n_steps=10"], "checkpoint.every_n_steps", "entrypoint=nemo2"),
        (["scale=64gpu", "checkpoint.resume_from=/x"], "checkpoint.resume_from", "null"),
        (["scale=64gpu", "model.attention_backend=local"], "model.attention_backend", "fused, flash, unfused, auto"),
        (["scale=64gpu", "model.tp_comm_overlap_cfg=launcher_fp8"], "model.tp_comm_overlap_cfg", "auto, null"),
        (["scale=local", "data=mock"], "model.vocab_size", "4096"),
        (["scale=64gpu", "entrypoint.program=null"], "entrypoint.program", "megatron_gpt_pretraining.py"),
    ],
)
def test_what_it_cannot_do_is_refused(overrides: list[str], key: str, fix: str) -> None:
    cfg = composed(*overrides)
    broken = configuration_problems(cfg) + entrypoint_of(cfg).problems(cfg)
    assert any(problem.key == key and fix in problem.fix for problem in broken)


def test_a_program_that_is_missing_on_this_machine_is_refused() -> None:
    cfg = composed("scale=local")
    (problem,) = entrypoint_of(cfg).machine_problems(cfg)
    assert problem.key == "entrypoint.program" and "cluster=slurm" in problem.fix
    cfg.entrypoint.program = __file__
    assert entrypoint_of(cfg).machine_problems(cfg) == []


def test_an_unknown_program_is_refused() -> None:
    with pytest.raises(ConfigurationRefused, match=r"entrypoint\.stack=nemo_3\n.*\n +valid: nemo2, megatron_bridge"):
        entrypoint_of(composed("entrypoint.stack=nemo_3"))
