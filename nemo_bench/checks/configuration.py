"""Everything that can be known wrong before a process is started or a GPU is held.

`configuration_problems` needs nothing but the configuration; `machine_problems` looks at this machine (its GPUs and
files). Both return all problems they find, each with the key, its value, the rule and the nearest values that work.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable
from pathlib import Path

from nemo_bench.config import OptimConfig, TrainConfig
from nemo_bench.errors import BenchError, Problem

# Sizes of Transformer Engine's fp8 matrix products must be multiples of this.
FP8_ALIGNMENT = 16


def _text(value: object) -> object:
    """A value as it is typed on a Hydra command line."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else value


def _nearest(value: int, works: Callable[[int], bool], highest: int = 1 << 20) -> str:
    """'nearest that work: A, B': the next smaller and larger integers for which `works` holds."""
    below = next((v for v in range(min(value - 1, highest), 0, -1) if works(v)), None)
    above = next((v for v in range(max(value, 0) + 1, highest + 1) if works(v)), None)
    found = [str(v) for v in (below, above) if v is not None]
    return "nearest that work: " + ", ".join(found) if found else "no value of this key alone works"


def configuration_problems(cfg: TrainConfig) -> list[Problem]:
    """Every rule about the numbers themselves. An empty list: the configuration can be laid out."""
    from nemo_bench.checks.profile import profile_problems

    problems = _positive(cfg) + _ranges(cfg) + _words(cfg)
    # The rules below divide by these numbers.
    if not problems:
        problems = [*_layout(cfg), *_batch(cfg)]
    return problems + _device(cfg) + _performance(cfg) + _data(cfg) + _checkpoint(cfg) + profile_problems(cfg)


def _positive(cfg: TrainConfig) -> list[Problem]:
    m, t = cfg.model, cfg.trainer
    sizes: dict[str, int | None] = {
        f"model.{name}": getattr(m, name)
        for name in (
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "seq_length",
            "vocab_size",
            "make_vocab_size_divisible_by",
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "virtual_pipeline_model_parallel_size",
            "context_parallel_size",
            "micro_batch_size",
            "global_batch_size",
        )
    }
    sizes |= {f"trainer.{name}": getattr(t, name) for name in ("num_nodes", "devices", "max_steps", "gc_interval")}
    found = [
        Problem(key, value, "must be at least 1", "nearest that works: 1")
        for key, value in sizes.items()
        if value is not None and value < 1
    ]
    for key, count in (
        ("trainer.limit_val_batches", t.limit_val_batches),
        ("data.num_workers", cfg.data.num_workers),
    ):
        if count < 0:
            found.append(Problem(key, count, "must be 0 or more", "nearest that works: 0"))
    return found


def _ranges(cfg: TrainConfig) -> list[Problem]:
    """Numbers with which training would end in an error, or in NaN, once it has begun."""
    m, optim, recipe = cfg.model, cfg.model.optim, OptimConfig()
    found = []
    for name in ("lr", "min_lr", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "clip_grad"):
        value, below = getattr(optim, name), 1 if name.startswith("adam_beta") else math.inf
        if not 0 <= value < below:  # nor is NaN
            rule = "must be 0 or more, and less than 1" if below == 1 else "must be 0 or more, and finite"
            found.append(Problem(f"model.optim.{name}", value, rule, f"the recipe's value: {getattr(recipe, name)}"))
    if optim.min_lr > optim.lr:
        rule = f"must not be above model.optim.lr ({optim.lr:g}), from which the schedule comes down to it"
        found.append(Problem("model.optim.min_lr", optim.min_lr, rule, f"nearest that works: {optim.lr:g}"))
    if not 0 <= cfg.trainer.seed < 2**32:
        found.append(Problem("trainer.seed", cfg.trainer.seed, "must be 0 or more, and less than 2^32", "such as 1234"))
    positive: dict[str, float | None] = {
        "model.init_method_std": m.init_method_std,
        "model.layernorm_epsilon": m.layernorm_epsilon,
        "model.rotary_base": m.rotary_base,
        "data.corpus_bytes": cfg.data.corpus_bytes,
        "gpu.memory_gib": cfg.gpu.memory_gib,
        "total_tokens": cfg.total_tokens,
        **{f"gpu.peak_tflops.{name}": rate for name, rate in cfg.gpu.peak_tflops.items()},
    }
    for key, number in positive.items():
        if number is not None and not 0 < number < math.inf:
            found.append(Problem(key, number, "must be more than 0, and finite", "leave it out for the default"))
    return found


def _words(cfg: TrainConfig) -> list[Problem]:
    names = {"results_version": cfg.results_version, "precision.name": cfg.precision.name, "model.name": cfg.model.name}
    found = [
        Problem(key, name, "names a folder under results/", "a word without slashes")
        for key, name in names.items()
        if name in ("", ".", "..") or "/" in name
    ]
    if cfg.cluster.scheduler not in ("none", "slurm"):
        found.append(Problem("cluster.scheduler", cfg.cluster.scheduler, "is no scheduler", "valid: none, slurm"))
    return found


def _divides(key: str, divisor: int, total: int, rule: str) -> list[Problem]:
    """`divisor`, the value of `key`, must divide `total`."""
    if total % divisor == 0:
        return []
    return [Problem(key, divisor, rule, _nearest(divisor, lambda v: total % v == 0, highest=total))]


def _layout(cfg: TrainConfig) -> list[Problem]:
    m = cfg.model
    tp, pp, cp = m.tensor_model_parallel_size, m.pipeline_model_parallel_size, m.context_parallel_size
    vp = m.virtual_pipeline_model_parallel_size
    gpus, per_model = cfg.world_size, cfg.model_parallel_size
    found: list[Problem] = []

    if gpus % per_model:
        fits = sorted({t * p * c for t in (1, 2, 4, 8) for p in (1, 2, 4, 8) for c in (1, 2)} & _divisors(gpus))
        found.append(
            Problem(
                "model.tensor_model_parallel_size * model.pipeline_model_parallel_size * model.context_parallel_size",
                f"{tp} * {pp} * {cp} = {per_model}",
                f"must divide the number of GPUs, trainer.num_nodes * trainer.devices = {gpus}",
                f"products that divide {gpus}: {', '.join(map(str, fits))}; or a scale with a multiple of "
                f"{per_model} GPUs",
            )
        )
    if vp is not None and pp == 1 and vp > 1:
        found.append(
            Problem(
                "model.virtual_pipeline_model_parallel_size",
                vp,
                "interleaves pipeline stages, and model.pipeline_model_parallel_size=1 has none",
                "set it to null, or use 2 or more pipeline stages",
            )
        )
    elif m.num_layers % (pp * (vp or 1)):
        stages = f"model.pipeline_model_parallel_size={pp}" + (
            f" * model.virtual_pipeline_model_parallel_size={vp}" if vp else ""
        )
        found.append(
            Problem(
                "model.num_layers",
                m.num_layers,
                f"must divide equally into {pp * (vp or 1)} pipeline chunks ({stages})",
                _nearest(m.num_layers, lambda v: v % (pp * (vp or 1)) == 0),
            )
        )
    found += _divides(
        "model.num_attention_heads",
        m.num_attention_heads,
        m.hidden_size,
        f"must divide model.hidden_size={m.hidden_size}",
    )
    found += _divides(
        "model.num_query_groups",
        m.num_query_groups,
        m.num_attention_heads,
        f"must divide model.num_attention_heads={m.num_attention_heads}",
    )
    shards = {
        "num_attention_heads": m.num_attention_heads,
        "num_query_groups": m.num_query_groups,
        "ffn_hidden_size": m.ffn_hidden_size,
    }
    uneven = [f"model.{name}={size}" for name, size in shards.items() if size % tp]
    if uneven:
        found.append(
            Problem(
                "model.tensor_model_parallel_size",
                tp,
                f"must divide {' and '.join(uneven)}: each rank holds an equal share",
                _nearest(tp, lambda v: all(size % v == 0 for size in shards.values()), highest=m.num_query_groups),
            )
        )
    if cp > 1 and m.seq_length % (2 * cp):
        found.append(
            Problem(
                "model.seq_length",
                m.seq_length,
                f"must be a multiple of 2 * model.context_parallel_size = {2 * cp}: each rank takes two slices, "
                "which balances the causal mask",
                _nearest(m.seq_length, lambda v: v % (2 * cp) == 0),
            )
        )
    elif m.sequence_parallel and not uneven and m.seq_length % (cp * tp):
        found.append(
            Problem(
                "model.seq_length",
                m.seq_length,
                f"must be a multiple of {cp * tp} (model.context_parallel_size * model.tensor_model_parallel_size) "
                "with model.sequence_parallel=true",
                _nearest(m.seq_length, lambda v: v % (2 * cp * tp) == 0),
            )
        )
    return found


def _divisors(number: int) -> set[int]:
    return {d for d in range(1, number + 1) if number % d == 0}


def _batch(cfg: TrainConfig) -> list[Problem]:
    m = cfg.model
    if cfg.world_size % cfg.model_parallel_size:
        return []  # said already; there is no data-parallel size to reckon with
    dp, mbs, gbs = cfg.data_parallel_size, m.micro_batch_size, m.global_batch_size
    if gbs % (mbs * dp):
        return [
            Problem(
                "model.global_batch_size",
                gbs,
                f"must be a multiple of {mbs * dp} (model.micro_batch_size={mbs} * data-parallel size {dp})",
                _nearest(gbs, lambda v: v % (mbs * dp) == 0),
            )
        ]
    pp, vp = m.pipeline_model_parallel_size, m.virtual_pipeline_model_parallel_size
    if (vp or 1) > 1 and pp > 1 and cfg.num_micro_batches % pp:
        return [
            Problem(
                "model.global_batch_size",
                gbs,
                f"gives {cfg.num_micro_batches} micro-batches, which must be a multiple of "
                f"model.pipeline_model_parallel_size={pp} when stages are interleaved",
                _nearest(gbs, lambda v: v % (mbs * dp * pp) == 0),
            )
        ]
    return []


def _device(cfg: TrainConfig) -> list[Problem]:
    m, gpu = cfg.model, cfg.gpu
    found: list[Problem] = []
    if cfg.precision.name not in gpu.peak_tflops:
        found.append(
            Problem(
                "precision",
                cfg.precision.name,
                f"gpu={gpu.name} does not compute in {cfg.precision.name}",
                f"this device has: {', '.join(gpu.peak_tflops)}",
            )
        )
    elif cfg.precision.fp8:
        tp = max(1, m.tensor_model_parallel_size)
        for name, size in (("hidden_size", m.hidden_size), ("ffn_hidden_size", m.ffn_hidden_size)):
            if size % (FP8_ALIGNMENT * tp):
                found.append(
                    Problem(
                        f"model.{name}",
                        size,
                        f"must be a multiple of {FP8_ALIGNMENT * tp} in fp8 (matrix sides of a multiple of "
                        f"{FP8_ALIGNMENT} on each of {tp} tensor-parallel ranks)",
                        _nearest(size, lambda v: v % (FP8_ALIGNMENT * tp) == 0),
                    )
                )
    backends = ("flash", "fused", "unfused", "local", "auto")
    if m.attention_backend not in backends:
        found.append(
            Problem(
                "model.attention_backend",
                m.attention_backend,
                "is no attention backend of Megatron",
                f"valid: {', '.join(backends)}",
            )
        )
    if gpu.device == "cpu":
        if m.attention_backend in ("flash", "fused"):
            found.append(
                Problem(
                    "model.attention_backend",
                    m.attention_backend,
                    "is a CUDA kernel (gpu=cpu is chosen)",
                    "the value that works: local",
                )
            )
        if m.context_parallel_size > 1:
            found.append(
                Problem(
                    "model.context_parallel_size",
                    m.context_parallel_size,
                    "needs Transformer Engine's attention, which needs a GPU (gpu=cpu is chosen)",
                    "the value that works: 1",
                )
            )
        cuda_only = (
            "apply_rope_fusion",
            "persist_layer_norm",
            "masked_softmax_fusion",
            "fused_single_qkv_rope",
            "use_transformer_engine_op_fuser",
            "gradient_accumulation_fusion",
            "tp_comm_overlap",
            "optim.use_precision_aware_optimizer",
        )
        found += [
            Problem(f"model.{name}", "true", "needs a GPU (gpu=cpu is chosen)", "the value that works: false")
            for name in cuda_only
            if operator.attrgetter(name)(m)
        ]
    elif gpu.device != "cuda":
        found.append(Problem("gpu.device", gpu.device, "is no device type", "valid: cuda, cpu"))
    if cfg.cluster.scheduler == "none" and cfg.trainer.num_nodes != 1:
        found.append(
            Problem(
                "trainer.num_nodes",
                cfg.trainer.num_nodes,
                f"cluster={cfg.cluster.name} starts processes on this machine alone",
                "the value that works: 1; or cluster=slurm",
            )
        )
    c = cfg.cluster
    if gpu.device == "cuda" and c.gres is None and (asked := c.requested_gpus_per_node) is not None:
        count = asked.rpartition(":")[2]
        if not count.isdecimal():
            rule = "is a number of GPUs, with or without a type"
            found.append(Problem("cluster.gpus_per_node", c.gpus_per_node, rule, "such as 8, h100:8 or null"))
        elif int(count) < cfg.trainer.devices:
            nodes = -(-cfg.world_size // max(1, int(count)))
            found.append(
                Problem(
                    "trainer.devices",
                    cfg.trainer.devices,
                    f"ranks a node, and a node has cluster.gpus_per_node={c.gpus_per_node} GPUs",
                    f"as many GPUs: trainer.devices={count} trainer.num_nodes={nodes}",
                )
            )
    if gpu.device == "cuda" and gpu.peak_tflops.get(cfg.precision.name, 0) is None:
        found.append(
            Problem(
                f"gpu.peak_tflops.{cfg.precision.name}",
                "null",
                "is measured on CPUs only",
                "give the dense TFLOP/s of one GPU",
            )
        )
    if c.signal_s < 1:
        found.append(Problem("cluster.signal_s", c.signal_s, "must be at least 1", "nearest that works: 1"))
    for name, does in (
        ("overlap_param_gather", "gathers what the distributed optimizer sharded"),
        ("use_precision_aware_optimizer", "is a way of the distributed optimizer"),
    ):
        if getattr(m.optim, name) and not m.optim.use_distributed_optimizer:
            found.append(
                Problem(
                    f"model.optim.{name}",
                    "true",
                    f"{does}, and model.optim.use_distributed_optimizer=false",
                    "the value that works: false; or model.optim.use_distributed_optimizer=true",
                )
            )
    if m.optim.overlap_param_gather and not m.optim.overlap_grad_reduce:
        found.append(
            Problem(
                "model.optim.overlap_param_gather",
                "true",
                "works only together with model.optim.overlap_grad_reduce=true",
                "the value that works: false; or model.optim.overlap_grad_reduce=true",
            )
        )
    return found


def _one_of(key: str, value: str | None, valid: tuple[str | None, ...], what: str) -> list[Problem]:
    if value in valid:
        return []
    return [Problem(key, value, f"is no {what}", f"valid: {', '.join(str(_text(v)) for v in valid)}")]


def _performance(cfg: TrainConfig) -> list[Problem]:
    """Megatron's own rules about fusions, recomputation and fp8 recipes, said before it asserts them on a GPU."""
    m, p = cfg.model, cfg.precision
    found = _one_of(
        "model.cross_entropy_fusion_impl", m.cross_entropy_fusion_impl, ("te", "native"), "implementation of the loss"
    )
    granularity, method = m.recompute_granularity, m.recompute_method
    found += _one_of("model.recompute_granularity", granularity, (None, "selective", "full"), "kind of recomputation")
    if granularity == "full":
        found += _one_of("model.recompute_method", method, ("uniform", "block"), "way of full recomputation")
        if (m.recompute_num_layers or 0) < 1:
            found.append(
                Problem(
                    "model.recompute_num_layers",
                    _text(m.recompute_num_layers),
                    "must be at least 1 with model.recompute_granularity=full: layers a unit (uniform), or recomputed "
                    "on each pipeline stage (block)",
                    "nearest that works: 1",
                )
            )
    elif method is not None:
        found.append(
            Problem(
                "model.recompute_method", method, "belongs to model.recompute_granularity=full", "null works otherwise"
            )
        )
    if granularity == "selective":
        modules = ("core_attn", "mlp", "layernorm")  # of a model without experts
        for module in m.recompute_modules:
            found += _one_of("model.recompute_modules", module, modules, "part of a layer that can be recomputed")
    found += _one_of("model.cuda_graph_impl", m.cuda_graph_impl, ("none", "local"), "way of recording CUDA graphs")
    if m.cuda_graph_impl != "none":
        # What a graph cannot record.
        hindrances = {
            "gpu=cpu": cfg.gpu.device == "cpu",
            f"model.recompute_granularity={granularity}": granularity is not None,
            "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True in the environment": "expandable_segments:True"
            in (cfg.entrypoint.env | dict(os.environ) | cfg.cluster.env).get("PYTORCH_CUDA_ALLOC_CONF", ""),
        }
        found += [
            Problem("model.cuda_graph_impl", m.cuda_graph_impl, f"cannot be with {name}", "change that, or none here")
            for name, hinders in hindrances.items()
            if hinders
        ]
    for name in ("exp_avg_dtype", "exp_avg_sq_dtype"):
        value = getattr(m.optim, name)
        found += _one_of(f"model.optim.{name}", value, ("fp32", "bf16"), "number format of a moment")
        if value == "bf16" and not cfg.precision_aware_optimizer:
            found.append(
                Problem(
                    f"model.optim.{name}",
                    value,
                    "needs model.optim.use_precision_aware_optimizer=true",
                    "the value that works: fp32",
                )
            )
    if m.fused_single_qkv_rope and not m.apply_rope_fusion:
        found.append(
            Problem(
                "model.fused_single_qkv_rope",
                "true",
                "is a form of the fused RoPE, and model.apply_rope_fusion=false",
                "the value that works: false; or model.apply_rope_fusion=true",
            )
        )
    if m.tp_comm_overlap and m.tensor_model_parallel_size > 1 and not m.sequence_parallel:
        found.append(
            Problem(
                "model.tp_comm_overlap",
                "true",
                "overlaps the communication of sequence parallelism, and model.sequence_parallel=false",
                "the value that works: false; or model.sequence_parallel=true",
            )
        )
    elif m.tp_comm_overlap and m.tensor_model_parallel_size > 1 and p.fp8:
        for key, value, what, differs in (
            ("fp8_recipe", p.fp8_recipe, "delayed", p.fp8_recipe == "blockwise"),
            ("first_last_layers_bf16", "true", "false", p.first_last_layers_bf16),
        ):
            if differs:
                rule = "is not possible with Transformer Engine's user buffers (model.tp_comm_overlap=true)"
                fix = f"the value that works: {what}; or model.tp_comm_overlap=false"
                found.append(Problem(f"precision.{key}", value, rule, fix))
    if m.optim.bucket_size is not None and m.optim.bucket_size < 1:
        found.append(
            Problem(
                "model.optim.bucket_size",
                m.optim.bucket_size,
                "is a number of parameters, at least 1",
                "null leaves it to Megatron",
            )
        )
    if m.wgrad_deferral_limit < 0:
        found.append(
            Problem("model.wgrad_deferral_limit", m.wgrad_deferral_limit, "must be 0 or more", "nearest that works: 0")
        )
    if m.use_transformer_engine_op_fuser and p.fp8:
        found.append(
            Problem(
                "model.use_transformer_engine_op_fuser",
                "true",
                "gives a loss of NaN in fp8 with this Transformer Engine (2.11)",
                "the value that works: false; or precision=bf16",
            )
        )
    if m.optim.use_precision_aware_optimizer and p.fp8_param_gather:
        found.append(
            Problem(
                "model.optim.use_precision_aware_optimizer",
                "true",
                "does not train fp8 parameters rightly in this megatron-core (precision.fp8_param_gather=true)",
                "the value that works: false; or precision.fp8_param_gather=false",
            )
        )
    formats = ("32", "bf16-mixed")  # of Lightning's words, those that parameters here follow
    found += _one_of("precision.trainer_precision", p.trainer_precision, formats, "number format of the training")
    for name, least in (
        ("fp8_amax_history_len", 1),
        ("num_layers_at_start_in_bf16", 0),
        ("num_layers_at_end_in_bf16", 0),
    ):
        if getattr(p, name) < least:
            found.append(
                Problem(
                    f"precision.{name}", getattr(p, name), f"must be {least} or more", f"nearest that works: {least}"
                )
            )
    if p.fp8:
        algorithms = ("max", "most_recent")
        found += _one_of("precision.fp8_amax_compute_algo", p.fp8_amax_compute_algo, algorithms, "choice of an amax")
        found += _one_of("precision.fp8", p.fp8, ("hybrid", "e4m3"), "fp8 format")
        recipes = ("delayed", "tensorwise", "blockwise")
        found += _one_of("precision.fp8_recipe", p.fp8_recipe, recipes, "fp8 recipe")
        if p.first_last_layers_bf16 and p.fp8_recipe == "delayed":
            found.append(
                Problem(
                    "precision.first_last_layers_bf16",
                    "true",
                    "is not possible with delayed scaling",
                    "the value that works: false; or precision.fp8_recipe=tensorwise",
                )
            )
    return found


def _data(cfg: TrainConfig) -> list[Problem]:
    data = cfg.data
    kinds = ("mock", "local", "megatron")
    found: list[Problem] = []
    if data.kind not in kinds:
        found.append(Problem("data.kind", data.kind, "is no kind of data", f"valid: {', '.join(kinds)}"))
    if data.kind == "megatron":
        if not data.paths:
            found.append(
                Problem("data.paths", "[]", "names no dataset", "give prefixes of .bin/.idx pairs, without suffix")
            )
        if data.weights and len(data.weights) != len(data.paths):
            found.append(
                Problem(
                    "data.weights",
                    data.weights,
                    f"must hold one weight a path, and data.paths holds {len(data.paths)}",
                    "[] weighs all paths equally",
                )
            )
        if data.tokenizer is None:
            found.append(
                Problem("data.tokenizer", "null", "a tokenised dataset needs its tokenizer", "give its folder")
            )
    if data.kind != "mock" and data.folder is None:
        found.append(Problem("data.folder", "null", "is needed for prepared files", "give a folder"))
    if data.kind == "local" and cfg.model.vocab_size < 300:
        found.append(
            Problem(
                "model.vocab_size",
                cfg.model.vocab_size,
                "is too small for a byte-level tokenizer (256 bytes, special tokens, and merges)",
                "nearest that works: 300",
            )
        )
    parts = data.split.split(",")
    try:
        shares = [float(part) for part in parts]
    except ValueError:
        shares = []
    if len(shares) != 3 or min(shares) < 0 or shares[0] <= 0:
        found.append(
            Problem(
                "data.split",
                data.split,
                "must be three numbers, the shares of train, validation and test, the first above 0",
                "for example: 99,1,0",
            )
        )
    elif cfg.trainer.limit_val_batches > 0 and shares[1] <= 0 and data.kind != "mock":
        found.append(
            Problem(
                "data.split",
                data.split,
                f"leaves nothing to validate on, and trainer.limit_val_batches={cfg.trainer.limit_val_batches}",
                "for example: 99,1,0; or trainer.limit_val_batches=0",
            )
        )
    return found


def _checkpoint(cfg: TrainConfig) -> list[Problem]:
    c, steps = cfg.checkpoint, cfg.trainer.max_steps
    found: list[Problem] = []
    every = c.every_n_steps
    if every is not None and not 1 <= every <= steps:
        found.append(
            Problem(
                "checkpoint.every_n_steps",
                every,
                f"must be between 1 and trainer.max_steps={steps}, or no checkpoint is ever written",
                f"nearest that works: {1 if every < 1 else steps}; null writes none",
            )
        )
    if every is not None and cfg.gpu.device == "cpu" and cfg.model.optim.use_distributed_optimizer:
        found.append(
            Problem(
                "model.optim.use_distributed_optimizer",
                "true",
                "cannot save checkpoints on CPU: Megatron's distributed optimizer expects the step counter of a "
                "fused GPU Adam",
                "the value that works: false; or checkpoint.every_n_steps=null",
            )
        )
    if c.resume_from is not None and c.weights_from is not None:
        found.append(
            Problem(
                "checkpoint.weights_from",
                c.weights_from,
                "takes initial weights only, and checkpoint.resume_from continues a run: one of the two",
                "leave one of them null",
            )
        )
    return found


def machine_problems(cfg: TrainConfig) -> list[Problem]:
    """What this machine lacks to run `cfg` here and now: GPUs, dataset and tokenizer files, checkpoints, profilers."""
    from nemo_bench.checks.profile import profile_machine_problems

    found = profile_machine_problems(cfg)
    if cfg.gpu.device == "cuda":
        present = count_gpus()
        if present < cfg.trainer.devices:
            found.append(
                Problem(
                    "trainer.devices",
                    cfg.trainer.devices,
                    f"this machine has {present} NVIDIA GPU{'' if present == 1 else 's'}",
                    "scale=local runs without a GPU; launch=dry checks a point and runs nothing",
                )
            )
    return found + _needed_files(cfg)


def stage_problems(cfg: TrainConfig) -> list[Problem]:
    """What the stage folder lacks for a job on a cluster: image, dataset, tokenizer; whether it can be written."""
    found: list[Problem] = []
    container = cfg.cluster.container
    if container is not None and container.image.endswith(".sqsh") and not Path(container.image).is_file():
        found.append(
            Problem(
                "cluster.container.image",
                container.image,
                "is not there: the container image as a squash file",
                f"`python setup_stage.py entrypoint={cfg.entrypoint.name} 'parts=[image]'` brings it; "
                "cluster.container=null runs bare on the nodes",
            )
        )
    stage = Path(cfg.stage_path)
    above = next(folder for folder in (stage, *stage.parents) if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        found.append(
            Problem(
                "stage_path",
                cfg.stage_path,
                f"{above} cannot be written, and results go there",
                "set STAGE_PATH to a folder of the shared file system that you can write",
            )
        )
    return found + _needed_files(cfg)


def _needed_files(cfg: TrainConfig) -> list[Problem]:
    found: list[Problem] = []
    if cfg.data.kind == "megatron":
        found += _dataset_files(cfg)
    from nemo_bench.checks.profile import resumed_profile_problems

    found += resumed_profile_problems(cfg)
    for name in ("resume_from", "weights_from"):
        folder = getattr(cfg.checkpoint, name)
        if folder is not None:
            found += _checkpoint_folder(f"checkpoint.{name}", folder, cfg.trainer.max_steps)
    return found


def count_gpus() -> int:
    """NVIDIA GPUs this machine shows, without loading CUDA: the driver's own device files."""
    return sum(1 for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit())


def _dataset_files(cfg: TrainConfig) -> list[Problem]:
    from nemo_bench.data.indexed_dataset import inspect

    others = "data=local and data=mock need no files"
    found: list[Problem] = []
    for prefix in cfg.data.paths:
        try:
            inspect(Path(prefix), vocab_size=cfg.model.vocab_size)
        except BenchError as error:
            found.append(Problem("data.paths", prefix, str(error), f"`python prepare_data.py` makes it; {others}"))
    if cfg.data.tokenizer is not None and not (Path(cfg.data.tokenizer) / "tokenizer.json").is_file():
        found.append(
            Problem(
                "data.tokenizer",
                cfg.data.tokenizer,
                "holds no tokenizer.json (Hugging Face's format)",
                f"`python setup_stage.py 'parts=[tokenizer]'` brings it; {others}",
            )
        )
    return found


def _checkpoint_folder(key: str, folder: str, max_steps: int) -> list[Problem]:
    from nemo_bench.record.folder import RunFolder

    path = Path(folder)
    if not path.is_dir():
        return [
            Problem(
                key,
                folder,
                "is not a folder",
                "give a run folder that wrote checkpoints, or one of its checkpoints",
            )
        ]
    checkpoint = RunFolder(path).last_checkpoint()
    if checkpoint is not None:
        done = int(checkpoint.name.partition("=")[2]) + 1
        if key == "checkpoint.resume_from" and done >= max_steps:
            rule = f"its last checkpoint has {done} steps done, and trainer.max_steps={max_steps} are wanted"
            return [Problem(key, folder, rule, "more trainer.max_steps, or one of its earlier checkpoints")]
    else:
        return [Problem(key, folder, "holds no finished checkpoint", "give a run with checkpoint.every_n_steps set")]
    return []
