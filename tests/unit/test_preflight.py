"""Each rule that a configuration can break: a bad example, the key it names, and the values that it says work."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from nemo_bench.checks.configuration import configuration_problems, machine_problems
from nemo_bench.config import typed
from nemo_bench.errors import ConfigurationRefused, Problem

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def hydra_composes() -> Iterator[None]:
    with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
        yield


def problems(*overrides: str) -> list[Problem]:
    return configuration_problems(typed(compose("train", list(overrides))))


LAYOUT = "model.tensor_model_parallel_size * model.pipeline_model_parallel_size * model.context_parallel_size"
BAD = [
    # overrides, the key named, a part of the rule, a part of the fix
    (["scale=8gpu"], LAYOUT, "must divide the number of GPUs", "a scale with a multiple of 32"),
    (["trainer.devices=3", "model.tensor_model_parallel_size=2"], LAYOUT, "= 3", "divide 3: 1; or"),
    (["scale=64gpu", "model.num_layers=81"], "model.num_layers", "20 pipeline chunks", "80, 100"),
    (
        ["model.num_attention_heads=7", "model.num_query_groups=7"],
        "model.num_attention_heads",
        "divide model.hidden",
        "4, 8",
    ),
    (
        ["model.num_query_groups=3"],
        "model.num_query_groups",
        "must divide model.num_attention_heads=8",
        "2, 4",
    ),
    (
        ["trainer.devices=8", "model.tensor_model_parallel_size=8"],
        "model.tensor_model_parallel_size",
        "must divide model.num_query_groups=4",
        "4",
    ),
    (
        ["scale=64gpu", "model.seq_length=8190"],
        "model.seq_length",
        "2 * model.context_parallel_size = 4",
        "8188, 8192",
    ),
    (
        [
            "trainer.devices=4",
            "model.tensor_model_parallel_size=4",
            "model.sequence_parallel=true",
            "model.seq_length=254",
        ],
        "model.seq_length",
        "model.sequence_parallel=true",
        "248, 256",
    ),
    (["scale=64gpu", "model.global_batch_size=129"], "model.global_batch_size", "multiple of 2", "128, 130"),
    (
        ["scale=64gpu", "model.global_batch_size=130"],
        "model.global_batch_size",
        "65 micro-batches, which must be a multiple of model.pipeline_model_parallel_size=4",
        "128, 136",
    ),
    (
        ["model.virtual_pipeline_model_parallel_size=2"],
        "model.virtual_pipeline_model_parallel_size",
        "interleaves pipeline stages",
        "null",
    ),
    (["precision=fp8"], "precision", "gpu=cpu does not compute in fp8", "fp32, bf16"),
    (["scale=64gpu", "gpu=a100", "precision=fp8"], "precision", "gpu=a100 does not compute in fp8", "bf16"),
    (["scale=64gpu", "precision=fp8", "model.hidden_size=8224"], "model.hidden_size", "in fp8", "8192, 8256"),
    (
        ["model.context_parallel_size=2", "trainer.devices=2"],
        "model.context_parallel_size",
        "Transformer Engine",
        "1",
    ),
    (["model.apply_rope_fusion=true"], "model.apply_rope_fusion", "needs a GPU", "false"),
    (["model.attention_backend=fused"], "model.attention_backend", "CUDA kernel", "local"),
    (["model.attention_backend=fast"], "model.attention_backend", "no attention backend", "flash, fused"),
    (["gpu.device=tpu"], "gpu.device", "no device type", "cuda, cpu"),
    (["trainer.num_nodes=2"], "trainer.num_nodes", "this machine alone", "1"),
    (["model.num_layers=0"], "model.num_layers", "at least 1", "1"),
    (["trainer.max_steps=0"], "trainer.max_steps", "at least 1", "1"),
    (["model.optim.lr=nan"], "model.optim.lr", "0 or more, and finite", "0.0003"),
    (["model.optim.min_lr=inf"], "model.optim.min_lr", "0 or more, and finite", "3e-05"),
    (["model.optim.lr=1e-5"], "model.optim.min_lr", "above model.optim.lr (1e-05)", "1e-05"),
    (["model.optim.warmup_steps=-1"], "model.optim.warmup_steps", "0 or more", "2000"),
    (["model.optim.clip_grad=-1"], "model.optim.clip_grad", "0 or more", "1.0"),
    (["model.optim.adam_beta2=1"], "model.optim.adam_beta2", "less than 1", "0.95"),
    (["trainer.seed=-1"], "trainer.seed", "0 or more", "1234"),
    (["model.layernorm_epsilon=-1"], "model.layernorm_epsilon", "more than 0", "default"),
    (["gpu.peak_tflops.fp32=nan"], "gpu.peak_tflops.fp32", "more than 0", "default"),
    (["total_tokens=nan"], "total_tokens", "more than 0", "default"),
    (["results_version="], "results_version", "folder under results", "without slashes"),
    (["model.name=../x"], "model.name", "folder under results", "without slashes"),
    (["cluster.scheduler=pbs"], "cluster.scheduler", "no scheduler", "none, slurm"),
    (["data.num_workers=-1"], "data.num_workers", "0 or more", "0"),
    (
        ["model.optim.overlap_param_gather=true"],
        "model.optim.overlap_param_gather",
        "distributed optimizer",
        "false",
    ),
    (
        ["scale=64gpu", "model.optim.overlap_grad_reduce=false"],
        "model.optim.overlap_param_gather",
        "overlap_grad_reduce=true",
        "false",
    ),
    (
        ["scale=64gpu", "precision=fp8", "precision.fp8_recipe=mxfp8"],
        "precision.fp8_recipe",
        "no fp8 recipe",
        "blockwise",
    ),
    (
        ["scale=64gpu", "precision=fp8", "precision.first_last_layers_bf16=true"],
        "precision.first_last_layers_bf16",
        "delayed scaling",
        "tensorwise",
    ),
    (
        ["scale=64gpu", "precision=fp8", "model.optim.use_precision_aware_optimizer=true"],
        "model.optim.use_precision_aware_optimizer",
        "does not train fp8 parameters rightly",
        "precision.fp8_param_gather=false",
    ),
    (
        [
            "scale=64gpu",
            "model.optim.use_precision_aware_optimizer=true",
            "model.optim.use_distributed_optimizer=false",
        ],
        "model.optim.use_precision_aware_optimizer",
        "use_distributed_optimizer=false",
        "false",
    ),
    (
        ["scale=64gpu", "precision=fp8", "model.use_transformer_engine_op_fuser=true"],
        "model.use_transformer_engine_op_fuser",
        "NaN",
        "precision=bf16",
    ),
    (["scale=64gpu", "model.optim.exp_avg_dtype=fp8"], "model.optim.exp_avg_dtype", "no number format", "fp32, bf16"),
    (
        ["scale=64gpu", "precision=fp8", "model.optim.exp_avg_sq_dtype=bf16"],
        "model.optim.exp_avg_sq_dtype",
        "use_precision_aware_optimizer=true",
        "fp32",
    ),
    (
        ["scale=64gpu", "precision=fp8", "precision.fp8_recipe=blockwise"],
        "precision.fp8_recipe",
        "user buffers",
        "model.tp_comm_overlap=false",
    ),
    (
        [
            "scale=64gpu",
            "precision=fp8",
            "precision.fp8_recipe=tensorwise",
            "precision.first_last_layers_bf16=true",
        ],
        "precision.first_last_layers_bf16",
        "user buffers",
        "model.tp_comm_overlap=false",
    ),
    (["precision.trainer_precision=bf16"], "precision.trainer_precision", "no number format", "32, bf16-mixed"),
    (["precision.fp8_amax_history_len=0"], "precision.fp8_amax_history_len", "1 or more", "1"),
    (
        ["scale=64gpu", "precision=fp8", "precision.fp8_amax_compute_algo=min"],
        "precision.fp8_amax_compute_algo",
        "no choice",
        "max, most_recent",
    ),
    (["scale=64gpu", "model.optim.bucket_size=0"], "model.optim.bucket_size", "at least 1", "null"),
    (["scale=64gpu", "model.wgrad_deferral_limit=-1"], "model.wgrad_deferral_limit", "0 or more", "0"),
    (["scale=64gpu", "model.recompute_granularity=all"], "model.recompute_granularity", "no kind", "selective, full"),
    (["scale=64gpu", "model.recompute_granularity=full"], "model.recompute_method", "no way", "uniform, block"),
    (["scale=64gpu", "model.recompute_granularity=full"], "model.recompute_num_layers", "at least 1", "1"),
    (["scale=64gpu", "model.recompute_method=block"], "model.recompute_method", "recompute_granularity=full", "null"),
    (
        ["scale=64gpu", "model.recompute_granularity=selective", "model.recompute_modules=[moe]"],
        "model.recompute_modules",
        "no part",
        "core_attn, mlp, layernorm",
    ),
    (
        ["scale=64gpu", "model.cross_entropy_fusion_impl=apex"],
        "model.cross_entropy_fusion_impl",
        "no impl",
        "te, native",
    ),
    (["model.cuda_graph_impl=local"], "model.cuda_graph_impl", "gpu=cpu", "none"),
    (["scale=64gpu", "model.cuda_graph_impl=all"], "model.cuda_graph_impl", "no way", "none, local"),
    (["scale=64gpu", "model.sequence_parallel=false"], "model.tp_comm_overlap", "sequence_parallel=false", "false"),
    (
        ["scale=64gpu", "model.apply_rope_fusion=false", "model.fused_single_qkv_rope=true"],
        "model.fused_single_qkv_rope",
        "apply_rope_fusion=false",
        "false",
    ),
    (["data.kind=parquet"], "data.kind", "no kind of data", "mock, local, megatron"),
    (["scale=64gpu", "data.paths=[]", "data.weights=[]"], "data.paths", "no dataset", ".bin/.idx"),
    (["scale=64gpu", "data.weights=[1.0]"], "data.weights", "one weight a path", "[]"),
    (["scale=64gpu", "data.tokenizer=null"], "data.tokenizer", "tokenizer", "folder"),
    (["model.vocab_size=299"], "model.vocab_size", "too small", "300"),
    (["data.split='99,1'"], "data.split", "three numbers", "99,1,0"),
    (["data.split='100,0,0'"], "data.split", "nothing to validate", "limit_val_batches=0"),
    (["scale=64gpu", "cluster.gpus_per_node=4"], "trainer.devices", "cluster.gpus_per_node=4", "num_nodes=16"),
    (["scale=64gpu", "cluster.gpus_per_node='h100:4'"], "trainer.devices", "gpus_per_node=h100:4", "num_nodes=16"),
    (["scale=64gpu", "cluster.gpus_per_node=all"], "cluster.gpus_per_node", "a number of GPUs", "h100:8 or null"),
    (["scale=64gpu", "gpu.peak_tflops.bf16=null"], "gpu.peak_tflops.bf16", "measured on CPUs only", "dense TFLOP/s"),
    (["cluster.signal_s=0"], "cluster.signal_s", "at least 1", "1"),
    (["data.folder=null"], "data.folder", "needed", "folder"),
    (["checkpoint.every_n_steps=51"], "checkpoint.every_n_steps", "between 1 and trainer.max_steps=50", "50"),
    (
        ["checkpoint.every_n_steps=10", "model.optim.use_distributed_optimizer=true"],
        "model.optim.use_distributed_optimizer",
        "cannot save checkpoints on CPU",
        "false",
    ),
    (
        ["checkpoint.resume_from=a", "checkpoint.weights_from=b"],
        "checkpoint.weights_from",
        "one of the two",
        "null",
    ),
]


@pytest.mark.parametrize(("overrides", "key", "rule", "fix"), BAD, ids=lambda value: None)
def test_a_broken_rule_names_key_value_rule_and_fix(overrides: list[str], key: str, rule: str, fix: str) -> None:
    found = [problem for problem in problems(*overrides) if problem.key == key]
    assert found, f"no problem about {key} in {problems(*overrides)}"
    assert any(rule in problem.rule and fix in problem.fix for problem in found), found


def test_all_problems_are_named_at_once() -> None:
    keys = {p.key for p in problems("scale=64gpu", "gpu=a100", "precision=fp8", "model.num_layers=81", "data.split=x")}
    assert keys == {"precision", "model.num_layers", "data.split"}


def test_the_message_counts_and_shows_each_problem() -> None:
    message = str(ConfigurationRefused([Problem("a", 1, "rule", "fix"), Problem("b", 2, "rule", "fix")]))
    assert message.startswith("2 problems in this configuration:")
    assert "a=1\n    rule\n    fix" in message


def test_nearest_values_really_work() -> None:
    """What a message proposes passes the very rule that refused."""
    (problem,) = problems("scale=64gpu", "model.num_layers=81")
    for layers in problem.fix.removeprefix("nearest that work: ").split(", "):
        assert problems("scale=64gpu", f"model.num_layers={layers}") == []


def test_missing_gpus_files_and_checkpoints_are_seen_on_this_machine(tmp_path: Path) -> None:
    cfg = typed(
        compose(
            "train",
            [
                "model=8b",
                "scale=8gpu",
                "trainer.devices=4096",
                f"stage_path={tmp_path}",
                f"checkpoint.resume_from={tmp_path}",
            ],
        )
    )
    found = {problem.key: problem for problem in machine_problems(cfg)}
    assert set(found) == {"trainer.devices", "data.paths", "data.tokenizer", "checkpoint.resume_from"}
    assert "my-llama_01_text_document" in found["data.paths"].rule
    assert "no finished checkpoint" in found["checkpoint.resume_from"].rule
