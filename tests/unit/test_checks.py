"""Every rule about a configuration: what breaks it, what the message names, and what next to it stays allowed."""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nemo_bench.checks.configuration import configuration_problems
from nemo_bench.checks.machine import machine_problems, stage_problems
from nemo_bench.checks.problems import problems
from nemo_bench.config import TrainConfig
from nemo_bench.errors import ConfigurationRefused, Need, Problem
from nemo_bench.fields import field_problems, settings
from tests import composing

# Overrides | the key that is named | a part of the rule | a part of the fix; "ok:" lines are allowed as they are.
RULES = """
model.optim.lr=nan | model.optim.lr | at least 0 | the default: 0.0003
model.optim.min_lr=inf | model.optim.min_lr | at least 0 | the default: 3e-05
model.optim.adam_beta2=1 | model.optim.adam_beta2 | at least 0 and less than 1 | 0.95
model.layernorm_epsilon=-1 | model.layernorm_epsilon | more than 0 | the default: 1e-05
model.num_layers=0 | model.num_layers | at least 1 | nearest that works: 1
model.num_layers=99999999999999999999 | model.num_layers | at most 10000 | 10000
trainer.num_nodes=99999999999999999999 | trainer.num_nodes | at most 100000 | 100000
trainer.seed=-1 | trainer.seed | at least 0 | 0
gpu.peak_tflops.fp32=nan | gpu.peak_tflops.fp32 | more than 0 | the default
total_tokens=inf | total_tokens | more than 0 | the default
model.layernorm_epsilon=1e30 | model.layernorm_epsilon | more than 0 and at most 1 | nearest that works: 1
data.weights=[1,nan] data.paths=[a,b] | data.weights | at least 0 | the default
model.optim.lr=1e-5 | model.optim.min_lr | above model.optim.lr (1e-05) | 1e-05
ok: model.optim.lr=1e-5 model.optim.min_lr=1e-5
ok: trainer.limit_val_batches=0 data.num_workers=0 model.optim.clip_grad=0 model.optim.bucket_size=null

model.attention_backend=fast | model.attention_backend | unknown attention backend | fused, flash, unfused
gpu.device=tpu | gpu.device | unknown gpu device | cuda, cpu
cluster.scheduler=pbs | cluster.scheduler | unknown cluster scheduler | none, slurm
data.kind=parquet | data.kind | unknown data kind | mock, local, megatron
profile=torch profile.kind=perf | profile.kind | unknown profile kind | none, torch, nsys
precision.trainer_precision=bf16 | precision.trainer_precision | unknown trainer precision | 32, bf16-mixed
scale=64gpu precision=fp8 precision.fp8_recipe=mxfp8 | precision.fp8_recipe | unknown fp8 recipe | blockwise
scale=64gpu model.recompute_granularity=all | model.recompute_granularity | unknown | null, selective, full
model.recompute_modules=[moe] | model.recompute_modules | unknown recompute modules | core_attn, mlp, layernorm
ok: scale=64gpu model.recompute_granularity=selective model.recompute_modules=[mlp,layernorm]

results_version= | results_version | folder under results | without slashes
model.name=../x | model.name | folder under results | without slashes
"model.name='a b'" | model.name | folder under results | blanks

scale=8gpu | LAYOUT | must divide the number of GPUs | a scale with a multiple of 32
trainer.devices=3 model.tensor_model_parallel_size=2 | LAYOUT | = 3 | nearest that work: 1, 3; or
scale=64gpu model.num_layers=81 | model.num_layers | multiple of 20: the pipeline's chunks | 80, 100
ok: scale=64gpu model.num_layers=100
model.num_attention_heads=7 model.num_query_groups=7 | model.num_attention_heads | divide model.hidden | 4, 8
model.num_query_groups=3 | model.num_query_groups | must divide model.num_attention_heads=8 | 2, 4
trainer.devices=8 model.tensor_model_parallel_size=8 | TP | must divide model.num_query_groups=4 | 4
ok: trainer.devices=4 model.tensor_model_parallel_size=4
scale=64gpu model.seq_length=8190 | model.seq_length | multiple of 4: each | 8188, 8192
trainer.devices=4 model.tensor_model_parallel_size=4 model.sequence_parallel=true model.seq_length=254 \
 | model.seq_length | model.sequence_parallel=true | 248, 256
ok: trainer.devices=4 model.tensor_model_parallel_size=4 model.seq_length=254
model.virtual_pipeline_model_parallel_size=2 | VP | interleaves pipeline stages | null
ok: model.virtual_pipeline_model_parallel_size=1
scale=64gpu model.global_batch_size=129 | model.global_batch_size | multiple of 2 | 128, 130
scale=64gpu model.global_batch_size=130 | model.global_batch_size \
 | model.pipeline_model_parallel_size=4 micro-batches, and it gives 65 | 128, 136
ok: scale=64gpu model.global_batch_size=136

precision=fp8 | precision | gpu=cpu does not compute in fp8 | fp32, bf16
scale=64gpu gpu=a100 precision=fp8 | precision | gpu=a100 does not compute in fp8 | bf16
model.context_parallel_size=2 trainer.devices=2 | model.context_parallel_size | Transformer Engine | 1
model.apply_rope_fusion=true | model.apply_rope_fusion | needs a GPU | use false
model.optim.use_precision_aware_optimizer=true | model.optim.use_precision_aware_optimizer | needs a GPU | false
model.attention_backend=fused | model.attention_backend | CUDA kernel | local
ok: model.attention_backend=unfused
trainer.num_nodes=2 | trainer.num_nodes | this machine only | 1
scale=64gpu cluster.gpus_per_node=4 | trainer.devices | cluster.gpus_per_node=4 | num_nodes=16
scale=64gpu cluster.gpus_per_node=h100:4 | trainer.devices | gpus_per_node=h100:4 | num_nodes=16
scale=64gpu cluster.gpus_per_node=all | cluster.gpus_per_node | a number of GPUs | h100:8 or null
scale=64gpu cluster.gres=gpu:4 | cluster.gres | 4 GPUs, and it has trainer.devices=8 ranks | gpu:8
scale=64gpu cluster.gres=gpu:h100:4 | cluster.gres | 4 GPUs | gpu:8
ok: scale=64gpu cluster.gres=license:2 cluster.time='"1:00"' +cluster.env.SLURM_CPU_BIND=none
ok: scale=64gpu cluster.gpus_per_node=h100:8 cluster.time=0 cluster.mem=512GB +cluster.env.NCCL_DEBUG=INFO
ok: scale=64gpu cluster.gres=gpu:8 cluster.time=2-12 +cluster.additional_parameters.segment=8
ok: scale=64gpu cluster.gres='gpu:h100:8,nic:4' cluster.time=90 cluster.gpus_per_node=null cluster.mem=null \
 +cluster.additional_parameters.mem_per_cpu=1G
scale=64gpu +cluster.additional_parameters.ntasks=3 | cluster.additional_parameters.ntasks | follows from | leave it out
scale=64gpu +cluster.additional_parameters.mem_per_cpu=1G | cluster.additional_parameters.mem_per_cpu | follows | leave
scale=64gpu +cluster.env.RANK=5 | cluster.env.RANK | set for each rank | leave
scale=64gpu ++cluster.env={a-b:1} | cluster.env.a-b | not a variable's name | leave
scale=64gpu cluster.time=abc | cluster.time | a time limit | 01:30:00
ok: scale=64gpu cluster.time=UNLIMITED checkpoint.every_n_steps=10
scale=64gpu cluster.time='"1:00"' checkpoint.every_n_steps=10 | cluster.signal_s | less than the time limit | longer
scale=64gpu cluster.mem=abc | cluster.mem | a size | 512G
scale=64gpu cluster.cpus_per_task=0 | cluster.cpus_per_task | at least 1 | 1
scale=64gpu cluster.account= | cluster.account | not empty | null
scale=64gpu "stage_path='/a,b'" | stage_path | comma | cluster.container=null
scale=64gpu "stage_path='/a b'" | stage_path | blank | cluster.container=null
ok: scale=64gpu "stage_path='/a b'" cluster.container=null
scale=64gpu "stage_path='/a\\\\b'" cluster.container=null | stage_path | backslash | another path
scale=64gpu gpu.peak_tflops.bf16=null | gpu.peak_tflops.bf16 | measured on CPUs only | dense TFLOP/s

model.optim.overlap_param_gather=true | model.optim.overlap_param_gather | distributed optimizer | false
scale=64gpu model.optim.overlap_grad_reduce=false | model.optim.overlap_param_gather | overlap_grad_reduce=false | false
scale=64gpu precision=fp8 model.optim.use_precision_aware_optimizer=true | model.optim.use_precision_aware_optimizer \
 | does not train fp8 parameters correctly | precision.fp8_param_gather=false
ok: scale=64gpu precision=fp8 model.optim.use_precision_aware_optimizer=true precision.fp8_param_gather=false
scale=64gpu model.optim.use_precision_aware_optimizer=true model.optim.use_distributed_optimizer=false \
 | model.optim.use_precision_aware_optimizer | use_distributed_optimizer=false | false
scale=64gpu model.optim.exp_avg_dtype=fp8 | model.optim.exp_avg_dtype | unknown exp avg dtype | fp32, bf16
scale=64gpu precision=fp8 model.optim.exp_avg_sq_dtype=bf16 | model.optim.exp_avg_sq_dtype \
 | use_precision_aware_optimizer=true | fp32
ok: scale=64gpu model.optim.exp_avg_sq_dtype=bf16

scale=64gpu precision=fp8 model.hidden_size=8224 | model.hidden_size | in fp8 | 8192, 8256
ok: scale=64gpu precision=fp8 model.hidden_size=8256 model.num_attention_heads=172 model.num_query_groups=4
scale=64gpu precision=fp8 precision.first_last_layers_bf16=true | precision.first_last_layers_bf16 \
 | delayed scaling | tensorwise
ok: scale=64gpu precision=fp8 precision.first_last_layers_bf16=true precision.fp8_recipe=tensorwise \
 model.tp_comm_overlap=false
scale=64gpu precision=fp8 precision.fp8_recipe=blockwise | precision.fp8_recipe \
 | user buffers | model.tp_comm_overlap=false
ok: scale=64gpu precision=fp8 precision.fp8_recipe=blockwise model.tp_comm_overlap=false
scale=64gpu precision=fp8 precision.fp8_recipe=tensorwise precision.first_last_layers_bf16=true \
 | precision.first_last_layers_bf16 | user buffers | model.tp_comm_overlap=false
scale=64gpu precision=fp8 model.use_transformer_engine_op_fuser=true | model.use_transformer_engine_op_fuser \
 | NaN | precision=bf16
ok: scale=64gpu model.use_transformer_engine_op_fuser=true
scale=64gpu model.sequence_parallel=false | model.tp_comm_overlap | sequence_parallel=false | false
scale=64gpu model.apply_rope_fusion=false model.fused_single_qkv_rope=true | model.fused_single_qkv_rope \
 | apply_rope_fusion=false | false
scale=64gpu model.recompute_granularity=full | model.recompute_method | needed | uniform, block
scale=64gpu model.recompute_granularity=full | model.recompute_num_layers | needed | 1
ok: scale=64gpu model.recompute_granularity=full model.recompute_method=block model.recompute_num_layers=1
scale=64gpu model.recompute_method=block | model.recompute_method | recompute_granularity=full | null
model.cuda_graph_impl=local | model.cuda_graph_impl | needs a GPU | none
scale=64gpu model.cuda_graph_impl=local model.recompute_granularity=selective | model.cuda_graph_impl | selective | none
scale=64gpu model.cuda_graph_impl=local +cluster.env.PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True \
 | model.cuda_graph_impl | expandable_segments | none
ok: scale=64gpu model.cuda_graph_impl=local

scale=64gpu model.attention_backend=unfused | model.attention_backend | no context parallelism | fused, flash
scale=64gpu model.attention_backend=local | model.attention_backend | no context parallelism | fused, flash
ok: scale=64gpu model.attention_backend=unfused model.context_parallel_size=1
ok: scale=64gpu model.attention_backend=flash
scale=64gpu model.num_attention_heads=16 | model.attention_backend | heads of 512 | unfused
scale=64gpu model.hidden_size=8256 | model.attention_backend | heads of 129 | unfused
ok: scale=64gpu model.num_attention_heads=32
ok: scale=64gpu model.num_attention_heads=16 model.attention_backend=auto
scale=32gpu model=70b trainer.num_nodes=16 trainer.devices=4 model.tensor_model_parallel_size=8 \
 | model.tp_comm_overlap | joins 4 GPUs | cluster.nvlink_gpus=72
ok: scale=32gpu model=70b trainer.num_nodes=16 trainer.devices=4 model.tensor_model_parallel_size=8 \
 cluster.nvlink_gpus=72
ok: scale=32gpu model=70b trainer.num_nodes=16 trainer.devices=4 model.tensor_model_parallel_size=8 \
 model.tp_comm_overlap=false

scale=8gpu model=8b precision=fp8 model.seq_length=8200 data=mock | model.seq_length | in fp8 | 8192, 8224
scale=8gpu model=8b precision=fp8 model.seq_length=1032 data=mock | model.seq_length | in fp8 | 1024, 1056
ok: scale=8gpu model=8b precision=fp8 model.seq_length=8192 data=mock
ok: scale=8gpu model=8b precision=fp8 model.seq_length=8208 data=mock model.context_parallel_size=1
ok: scale=8gpu model=8b precision=fp8 model.seq_length=4112 data=mock model.context_parallel_size=1
ok: scale=8gpu model=8b precision=fp8 model.seq_length=4100 model.micro_batch_size=4 data=mock \
 model.context_parallel_size=1
ok: scale=8gpu model=8b precision=bf16 model.seq_length=8200 data=mock
scale=8gpu model=8b precision=fp8 precision.fp8_recipe=tensorwise precision.first_last_layers_bf16=true \
 precision.num_layers_at_start_in_bf16=33 | precision.num_layers_at_start_in_bf16 | 32 layers | 32
scale=64gpu precision.num_layers_at_start_in_bf16=81 | precision.num_layers_at_start_in_bf16 | 80 layers | 80
precision=bf16 precision.name=fp8 | precision.name | number formats | precision=bf16
scale=8gpu model=8b precision=fp8 precision.fp8=null | precision.name | number formats | precision=bf16

scale=64gpu data.paths=['',''] | data.paths | is empty | a file or a folder
stage_path= | stage_path | is empty | STAGE_PATH
checkpoint.resume_from= | checkpoint.resume_from | is empty | a folder
scale=64gpu data.weights=[0,0] | data.weights | above 0 | []
scale=64gpu data.weights=[-1,2] | data.weights | at least 0 | works: 0
scale=64gpu data.paths=[] data.weights=[] | data.paths | no dataset | .bin/.idx
scale=64gpu data.weights=[1.0] | data.weights | one weight per path | []
ok: scale=64gpu data.weights=[1.0,2]
scale=64gpu data.tokenizer=null | data.tokenizer | tokenizer | folder
data.folder=null | data.folder | needed | folder
model.vocab_size=299 | model.vocab_size | too small | 300
ok: model.vocab_size=300
data.split='99,1' | data.split | three numbers | 99,1,0
data.split='nan,1,0' | data.split | three numbers | 99,1,0
data.split='100,0,0' | data.split | nothing to validate | limit_val_batches=0
ok: data.split='100,0,0' trainer.limit_val_batches=0

checkpoint.every_n_steps=0 | checkpoint.every_n_steps | at least 1 | 1
checkpoint.every_n_steps=51 | checkpoint.every_n_steps | at most trainer.max_steps=50 | 50
ok: checkpoint.every_n_steps=50
checkpoint.every_n_steps=10 model.optim.use_distributed_optimizer=true | model.optim.use_distributed_optimizer \
 | cannot be saved on a CPU | false
checkpoint.resume_from=a checkpoint.weights_from=b | checkpoint.weights_from | continues a run | null

profile=torch profile.start_step=0 | profile.start_step | between 1 (step 0 warms | works: 1;
ok: profile.start_step=0
profile=torch profile.start_step=60 | profile.start_step | 49, the last step | works: 49;
profile=torch profile.end_step=50 | profile.end_step | start_step=10 and 49 | works: 49;
profile=torch profile.end_step=9 | profile.end_step | start_step=10 and 49 | works: 10;
ok: profile=torch profile.start_step=1 profile.end_step=49
profile=torch trainer.max_steps=1 | profile.start_step | warms the profiler up | more trainer.max_steps
profile=torch profile.ranks=[1] | profile.ranks | of 0 to 0 | [0]
scale=64gpu profile=torch profile.ranks=[] | profile.ranks | at least one | [0]
scale=64gpu profile=nsys profile.ranks=[0,64] | profile.ranks | of 0 to 63 | [0]
scale=64gpu profile=nsys profile.ranks=[3,3] | profile.ranks | each once | [0]
ok: scale=64gpu profile=torch profile.ranks=[0,8,63]
ok: scale=64gpu profile=nsys
profile=nsys | profile.kind | profiles GPUs (gpu.device=cpu | profile=torch
"""
PROJECT = Path(__file__).resolve().parents[2]
SHORT = {
    "LAYOUT": "model.tensor_model_parallel_size * model.pipeline_model_parallel_size * model.context_parallel_size",
    "TP": "model.tensor_model_parallel_size",
    "VP": "model.virtual_pipeline_model_parallel_size",
}
LINES = [line for line in RULES.replace("\\\n", "").splitlines() if line]
BROKEN = [[column.strip() for column in line.split(" | ")] for line in LINES if not line.startswith("ok: ")]
ALLOWED = [line.removeprefix("ok: ") for line in LINES if line.startswith("ok: ")]


def composed(overrides: str) -> TrainConfig:
    return composing.composed(*shlex.split(overrides.replace("'", '"\'"')))


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


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        (
            "scale=64gpu gpu=a100 precision=fp8 model.num_layers=81 data.split=x",
            "precision model.num_layers data.split",
        ),
        ("trainer.max_steps=0 data.kind=x model.optim.lr=-1", "trainer.max_steps data.kind model.optim.lr"),
    ],
)
def test_all_problems_are_named_at_once(overrides: str, keys: str) -> None:
    assert {problem.key for problem in broken(overrides)} >= set(keys.split())


def test_the_message_counts_and_shows_each_problem_as_it_is_typed() -> None:
    need = Need(composed(""))
    need(True, "model.name", "holds", "nothing")
    need(False, "gpu.memory_gib", "rule", "fix")
    need(False, "model.apply_rope_fusion", "rule", "fix")
    message = str(ConfigurationRefused(need.problems))
    assert message.startswith("2 problems in this configuration:")
    assert "gpu.memory_gib=null\n    rule\n    fix" in message and "model.apply_rope_fusion=false\n" in message


def test_nearest_values_really_work() -> None:
    (problem,) = broken("scale=64gpu model.num_layers=81")
    for layers in problem.fix.removeprefix("nearest that work: ").split(", "):
        assert broken(f"scale=64gpu model.num_layers={layers}") == []


# --- what a machine lacks ---


def test_missing_gpus_files_and_checkpoints_are_seen_on_this_machine(tmp_path: Path) -> None:
    cfg = composed(f"model=8b scale=8gpu trainer.devices=4096 stage_path={tmp_path} checkpoint.resume_from={tmp_path}")
    missing = {problem.key: problem.rule for problem in machine_problems(cfg) if problem.missing}
    assert set(missing) == {"trainer.devices", "data.paths", "data.tokenizer", "checkpoint.resume_from"}
    assert "my-llama_01_text_document" in missing["data.paths"]
    assert "no finished checkpoint" in missing["checkpoint.resume_from"]


def test_a_job_needs_its_image_and_a_stage_folder_that_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    keys = {problem.key for problem in stage_problems(composed(f"scale=64gpu data=mock stage_path={tmp_path}/file"))}
    assert keys == {"cluster.container.image", "stage_path"}
    assert stage_problems(composed(f"scale=64gpu data=mock cluster.container=null stage_path={tmp_path}")) == []


def test_a_points_problems_are_those_of_the_place_where_it_runs(tmp_path: Path) -> None:
    on_slurm = problems(composed(f"scale=64gpu data=mock stage_path={tmp_path} model.num_layers=81"))
    assert [problem.key for problem in on_slurm] == ["model.num_layers", "cluster.container.image"]
    here = problems(composed(f"scale=8gpu model=8b trainer.devices=4096 cluster=local data=mock stage_path={tmp_path}"))
    assert ("trainer.devices", True) in [(problem.key, problem.missing) for problem in here]
    assert problems(composed("")) == []
    assert [problem.key for problem in problems(composed("data.split='999,1,0'"))] == ["data.split"]  # data=local


@pytest.mark.parametrize(
    ("overrides", "refused"),
    [
        ("scale=1gpu", True),  # about 156 GiB
        ("scale=1gpu gpu.memory_gib=150", False),  # within the error
        ("scale=1gpu check_memory=false", False),
        ("scale=1gpu gpu.memory_gib=null", False),
        ("scale=2gpu", False),
    ],
)
def test_a_point_must_fit_into_its_gpu(overrides: str, refused: bool, tmp_path: Path) -> None:
    point = f"gpu=h200 model=8b model.context_parallel_size=1 stage_path={tmp_path} {overrides}"
    wrong = [problem for problem in problems(composed(point)) if not problem.missing]
    assert [problem.key for problem in wrong] == ["gpu.memory_gib"] * refused
    if refused:
        assert "needs about 156 GiB" in wrong[0].rule
        assert "trainer.devices=2" in wrong[0].fix and "check_memory=false" in wrong[0].fix


def test_nsys_must_be_where_the_ranks_are_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = composed("scale=8gpu cluster=local profile=nsys data=mock")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no `nsys` on PATH" in {problem.key: problem.rule for problem in machine_problems(cfg)}["profile.kind"]
    (tmp_path / "nsys").touch(mode=0o755)
    assert "profile.kind" not in {problem.key for problem in machine_problems(cfg)}


def test_a_continued_run_must_have_steps_left_and_come_to_the_profile(tmp_path: Path) -> None:
    (tmp_path / "checkpoints/step=19/weights").mkdir(parents=True)
    resumed = f"checkpoint.resume_from={tmp_path} profile=torch"
    (problem,) = machine_problems(composed(f"{resumed} trainer.max_steps=60"))
    assert problem.key == "profile.start_step" and "continues at step 20" in problem.rule and not problem.missing
    assert problem.fix.endswith("21")
    assert machine_problems(composed(f"{resumed} profile.start_step=21 profile.end_step=22")) == []
    (problem,) = machine_problems(composed(f"{resumed} profile.start_step=21 trainer.max_steps=20"))
    assert problem.key == "checkpoint.resume_from" and "of step 20" in problem.rule


@pytest.mark.parametrize("key", ["resume_from", "weights_from"])
def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, key: str) -> None:
    checkpoint = tmp_path / "checkpoints/step=9"
    (checkpoint / "weights").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(composed(""))))
    for folder in (tmp_path, checkpoint):
        assert machine_problems(composed(f"checkpoint.{key}='{folder}'")) == []
        (problem,) = machine_problems(composed(f"checkpoint.{key}='{folder}' model.num_layers=5"))
        assert problem.rule == "was written by a model of other sizes: num_layers=4" and not problem.missing
