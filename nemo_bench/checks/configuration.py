"""Rules about a configuration that hold on every machine: each names the key, its value, the rule and what works."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

from nemo_bench.checks.slurm import slurm_rules
from nemo_bench.config import TrainConfig
from nemo_bench.errors import Need, Problem
from nemo_bench.fields import choice_problems, number_problems

# Sizes of Transformer Engine's fp8 matrix products must be multiples of this.
FP8_ALIGNMENT = 16
# Settings of the model that need a kernel, and so a GPU.
GPU_ONLY = (
    "apply_rope_fusion",
    "persist_layer_norm",
    "masked_softmax_fusion",
    "fused_single_qkv_rope",
    "use_transformer_engine_op_fuser",
    "gradient_accumulation_fusion",
    "tp_comm_overlap",
    "optim.use_precision_aware_optimizer",
)


def configuration_problems(cfg: TrainConfig) -> list[Problem]:
    """Return every rule that the values themselves break, whatever the machine."""
    need = Need(cfg)
    need.problems += number_problems(cfg)
    if not need.problems:  # these rules divide by the numbers
        for rules in (_layout, _batch, _attention, _fp8_sizes):
            rules(cfg, need)
    need.problems += choice_problems(cfg)
    for rules in (_names, _device, _optimizer, _fusions, _recomputation, _fp8, _data, _checkpoint, _profile):
        rules(cfg, need)
    if cfg.cluster.scheduler == "slurm":
        slurm_rules(cfg, need)
    return need.problems


def _multiples(value: int, of: int) -> str:
    """Return the multiples next to `value`."""
    below = value // of * of
    return f"nearest that work: {f'{below}, ' if below else ''}{below + of}"


def _nearest(value: int, works: Callable[[int], bool], highest: int) -> str:
    """Return the next smaller and the next larger number for which `works` holds."""
    below = next((v for v in range(min(value - 1, highest), 0, -1) if works(v)), None)
    above = next((v for v in range(value + 1, highest + 1) if works(v)), None)
    numbers = [str(v) for v in (below, above) if v is not None]
    return f"nearest that work: {', '.join(numbers)}" if numbers else "no value of this key alone works"


def _names(cfg: TrainConfig, need: Need) -> None:
    for key, name in {
        "results_version": cfg.results_version,
        "precision.name": cfg.precision.name,
        "model.name": cfg.model.name,
    }.items():
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
            nearest = _nearest(part, lambda size, whole=whole: whole % size == 0, highest=whole)  # type: ignore[misc]
            need(False, f"model.{name}", f"must divide model.{total}={whole}", nearest)
    shared = ("num_attention_heads", "num_query_groups", "ffn_hidden_size")
    uneven = [f"model.{name}={getattr(m, name)}" for name in shared if getattr(m, name) % tp]
    if uneven:
        common = math.gcd(*(getattr(m, name) for name in shared))
        rule = f"must divide {' and '.join(uneven)}: each rank holds an equal share"
        need(False, key("tensor"), rule, _nearest(tp, lambda size: common % size == 0, highest=common))
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
    elif pp > 1 and (m.virtual_pipeline_model_parallel_size or 1) > 1:
        rule = f"gives {cfg.num_micro_batches} micro-batches, which must be a multiple of "
        rule += f"model.pipeline_model_parallel_size={pp} when stages are interleaved"
        need(cfg.num_micro_batches % pp == 0, key, rule, _multiples(batch, unit * pp))


def _attention(cfg: TrainConfig, need: Need) -> None:
    m, head = cfg.model, cfg.model.hidden_size / cfg.model.num_attention_heads
    if cfg.gpu.device != "cuda":
        return
    if m.attention_backend in ("fused", "flash"):
        # Tried with cuDNN 9.19 on an H200, forward and backward: 64, 128, 160, 192, 256; not 320, 512.
        rule = f"has no kernel for heads of {head:g} (hidden size / attention heads), only for multiples of 8 up to 256"
        need(head % 8 == 0 and head <= 256, "model.attention_backend", rule, "use unfused, which is slower")
    rule = "has no context parallelism (model.context_parallel_size > 1)"
    whole = m.attention_backend in ("unfused", "local")
    need(not whole or m.context_parallel_size == 1, "model.attention_backend", rule, "use fused, flash or auto")


def _fp8_sizes(cfg: TrainConfig, need: Need) -> None:
    """Check that the sides of every fp8 matrix product are multiples of 16 on each rank."""
    m, tp = cfg.model, cfg.model.tensor_model_parallel_size
    if cfg.precision.fp8 is None:
        return
    multiple = FP8_ALIGNMENT * tp
    aligned = f"in fp8: sides of a matrix are multiples of {FP8_ALIGNMENT} on each of {tp} tensor-parallel ranks"
    for name in ("hidden_size", "ffn_hidden_size"):
        size = getattr(m, name)
        rule = f"must be a multiple of {multiple} {aligned}"
        need(size % multiple == 0, f"model.{name}", rule, _multiples(size, multiple))
    query_key_value = m.hidden_size + 2 * m.num_query_groups * m.hidden_size // m.num_attention_heads
    rule = f"gives {query_key_value} rows of query, key and value weights, not a multiple of {multiple} {aligned}"
    need(query_key_value % multiple == 0, "model.num_query_groups", rule, "use another number, or precision=bf16")
    ranks = m.context_parallel_size * (tp if m.sequence_parallel else 1)
    unit = FP8_ALIGNMENT * ranks
    rule = (
        f"must be a multiple of {unit // math.gcd(unit, m.micro_batch_size)} in fp8: a rank has model.micro_batch_size="
    )
    rule += f"{m.micro_batch_size} * model.seq_length / {ranks} rows, which must be a multiple of {FP8_ALIGNMENT}"
    fits = m.micro_batch_size * m.seq_length % unit == 0
    need(fits, "model.seq_length", rule, _multiples(m.seq_length, unit // math.gcd(unit, m.micro_batch_size)))


def _device(cfg: TrainConfig, need: Need) -> None:
    m, gpu, precision = cfg.model, cfg.gpu, cfg.precision.name
    p = cfg.precision
    formats = "fp8" if p.fp8 else {"bf16-mixed": "bf16", "32": "fp32"}.get(p.trainer_precision, p.name)
    rule = f"must name the number formats, which are those of {formats} (precision.fp8, precision.trainer_precision)"
    need(p.name == formats, "precision.name", rule, f"use precision={formats}")
    rule, fix = f"gpu={gpu.name} does not compute in {precision}", f"this device has: {', '.join(gpu.peak_tflops)}"
    need(precision in gpu.peak_tflops, "precision", rule, fix, value=precision)
    if gpu.device == "cuda":
        measured = precision in gpu.peak_tflops and gpu.peak_tflops[precision] is None
        fix = "give the dense TFLOP/s of one GPU"
        need(not measured, f"gpu.peak_tflops.{precision}", "is measured on CPUs only", fix)
    else:
        backend, cp = "model.attention_backend", "model.context_parallel_size"
        need(
            m.attention_backend not in ("flash", "fused"), backend, "is a CUDA kernel (gpu=cpu is chosen)", "use local"
        )
        rule = "needs Transformer Engine's attention, and so a GPU (gpu=cpu is chosen)"
        need(m.context_parallel_size <= 1, cp, rule, "use 1")
        for name in GPU_ONLY:
            need(not _model_value(cfg, name), f"model.{name}", "needs a GPU (gpu=cpu is chosen)", "use false")
    rule = f"cluster={cfg.cluster.name} starts processes on this machine only"
    here = cfg.cluster.scheduler == "none"
    need(not here or cfg.trainer.num_nodes == 1, "trainer.num_nodes", rule, "use 1, or cluster=slurm")


def _model_value(cfg: TrainConfig, name: str) -> object:
    section, _, last = name.rpartition(".")
    return getattr(getattr(cfg.model, section) if section else cfg.model, last)


def _optimizer(cfg: TrainConfig, need: Need) -> None:
    o = cfg.model.optim
    if math.isfinite(o.min_lr):
        rule = f"must not be above model.optim.lr ({o.lr:g}), from which the schedule comes down to it"
        need(not o.min_lr > o.lr, "model.optim.min_lr", rule, f"nearest that works: {o.lr:g}")
    for name, purpose in (
        ("overlap_param_gather", "gathers what the distributed optimizer sharded"),
        ("use_precision_aware_optimizer", "is a mode of the distributed optimizer"),
    ):
        rule = f"{purpose}, and model.optim.use_distributed_optimizer=false"
        fix = "use false, or model.optim.use_distributed_optimizer=true"
        need(o.use_distributed_optimizer or not getattr(o, name), f"model.optim.{name}", rule, fix)
    rule = "works only together with model.optim.overlap_grad_reduce=true"
    fix = "use false, or model.optim.overlap_grad_reduce=true"
    need(o.overlap_grad_reduce or not o.overlap_param_gather, "model.optim.overlap_param_gather", rule, fix)
    rule = "does not train fp8 parameters correctly in this megatron-core (precision.fp8_param_gather=true)"
    fix = "use false, or precision.fp8_param_gather=false"
    both = o.use_precision_aware_optimizer and cfg.precision.fp8_param_gather
    need(not both, "model.optim.use_precision_aware_optimizer", rule, fix)
    for name in ("exp_avg_dtype", "exp_avg_sq_dtype"):
        usable = cfg.precision_aware_optimizer or getattr(o, name) != "bf16"
        need(usable, f"model.optim.{name}", "needs model.optim.use_precision_aware_optimizer=true", "use fp32")


def _fusions(cfg: TrainConfig, need: Need) -> None:
    m, p = cfg.model, cfg.precision
    rule = "is a form of the fused RoPE, and model.apply_rope_fusion=false"
    fix = "use false, or model.apply_rope_fusion=true"
    need(m.apply_rope_fusion or not m.fused_single_qkv_rope, "model.fused_single_qkv_rope", rule, fix)
    rule = "gives a loss of NaN in fp8 with this Transformer Engine (2.11)"
    fused_mlp = m.use_transformer_engine_op_fuser and p.fp8
    need(not fused_mlp, "model.use_transformer_engine_op_fuser", rule, "use false, or precision=bf16")
    if m.tp_comm_overlap and m.tensor_model_parallel_size > 1:
        rule = "overlaps the communication of sequence parallelism, and model.sequence_parallel=false"
        need(m.sequence_parallel, "model.tp_comm_overlap", rule, "use false, or model.sequence_parallel=true")
        joined = cfg.cluster.nvlink_gpus or cfg.trainer.devices
        rule = f"needs tensor-parallel ranks that NVLink joins, and it joins {joined} GPUs (cluster.nvlink_gpus)"
        fix = "use false, or cluster.nvlink_gpus=72 on GB200 NVL72"
        need(m.tensor_model_parallel_size <= joined, "model.tp_comm_overlap", rule, fix)
        rule, instead = (
            "is not possible with user buffers (model.tp_comm_overlap=true)",
            "or model.tp_comm_overlap=false",
        )
        in_fp8 = m.sequence_parallel and p.fp8
        need(not (in_fp8 and p.fp8_recipe == "blockwise"), "precision.fp8_recipe", rule, f"use delayed, {instead}")
        mixed = in_fp8 and p.first_last_layers_bf16
        need(not mixed, "precision.first_last_layers_bf16", rule, f"use false, {instead}")
    if m.cuda_graph_impl != "none":
        # What a graph cannot record.
        environment = cfg.entrypoint.env | dict(os.environ) | cfg.cluster.env
        expandable = "expandable_segments:True"
        for obstacle, present in {
            "gpu=cpu": cfg.gpu.device == "cpu",
            f"model.recompute_granularity={m.recompute_granularity}": m.recompute_granularity is not None,
            f"PYTORCH_CUDA_ALLOC_CONF={expandable}": expandable in environment.get("PYTORCH_CUDA_ALLOC_CONF", ""),
        }.items():
            need(not present, "model.cuda_graph_impl", f"is not possible with {obstacle}", "change that, or use none")


def _recomputation(cfg: TrainConfig, need: Need) -> None:
    m = cfg.model
    if m.recompute_granularity == "full":
        rule = "is needed with model.recompute_granularity=full"
        need(m.recompute_method is not None, "model.recompute_method", rule, "valid: uniform, block")
        rule += ": layers in a unit (uniform), or recomputed on each pipeline stage (block)"
        need(m.recompute_num_layers is not None, "model.recompute_num_layers", rule, "1 or more")
    else:
        rule = "belongs to model.recompute_granularity=full"
        need(m.recompute_method is None, "model.recompute_method", rule, "use null")


def _fp8(cfg: TrainConfig, need: Need) -> None:
    m, p = cfg.model, cfg.precision
    of_stage = p.first_last_layers_bf16
    layers = m.num_layers // max(1, m.pipeline_model_parallel_size) if of_stage else m.num_layers
    for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        rule = f"is more than the {layers} layers of {'a pipeline stage' if of_stage else 'the model'}"
        need(getattr(p, name) <= layers, f"precision.{name}", rule, f"nearest that works: {layers}")
    if p.fp8 is None:
        return
    rule, fix = "is not possible with delayed scaling", "use false, or precision.fp8_recipe=tensorwise"
    mixed = p.first_last_layers_bf16 and p.fp8_recipe == "delayed"
    need(not mixed, "precision.first_last_layers_bf16", rule, fix)


def _data(cfg: TrainConfig, need: Need) -> None:
    data = cfg.data
    if data.kind == "megatron":
        need(
            data.paths and all(data.paths),
            "data.paths",
            "names no dataset",
            "give prefixes of .bin/.idx pairs, without suffix",
        )
        rule = f"must hold one weight per path, and data.paths holds {len(data.paths)}"
        matching = not data.weights or len(data.weights) == len(data.paths)
        need(matching, "data.weights", rule, "[] weighs all paths equally")
        rule = "must hold one weight above 0"
        need(not data.weights or any(data.weights), "data.weights", rule, "[] weighs all paths equally")
        need(data.tokenizer is not None, "data.tokenizer", "a tokenised dataset needs its tokenizer", "give its folder")
    need(data.kind == "mock" or data.folder is not None, "data.folder", "is needed for prepared files", "give a folder")
    rule = "is too small for a byte-level tokenizer (256 bytes, special tokens, and merges)"
    need(data.kind != "local" or cfg.model.vocab_size >= 300, "model.vocab_size", rule, "nearest that works: 300")
    shares = split_shares(data.split)
    if shares is None:
        rule = "must be three numbers, the shares of train, validation and test, the first above 0"
        need(False, "data.split", rule, "for example: 99,1,0")
    elif data.kind != "mock":
        batches = cfg.trainer.limit_val_batches
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


def _checkpoint(cfg: TrainConfig, need: Need) -> None:
    c, steps = cfg.checkpoint, cfg.trainer.max_steps
    if c.every_n_steps is not None:
        rule = f"must be at most trainer.max_steps={steps}, or no checkpoint is ever written"
        fix = f"nearest that works: {steps}; null writes none"
        need(c.every_n_steps <= steps, "checkpoint.every_n_steps", rule, fix)
        rule = "cannot be saved on a CPU: Megatron's distributed optimizer expects the step counter of a fused GPU Adam"
        on_cpu = cfg.gpu.device == "cpu" and cfg.model.optim.use_distributed_optimizer
        fix = "use false, or checkpoint.every_n_steps=null"
        need(not on_cpu, "model.optim.use_distributed_optimizer", rule, fix)
    rule = "takes only initial weights, and checkpoint.resume_from continues a run"
    both = c.resume_from is not None and c.weights_from is not None
    need(not both, "checkpoint.weights_from", rule, "set one of the two to null")


def _profile(cfg: TrainConfig, need: Need) -> None:
    p, last, ranks = cfg.profile, cfg.trainer.max_steps - 1, cfg.world_size
    if p.kind not in ("torch", "nsys"):
        return
    rule = f"profiles GPUs (gpu={cfg.gpu.name} is chosen)"
    need(p.kind == "torch" or cfg.gpu.device == "cuda", "profile", rule, "use profile=torch", value=p.kind)
    more = "or more trainer.max_steps"
    if last < 1:
        rule = f"needs a step before it to warm the profiler up, and trainer.max_steps={cfg.trainer.max_steps}"
        need(False, "profile", rule, "trainer.max_steps=2 or more, or profile=none", value=p.kind)
    elif not 1 <= p.start_step <= last:
        rule = f"must be between 1 (step 0 warms the profiler up) and {last}, the last step"
        need(False, "profile.start_step", rule, f"nearest that works: {min(max(p.start_step, 1), last)}; {more}")
    else:
        rule = f"must be between profile.start_step={p.start_step} and {last}, the last step"
        fix = f"nearest that works: {min(max(p.end_step, p.start_step), last)}; {more}"
        need(p.start_step <= p.end_step <= last, "profile.end_step", rule, fix)
    rule = (
        f"must name ranks of 0 to {ranks - 1}, at least one, each once" if ranks > 1 else "must be [0], the only rank"
    )
    listed_once = p.ranks and len(set(p.ranks)) == len(p.ranks)
    need(listed_once and max(p.ranks) < ranks, "profile.ranks", rule, "such as [0]")
