"""Rules about a configuration that hold on every machine: each names the key, its value, the rule and what works."""

from __future__ import annotations

import math
import os
import re

from nemo_bench.checks.slurm import slurm_rules
from nemo_bench.config import TrainConfig
from nemo_bench.errors import Need, Problem, text_of, value_of
from nemo_bench.fields import field_problems, settings

# Sizes of Transformer Engine's fp8 matrix products must be multiples of this.
FP8_ALIGNMENT = 16
# Settings that do not work together | why the first of them does not work | what to do.
CONFLICTS = """\
model.optim.overlap_param_gather=true model.optim.use_distributed_optimizer=false \
 | gathers what the distributed optimizer shards | use false, or model.optim.use_distributed_optimizer=true
model.optim.use_precision_aware_optimizer=true model.optim.use_distributed_optimizer=false \
 | is a mode of the distributed optimizer | use false, or model.optim.use_distributed_optimizer=true
model.optim.overlap_param_gather=true model.optim.overlap_grad_reduce=false \
 | works only with overlapped gradients | use false, or model.optim.overlap_grad_reduce=true
model.optim.use_precision_aware_optimizer=true precision.fp8_param_gather=true \
 | does not train fp8 parameters correctly in this megatron-core | use false, or precision.fp8_param_gather=false
model.fused_single_qkv_rope=true model.apply_rope_fusion=false \
 | is a form of the fused RoPE | use false, or model.apply_rope_fusion=true
model.use_transformer_engine_op_fuser=true precision.fp8!=null \
 | gives a loss of NaN in fp8 with this Transformer Engine (2.11) | use false, or precision=bf16
model.tp_comm_overlap=true model.sequence_parallel=false model.tensor_model_parallel_size!=1 \
 | overlaps the communication of sequence parallelism | use false, or model.sequence_parallel=true
precision.fp8_recipe=blockwise precision.fp8!=null model.tp_comm_overlap=true model.tensor_model_parallel_size!=1 \
 | is not possible with user buffers | use delayed, or model.tp_comm_overlap=false
precision.first_last_layers_bf16=true precision.fp8!=null model.tp_comm_overlap=true \
model.tensor_model_parallel_size!=1 | is not possible with user buffers | use false, or model.tp_comm_overlap=false
precision.first_last_layers_bf16=true precision.fp8!=null precision.fp8_recipe=delayed \
 | is not possible with delayed scaling | use false, or precision.fp8_recipe=tensorwise
model.cuda_graph_impl=local gpu.device=cpu | needs a GPU | use none
model.cuda_graph_impl=local model.recompute_granularity!=null | cannot record recomputed layers | use none
model.recompute_method=null model.recompute_granularity=full | is needed | valid: uniform, block
model.recompute_num_layers=null model.recompute_granularity=full \
 | is needed: layers in a unit (uniform), or recomputed on each pipeline stage (block) | 1 or more
model.recompute_method!=null model.recompute_granularity!=full | belongs to model.recompute_granularity=full | use null
model.attention_backend=flash,fused gpu.device=cpu | is a CUDA kernel | use local
model.attention_backend=unfused,local gpu.device=cuda model.context_parallel_size!=1 \
 | has no context parallelism | use fused, flash or auto
model.context_parallel_size!=1 gpu.device=cpu | needs Transformer Engine's attention, and so a GPU | use 1
trainer.num_nodes!=1 cluster.scheduler=none | ranks start on this machine only | use 1, or cluster=slurm
data.tokenizer=null data.kind=megatron | is needed: the tokenizer of the dataset | give its folder
data.folder=null data.kind!=mock | is needed for prepared files | give a folder
model.optim.use_distributed_optimizer=true gpu.device=cpu checkpoint.every_n_steps!=null \
 | cannot be saved on a CPU: Megatron expects the step counter of a fused GPU Adam | use false
checkpoint.weights_from!=null checkpoint.resume_from!=null \
 | takes only initial weights, and the other continues a run | set one of the two to null
"""
_ROWS = [
    (re.findall(r"(\S+?)(!?=)(\S+)", settings), why.strip(), fix.strip())
    for settings, why, fix in (row.split("|") for row in CONFLICTS.splitlines())
]


def configuration_problems(cfg: TrainConfig) -> list[Problem]:
    """Return every rule that the values themselves break, whatever the machine."""
    need = Need(cfg)
    need.problems += field_problems(cfg)
    if not any(isinstance(problem.value, (int, float)) for problem in need.problems):  # these rules calculate
        for rules in (_layout, _batch, _attention, _fp8, _schedule, _profile):
            rules(cfg, need)
    for rules in (_conflicts, _names, _precision, _environment, _data):
        rules(cfg, need)
    if cfg.cluster.scheduler == "slurm":
        slurm_rules(cfg, need)
    return need.problems


def _conflicts(cfg: TrainConfig, need: Need) -> None:
    for conditions, why, fix in _ROWS:
        if all((text_of(value_of(cfg, key)) in values.split(",")) is (sign == "=") for key, sign, values in conditions):
            (named, *_), *others = conditions
            present = ", ".join(f"{key}={text_of(value_of(cfg, key))}" for key, *_ in others)
            need(False, named, f"{why} ({present})", fix)


def _multiples(value: int, of: int) -> str:
    """Return the multiples next to `value`."""
    below = value // of * of
    return f"nearest that work: {f'{below}, ' if below else ''}{below + of}"


def _divisors(value: int, of: int) -> str:
    """Return the divisors of `of` next to `value`, which is not one."""
    divisors = [size for size in range(1, of + 1) if of % size == 0]
    nearest = [size for size in divisors if size < value][-1:] + [size for size in divisors if size > value][:1]
    return f"nearest that work: {', '.join(map(str, nearest))}"


def _names(cfg: TrainConfig, need: Need) -> None:
    for key in ("results_version", "precision.name", "model.name"):
        name = value_of(cfg, key)
        usable = name not in ("", ".", "..") and "/" not in name
        need(usable, key, "names a folder under results/", "use a word without slashes")


def _layout(cfg: TrainConfig, need: Need) -> None:
    m, gpus, per_model = cfg.model, cfg.world_size, cfg.model_parallel_size
    tp, pp, cp = m.tensor_model_parallel_size, m.pipeline_model_parallel_size, m.context_parallel_size
    vp, key = m.virtual_pipeline_model_parallel_size, "model.{}_model_parallel_size".format
    products = sorted({t * p * c for t in (1, 2, 4, 8) for p in (1, 2, 4, 8) for c in (1, 2)})
    need(
        gpus % per_model == 0,
        f"{key('tensor')} * {key('pipeline')} * model.context_parallel_size",
        f"must divide the number of GPUs, trainer.num_nodes * trainer.devices = {gpus}",
        f"products that divide {gpus}: {', '.join(str(product) for product in products if gpus % product == 0)}; "
        f"or a scale with a multiple of {per_model} GPUs",
        value=f"{tp} * {pp} * {cp} = {per_model}",
    )
    if pp == 1 and (vp or 1) > 1:
        rule = f"interleaves pipeline stages, and {key('pipeline')}=1 has none"
        need(False, key("virtual_pipeline"), rule, "use null, or 2 or more pipeline stages")
    else:
        chunks, virtual = pp * (vp or 1), f" * {key('virtual_pipeline')}={vp}" if vp else ""
        rule = f"must divide equally into {chunks} pipeline chunks ({key('pipeline')}={pp}{virtual})"
        need(m.num_layers % chunks == 0, "model.num_layers", rule, _multiples(m.num_layers, chunks))
    for name, total in (("num_attention_heads", "hidden_size"), ("num_query_groups", "num_attention_heads")):
        part, whole = getattr(m, name), getattr(m, total)
        if whole % part:
            need(False, f"model.{name}", f"must divide model.{total}={whole}", _divisors(part, whole))
    shared = ("num_attention_heads", "num_query_groups", "ffn_hidden_size")
    uneven = [f"model.{name}={getattr(m, name)}" for name in shared if getattr(m, name) % tp]
    if uneven:
        rule = f"must divide {' and '.join(uneven)}: each rank holds an equal share"
        need(False, key("tensor"), rule, _divisors(tp, math.gcd(*(getattr(m, name) for name in shared))))
    slices, sequence_shards = 2 * cp, cp * tp
    if cp > 1 and m.seq_length % slices:
        rule = f"must be a multiple of 2 * model.context_parallel_size = {slices}: each rank takes two slices of it"
        need(False, "model.seq_length", rule, _multiples(m.seq_length, slices))
    elif m.sequence_parallel and not uneven:
        rule = f"must be a multiple of {sequence_shards} (model.context_parallel_size * {key('tensor')}) with "
        rule += "model.sequence_parallel=true"
        need(m.seq_length % sequence_shards == 0, "model.seq_length", rule, _multiples(m.seq_length, slices * tp))


def _batch(cfg: TrainConfig, need: Need) -> None:
    m, key = cfg.model, "model.global_batch_size"
    if cfg.world_size % cfg.model_parallel_size:
        return  # reported with the layout; there is no data-parallel size
    dp, pp, batch = cfg.data_parallel_size, m.pipeline_model_parallel_size, m.global_batch_size
    unit = m.micro_batch_size * dp
    if batch % unit:
        rule = f"must be a multiple of {unit} (model.micro_batch_size={m.micro_batch_size} * data-parallel size {dp})"
        need(False, key, rule, _multiples(batch, unit))
    elif (m.virtual_pipeline_model_parallel_size or 1) > 1:
        rule = f"gives {cfg.num_micro_batches} micro-batches, which must be a multiple of "
        rule += f"model.pipeline_model_parallel_size={pp} when stages are interleaved"
        need(cfg.num_micro_batches % pp == 0, key, rule, _multiples(batch, unit * pp))


def _attention(cfg: TrainConfig, need: Need) -> None:
    head = cfg.model.hidden_size / cfg.model.num_attention_heads
    if cfg.gpu.device == "cuda" and cfg.model.attention_backend in ("fused", "flash"):
        # Tried with cuDNN 9.19 on an H200, forward and backward: 64, 128, 160, 192, 256; not 320, 512.
        rule = f"has no kernel for heads of {head:g} (hidden size / attention heads), only for multiples of 8 up to 256"
        need(head % 8 == 0 and head <= 256, "model.attention_backend", rule, "use unfused, which is slower")


def _fp8(cfg: TrainConfig, need: Need) -> None:
    """Check that the sides of every fp8 matrix product are multiples of 16 on each rank, and the layers in bf16."""
    m, p, tp = cfg.model, cfg.precision, cfg.model.tensor_model_parallel_size
    stage_only = p.first_last_layers_bf16
    layers = m.num_layers // m.pipeline_model_parallel_size if stage_only else m.num_layers
    for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        rule = f"is more than the {layers} layers of {'a pipeline stage' if stage_only else 'the model'}"
        need(getattr(p, name) <= layers, f"precision.{name}", rule, f"nearest that works: {layers}")
    if p.fp8 is None:
        return
    multiple = FP8_ALIGNMENT * tp
    aligned = f"multiple of {multiple} in fp8: sides of a matrix are multiples of {FP8_ALIGNMENT} on each of {tp} ranks"
    for name in ("hidden_size", "ffn_hidden_size"):
        size = getattr(m, name)
        need(size % multiple == 0, f"model.{name}", f"must be a {aligned}", _multiples(size, multiple))
    rows = m.hidden_size + 2 * m.num_query_groups * m.hidden_size // m.num_attention_heads
    rule = f"gives {rows} rows of query, key and value weights, not a {aligned}"
    need(rows % multiple == 0, "model.num_query_groups", rule, "use another number, or precision=bf16")
    ranks = m.context_parallel_size * (tp if m.sequence_parallel else 1)
    unit = FP8_ALIGNMENT * ranks // math.gcd(FP8_ALIGNMENT * ranks, m.micro_batch_size)
    rule = f"must be a multiple of {unit} in fp8: a rank has model.micro_batch_size={m.micro_batch_size} * "
    rule += f"model.seq_length / {ranks} rows, which must be a multiple of {FP8_ALIGNMENT}"
    need(m.seq_length % unit == 0, "model.seq_length", rule, _multiples(m.seq_length, unit))


def _precision(cfg: TrainConfig, need: Need) -> None:
    gpu, p, o = cfg.gpu, cfg.precision, cfg.model.optim
    formats = "fp8" if p.fp8 else {"bf16-mixed": "bf16", "32": "fp32"}.get(p.trainer_precision, p.name)
    rule = f"must name the number formats, which are those of {formats} (precision.fp8, precision.trainer_precision)"
    need(p.name == formats, "precision.name", rule, f"use precision={formats}")
    rule, fix = f"gpu={gpu.name} does not compute in {p.name}", f"this device has: {', '.join(gpu.peak_tflops)}"
    need(p.name in gpu.peak_tflops, "precision", rule, fix, value=p.name)
    for name in ("exp_avg_dtype", "exp_avg_sq_dtype"):
        usable = cfg.precision_aware_optimizer or getattr(o, name) != "bf16"
        need(usable, f"model.optim.{name}", "needs model.optim.use_precision_aware_optimizer=true", "use fp32")
    if gpu.device == "cuda":
        known = gpu.peak_tflops.get(p.name, 0) is not None
        fix = "give the dense TFLOP/s of one GPU"
        need(known, f"gpu.peak_tflops.{p.name}", "is measured on CPUs only", fix)
    else:
        for key in (key for key, _, setting in settings(cfg) if setting.metadata.get("gpu_only")):
            need(not value_of(cfg, key), key, f"needs a GPU (gpu={gpu.name} is chosen)", "use false")


def _environment(cfg: TrainConfig, need: Need) -> None:
    m, joined = cfg.model, cfg.cluster.nvlink_gpus or cfg.trainer.devices
    rule = f"needs tensor-parallel ranks that NVLink joins, and it joins {joined} GPUs (cluster.nvlink_gpus)"
    fix = "use false, or cluster.nvlink_gpus=72 on GB200 NVL72"
    need(not m.tp_comm_overlap or m.tensor_model_parallel_size <= joined, "model.tp_comm_overlap", rule, fix)
    environment = cfg.entrypoint.env | dict(os.environ) | cfg.cluster.env
    expandable = "expandable_segments:True" in environment.get("PYTORCH_CUDA_ALLOC_CONF", "")
    rule = "is not possible with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
    need(m.cuda_graph_impl == "none" or not expandable, "model.cuda_graph_impl", rule, "change that, or use none")


def _data(cfg: TrainConfig, need: Need) -> None:
    data, even = cfg.data, "[] weighs all paths equally"
    if data.kind == "megatron":
        fix = "give prefixes of .bin/.idx pairs, without suffix"
        need(data.paths, "data.paths", "names no dataset", fix)
        rule = f"must hold one weight per path, and data.paths holds {len(data.paths)}"
        need(len(data.weights) in (0, len(data.paths)), "data.weights", rule, even)
        need(not data.weights or any(data.weights), "data.weights", "must hold one weight above 0", even)
    rule = "is too small for a byte-level tokenizer (256 bytes, special tokens, and merges)"
    need(data.kind != "local" or cfg.model.vocab_size >= 300, "model.vocab_size", rule, "nearest that works: 300")
    shares, batches = split_shares(data.split), cfg.trainer.limit_val_batches
    if shares is None:
        rule = "must be three numbers, the shares of train, validation and test, the first above 0"
        need(False, "data.split", rule, "for example: 99,1,0")
    elif data.kind != "mock":
        rule = f"leaves nothing to validate on, and trainer.limit_val_batches={batches}"
        need(batches <= 0 or shares[1] > 0, "data.split", rule, "for example: 99,1,0; or trainer.limit_val_batches=0")


def split_shares(split: str) -> list[float] | None:
    """Return the shares of train, validation and test; None if they are not three numbers, the first above 0."""
    try:
        shares = [float(part) for part in split.split(",")]
    except ValueError:
        return None
    usable = len(shares) == 3 and all(map(math.isfinite, shares)) and min(shares) >= 0 and shares[0] > 0
    return shares if usable else None


def _schedule(cfg: TrainConfig, need: Need) -> None:
    o, interval, steps = cfg.model.optim, cfg.checkpoint.every_n_steps, cfg.trainer.max_steps
    rule = f"must not be above model.optim.lr ({o.lr:g}), from which the schedule comes down to it"
    need(o.min_lr <= o.lr, "model.optim.min_lr", rule, f"nearest that works: {o.lr:g}")
    rule = f"must be at most trainer.max_steps={steps}, or no checkpoint is ever written"
    fix = f"nearest that works: {steps}; null writes none"
    need(interval is None or interval <= steps, "checkpoint.every_n_steps", rule, fix)


def _profile(cfg: TrainConfig, need: Need) -> None:
    p, last, ranks = cfg.profile, cfg.trainer.max_steps - 1, cfg.world_size
    if p.kind == "none":
        return
    rule = f"profiles GPUs (gpu={cfg.gpu.name} is chosen)"
    need(p.kind != "nsys" or cfg.gpu.device == "cuda", "profile", rule, "use profile=torch", value=p.kind)
    if last < 1:
        rule = "needs a step before it to warm the profiler up, and trainer.max_steps=1"
        need(False, "profile", rule, "trainer.max_steps=2 or more, or profile=none", value=p.kind)
    elif not 1 <= p.start_step <= last:
        rule = f"must be between 1 (step 0 warms the profiler up) and {last}, the last step"
        fix = f"nearest that works: {min(max(p.start_step, 1), last)}; or more trainer.max_steps"
        need(False, "profile.start_step", rule, fix)
    else:
        rule = f"must be between profile.start_step={p.start_step} and {last}, the last step"
        fix = f"nearest that works: {min(max(p.end_step, p.start_step), last)}; or more trainer.max_steps"
        need(p.start_step <= p.end_step <= last, "profile.end_step", rule, fix)
    rule = f"must name ranks of 0 to {ranks - 1}, at least one, each once"
    distinct = p.ranks and len(set(p.ranks)) == len(p.ranks)
    need(distinct and max(p.ranks) < ranks, "profile.ranks", rule, "such as [0]")
