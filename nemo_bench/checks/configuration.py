"""Rules about a configuration that hold on every machine: each names the key, its value, the rule and what works."""

from __future__ import annotations

import math
import re
from pathlib import Path

import yaml

from nemo_bench.cluster.request import slurm_rules
from nemo_bench.config import TrainConfig
from nemo_bench.data.indexed_dataset import split_shares
from nemo_bench.errors import Need, Problem, text_of, value_of
from nemo_bench.fields import field_problems, settings
from nemo_bench.pipeline import chunks_of

FP8_ALIGNMENT = 16  # sizes of Transformer Engine's fp8 matrix products must be multiples of this,
MX_ALIGNMENT = 32  # or of this, with a scaling factor for each block
_CONFLICTS = [
    (re.findall(r"(\S+?)(!?=)(\S+)", conflict["when"]), conflict["why"], conflict["fix"])
    for conflict in yaml.safe_load(Path(__file__).with_name("conflicts.yaml").read_text())
]


def configuration_problems(cfg: TrainConfig) -> list[Problem]:
    """Return every rule that the values themselves break, whatever the machine."""
    need = Need(cfg)
    need.problems += field_problems(cfg)
    if not any(isinstance(problem.value, (int, float)) for problem in need.problems):  # these rules calculate
        for rules in (_layout, _batch, _attention, _fp8, _schedule, _profile):
            rules(cfg, need)
    for rules in (_conflicts, _formats, _user_buffers, _data):
        rules(cfg, need)
    if cfg.cluster.scheduler == "slurm":
        slurm_rules(cfg, need)
    return need.problems


def _conflicts(cfg: TrainConfig, need: Need) -> None:
    for conditions, why, fix in _CONFLICTS:
        if all((text_of(value_of(cfg, key)) in values.split(",")) is (sign == "=") for key, sign, values in conditions):
            (named, *_), *others = conditions
            present = ", ".join(f"{key}={text_of(value_of(cfg, key))}" for key, *_ in others)
            need(False, named, f"{why} ({present})", fix)


def _need_multiple(need: Need, key: str, of: int, why: str, *, works: int = 0) -> None:
    """Check that a setting is a multiple of `of`; the message names the next multiples of `works`."""
    value, works = value_of(need.cfg, key), works or of
    below = value // works * works
    fix = f"nearest that work: {f'{below}, ' if below else ''}{below + works}"
    need(value % of == 0, key, f"must be a multiple of {of}: {why}", fix)


def _divisors(value: int, of: int) -> str:
    """Return the divisors of `of` next to `value`, which is not one."""
    smaller = [size for size in range(1, math.isqrt(of) + 1) if of % size == 0]
    divisors = sorted({*smaller, *(of // size for size in smaller)})
    nearest = [size for size in divisors if size < value][-1:] + [size for size in divisors if size > value][:1]
    return f"nearest that work: {', '.join(map(str, nearest))}"


def _layout(cfg: TrainConfig, need: Need) -> None:
    m, gpus, per_model = cfg.model, cfg.world_size, cfg.model_parallel_size
    tp, pp, cp = m.tensor_model_parallel_size, m.pipeline_model_parallel_size, m.context_parallel_size
    key = "model.{}_model_parallel_size".format
    product = f"{key('tensor')} * {key('pipeline')} * model.context_parallel_size"
    rule = f"must divide the number of GPUs, trainer.num_nodes * trainer.devices = {gpus}"
    fix = f"{_divisors(per_model, gpus)}; or a scale with a multiple of {per_model} GPUs"
    need(gpus % per_model == 0, product, rule, fix, value=f"{tp} * {pp} * {cp} = {per_model}")
    _pipeline(cfg, need)
    for name, total in (("num_attention_heads", "hidden_size"), ("num_query_groups", "num_attention_heads")):
        part, whole = getattr(m, name), getattr(m, total)
        need(whole % part == 0, f"model.{name}", f"must divide model.{total}={whole}", _divisors(part, whole))
    shared = {name: getattr(m, name) for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size")}
    uneven = " and ".join(f"model.{name}={size}" for name, size in shared.items() if size % tp)
    rule = f"must divide {uneven}: each rank holds an equal share"
    need(not uneven, key("tensor"), rule, _divisors(tp, math.gcd(*shared.values())))
    if cp > 1 and m.seq_length % (2 * cp):
        why = f"each of model.context_parallel_size={cp} ranks takes two slices of it"
        _need_multiple(need, "model.seq_length", 2 * cp, why)
    elif m.sequence_parallel and not uneven:
        why = f"model.context_parallel_size * {key('tensor')}, with model.sequence_parallel=true"
        _need_multiple(need, "model.seq_length", cp * tp, why, works=2 * cp * tp)


def _pipeline(cfg: TrainConfig, need: Need) -> None:
    m, pp, vp = cfg.model, cfg.model.pipeline_model_parallel_size, cfg.model.virtual_pipeline_model_parallel_size
    chunks, own = pp * (vp or 1), m.account_for_embedding_in_pipeline_split + m.account_for_loss_in_pipeline_split
    virtual = f" * model.virtual_pipeline_model_parallel_size={vp}" if vp else ""
    stages = f"model.pipeline_model_parallel_size={pp}{virtual}"
    if m.pipeline_model_parallel_layout is not None:
        parts = chunks_of(m.pipeline_model_parallel_layout)
        fits = len(parts) == chunks and "".join(parts) == "E" + "t" * m.num_layers + "L"
        rule = f"must be E, model.num_layers={m.num_layers} times t, and L, in {chunks} chunks divided by | ({stages})"
        need(fits, "model.pipeline_model_parallel_layout", rule, "null lays them out equally")
    elif own:
        below = (m.num_layers + own) // chunks * chunks - own
        rule = f"and {own} for the embedding and the loss must be a multiple of {chunks} ({stages})"
        fix = f"nearest that work: {f'{below}, ' if below > 0 else ''}{below + chunks}"
        need(m.num_layers == below, "model.num_layers", rule, fix)
    else:
        _need_multiple(need, "model.num_layers", chunks, f"the pipeline's chunks are equal ({stages})")


def _batch(cfg: TrainConfig, need: Need) -> None:
    m, key = cfg.model, "model.global_batch_size"
    if cfg.world_size % cfg.model_parallel_size:
        return  # reported with the layout; there is no data-parallel size
    dp, pp = cfg.data_parallel_size, m.pipeline_model_parallel_size
    unit = m.micro_batch_size * dp
    _need_multiple(need, key, unit, f"model.micro_batch_size={m.micro_batch_size} * data-parallel size {dp}")
    if m.global_batch_size % unit == 0 and (m.virtual_pipeline_model_parallel_size or 1) > 1:
        why = f"interleaved stages take a multiple of model.pipeline_model_parallel_size={pp} micro-batches"
        _need_multiple(need, key, unit * pp, f"{why}, and it gives {cfg.num_micro_batches}")


def fused_attention_fits(cfg: TrainConfig) -> bool:
    """Return whether the fused and the flash kernel take this size of heads (tried with cuDNN 9.19 on an H200)."""
    head = cfg.model.hidden_size / cfg.model.num_attention_heads
    return cfg.gpu.device == "cpu" or (head % 8 == 0 and head <= 256)


def _attention(cfg: TrainConfig, need: Need) -> None:
    head = cfg.model.hidden_size / cfg.model.num_attention_heads
    rule = f"has no kernel for heads of {head:g} (hidden size / attention heads), only for multiples of 8 up to 256"
    fits = fused_attention_fits(cfg) or cfg.model.attention_backend not in ("fused", "flash")
    need(fits, "model.attention_backend", rule, "use unfused, which is slower")


def _fp8(cfg: TrainConfig, need: Need) -> None:
    m, p, tp = cfg.model, cfg.precision, cfg.model.tensor_model_parallel_size
    layers, holder = m.num_layers, "the model"
    if p.first_last_layers_bf16:
        layers, holder = m.num_layers // m.pipeline_model_parallel_size, "a pipeline stage"
    for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        rule = f"is more than the {layers} layers of {holder}"
        need(getattr(p, name) <= layers, f"precision.{name}", rule, f"nearest that works: {layers}")
    if p.fp8 is None and p.fp4 is None:
        return
    side = MX_ALIGNMENT if p.fp4 or p.fp8_recipe == "mxfp8" else FP8_ALIGNMENT
    multiple = side * tp
    why = f"in {p.name} the sides of a matrix are multiples of {side} on each of {tp} ranks"
    _need_multiple(need, "model.hidden_size", multiple, why)
    _need_multiple(need, "model.ffn_hidden_size", multiple, why)
    rows = m.hidden_size + 2 * m.num_query_groups * m.hidden_size // m.num_attention_heads
    rule = f"gives {rows} rows of query, key and value weights, not a multiple of {multiple}: {why}"
    need(rows % multiple == 0, "model.num_query_groups", rule, "use another number, or precision=bf16")
    ranks = m.context_parallel_size * (tp if m.sequence_parallel else 1)
    why = f"in {p.name} a rank's share (of {ranks}) * model.micro_batch_size={m.micro_batch_size} is one of {side}"
    unit = side * ranks // math.gcd(side * ranks, m.micro_batch_size)
    _need_multiple(need, "model.seq_length", unit, why)


def _formats(cfg: TrainConfig, need: Need) -> None:
    gpu, p = cfg.gpu, cfg.precision
    formats = {"bf16-mixed": "bf16", "32": "fp32"}.get(p.trainer_precision, p.name)
    if p.fp4 or p.fp8:
        formats = "nvfp4" if p.fp4 else "mxfp8" if p.fp8_recipe == "mxfp8" else "fp8"
    rule = f"must name the number formats, which are those of {formats} (precision.fp8, precision.trainer_precision)"
    need(p.name == formats, "precision.name", rule, f"use precision={formats}")
    rule, fix = f"gpu={gpu.name} does not compute in {p.name}", f"this device has: {', '.join(gpu.peak_tflops)}"
    need(p.name in gpu.peak_tflops, "precision", rule, fix, value=p.name)
    if gpu.device == "cuda":
        known = gpu.peak_tflops.get(p.name, 0) is not None
        need(known, f"gpu.peak_tflops.{p.name}", "is measured on CPUs only", "give the dense TFLOP/s of one GPU")
        return
    for key in (key for key, _, setting in settings(cfg) if setting.metadata.get("gpu_only")):
        need(not value_of(cfg, key), key, f"needs a GPU (gpu={gpu.name} is chosen)", "use false")


def _user_buffers(cfg: TrainConfig, need: Need) -> None:
    m, joined = cfg.model, cfg.cluster.nvlink_gpus or cfg.trainer.devices
    rule = f"needs tensor-parallel ranks that NVLink joins, and it joins {joined} GPUs (cluster.nvlink_gpus)"
    fix = "use false, or cluster.nvlink_gpus=72 on GB200 NVL72"
    need(not m.tp_comm_overlap or m.tensor_model_parallel_size <= joined, "model.tp_comm_overlap", rule, fix)


def _data(cfg: TrainConfig, need: Need) -> None:
    data, even = cfg.data, "[] weighs all paths equally"
    for key in ("results_version", "model.name"):
        name = value_of(cfg, key)
        usable = name not in (".", "..") and re.fullmatch(r"[^\s/\\]+", name)
        need(usable, key, "names a folder under results/", "use a word without slashes and blanks")
    if data.kind == "megatron":
        rule = f"must hold one weight per path, and data.paths holds {len(data.paths)}"
        need(len(data.weights) in (0, len(data.paths)), "data.weights", rule, even)
        need(not data.weights or any(data.weights), "data.weights", "must hold one weight above 0", even)
    rule = "is too small for a byte-level tokenizer (256 bytes, special tokens, and merges)"
    need(data.kind != "local" or cfg.model.vocab_size >= 300, "model.vocab_size", rule, "nearest that works: 300")
    shares, batches = split_shares(data.split), cfg.trainer.limit_val_batches
    rule = "must be three numbers, the shares of train, validation and test, the first above 0"
    need(shares, "data.split", rule, "for example: 99,1,0")
    validates = not shares or data.kind == "mock" or batches <= 0 or shares[1] > 0
    rule = f"leaves nothing to validate on, and trainer.limit_val_batches={batches}"
    need(validates, "data.split", rule, "for example: 99,1,0; or trainer.limit_val_batches=0")


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
    rule = f"must be between 1 (step 0 warms the profiler up) and {last}, the last step"
    fix = f"nearest that works: {min(max(p.start_step, 1), last) or 'none'}; or more trainer.max_steps"
    need(1 <= p.start_step <= last, "profile.start_step", rule, fix)
    rule = f"must be between profile.start_step={p.start_step} and {last}, the last step"
    ends_there = p.start_step <= p.end_step <= last or p.start_step > last
    need(ends_there, "profile.end_step", rule, "use one of these, or more trainer.max_steps")
    distinct = p.ranks and len(set(p.ranks)) == len(p.ranks)
    rule = f"must name ranks of 0 to {ranks - 1}, at least one, each once"
    need(distinct and max(p.ranks) < ranks, "profile.ranks", rule, "such as [0]")
