"""`entrypoint=nemo_24_09`: the composed configuration as one of NeMo 1's `megatron_gpt_pretraining.py`, and a command.

The program is a Hydra application inside nvcr.io/nvidia/nemo:24.09 (NeMo 2.0.0, megatron-core 0.9.0). The run folder
gets its whole configuration, `nemo_24_09.yaml`; the command line repeats what the recipe gave there: places, scale,
number format. Both come from one dictionary. Values that our configuration does not hold are those of NVIDIA's 24.09
recipe (github.com/NVIDIA/dgxc-benchmarking, llama3.1/configure.sh at commit 143b90dd) and of the files that its yaml
was made from (github.com/NVIDIA/NeMo-Framework-Launcher, launcher_scripts/conf/training/llama/
llama3_1_{8b,70b,405b}.yaml at commits dbdb2355, 1ab2c781, 072ecc47), Apache-2.0.

What the recipe had otherwise: it mounted the dataset as /dataset, here every path is the same inside and outside of the
container; it passed `--dependency=singleton`, which serialises a sweep; it took the bf16 user-buffer table for fp8.
"""

from __future__ import annotations

import operator
import re
from pathlib import Path
from typing import Any

from nemo_bench.config import ProfileConfig, TrainConfig
from nemo_bench.entrypoints import nemo_24_09_user_buffers as user_buffers
from nemo_bench.errors import Problem

NAME = "nemo_24_09"
CONFIG_FILE = f"{NAME}.yaml"
# NeMo prints a step's time as the mean of this many, itself and those before: NVIDIA's setting in all its recipes.
STEP_TIME_WINDOW = 5
# Ids that mcore 0.9's MockGPTDataset makes up lie below this, whatever the vocabulary.
MOCK_TOKEN_IDS = 4096

# NVTE_FLASH_ATTN, NVTE_FUSED_ATTN; in 24.09 these variables choose, and megatron-core does not touch them.
_ATTENTION = {"fused": ("0", "1"), "flash": ("1", "0"), "unfused": ("0", "0")}
_BACKENDS = (*_ATTENTION, "auto")

# What the recipe passed on the command line; dotted keys of the configuration.
_ON_THE_COMMAND_LINE = (
    "run.results_dir",
    "exp_manager.explicit_log_dir",
    "trainer.num_nodes",
    "trainer.devices",
    "trainer.max_steps",
    "trainer.val_check_interval",
    "model.global_batch_size",
    "model.fp8",
    "model.fp8_hybrid",
    "model.fp8_params",
    "model.tokenizer.type",
    "model.data.data_impl",
    "model.data.data_prefix",
    "model.data.index_mapping_dir",
    "model.nsys_profile.enabled",
)


# Settings that nemo:24.09 does not know, or has no choice in: sections and their keys.
_NOT_THERE = {
    "model": (
        *("cuda_graph_impl", "use_transformer_engine_op_fuser", "fused_single_qkv_rope", "cross_entropy_fusion_impl"),
        "tp_comm_overlap_cfg",
    ),
    "model.optim": (
        *("use_precision_aware_optimizer", "store_param_remainders", "exp_avg_dtype", "exp_avg_sq_dtype"),
        "bucket_size",
    ),
    "precision": ("fp8_dot_product_attention", "first_last_layers_bf16"),
}


def problems(cfg: TrainConfig) -> list[Problem]:
    """What this entrypoint cannot do of what the configuration asks for."""
    found: list[Problem] = []
    default = TrainConfig()
    for section, names in _NOT_THERE.items():
        for name in names:
            value, usual = (operator.attrgetter(f"{section}.{name}")(each) for each in (cfg, default))
            if value != usual:
                rule = f"is a setting of entrypoint=nemo2; with entrypoint={NAME} it would change nothing"
                found.append(Problem(f"{section}.{name}", value, rule, f"leave it out ({usual})"))
    m, precision, c = cfg.model, cfg.precision, cfg.checkpoint
    here = f"entrypoint={NAME}"
    if precision.fp8 is not None and precision.fp8_recipe != "delayed":
        rule = f"is newer than Transformer Engine in nemo:24.09 ({here})"
        found.append(Problem("precision.fp8_recipe", precision.fp8_recipe, rule, "the value that works: delayed"))
    if precision.fp8 not in (None, "hybrid", "e4m3"):
        found.append(Problem("precision.fp8", precision.fp8, f"is no fp8 format ({here})", "valid: hybrid, e4m3"))
    for key, value in vars(c).items():
        if value is not None:
            rule = f"is not offered with {here}: it measures what the recipe measured, which wrote none"
            found.append(Problem(f"checkpoint.{key}", value, rule, "the value that works: null; or entrypoint=nemo2"))
    if cfg.gpu.device == "cuda" and m.attention_backend not in _BACKENDS:
        rule = f"is no attention backend of {here}"
        found.append(Problem("model.attention_backend", m.attention_backend, rule, f"valid: {', '.join(_BACKENDS)}"))
    if cfg.data.kind == "mock" and m.vocab_size < MOCK_TOKEN_IDS:
        rule = f"is less than the token ids that NeMo's mock data holds ({here})"
        found.append(Problem("model.vocab_size", m.vocab_size, rule, f"nearest that works: {MOCK_TOKEN_IDS}"))
    if cfg.profile.kind == "torch":
        rule = f"is {here.replace(NAME, 'nemo2')}'s own; {here} is profiled by nsys"
        found.append(Problem("profile", "torch", rule, "profile=nsys works"))
    if m.recompute_granularity == "selective" and list(m.recompute_modules) != ["core_attn"]:
        rule = f"chooses what {here} does not know: it recomputes the attention's core alone"
        found.append(Problem("model.recompute_modules", m.recompute_modules, rule, "the value that works: [core_attn]"))
    if not cfg.entrypoint.program:
        rule = f"names no program, and {here} starts one"
        found.append(Problem("entrypoint.program", "null", rule, "the path of megatron_gpt_pretraining.py"))
    return found


def machine_problems(cfg: TrainConfig) -> list[Problem]:
    """What this machine lacks to run the program itself."""
    if cfg.entrypoint.program and not Path(cfg.entrypoint.program).is_file():
        rule = "is not on this machine: it is a program of the container nvcr.io/nvidia/nemo:24.09"
        fix = (
            "cluster=slurm runs it there; where NeMo 2.0 is installed for this Python, entrypoint.program=... names "
            "it; entrypoint=nemo2 is this project's own"
        )
        return [Problem("entrypoint.program", cfg.entrypoint.program, rule, fix)]
    return []


def environment(cfg: TrainConfig) -> dict[str, str]:
    """Environment of the ranks that follows from the model."""
    flash_fused = _ATTENTION.get(cfg.model.attention_backend)
    return dict(zip(("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN"), flash_fused)) if flash_fused else {}


def srun_options(cfg: TrainConfig) -> list[str]:
    """What srun must do for the ranks: in 24.09 the user buffers of Transformer Engine meet through MPI."""
    return ["--mpi=pmix"] if _tp_comm_overlap(cfg) else []


def _tp_comm_overlap(cfg: TrainConfig) -> bool:
    return cfg.gpu.device == "cuda" and cfg.model.tp_comm_overlap and cfg.model.tensor_model_parallel_size > 1


def _nsys_profile(profile: ProfileConfig) -> dict[str, Any]:
    """NeMo 1's block: the CUDA profiler runs from the start of `start_step` to the end of `end_step` (steps from 0).

    `nsys profile --capture-range=cudaProfilerApi` around the rank records that range.
    """
    return {
        "enabled": profile.kind == "nsys",
        "start_step": profile.start_step,
        "end_step": profile.end_step,
        "ranks": list(profile.ranks),
        "gen_shape": False,
    }


def configuration(cfg: TrainConfig, run_dir: Path) -> dict[str, Any]:
    """The whole NeMo 1 configuration as plain values, paths as they are."""
    t, m = cfg.trainer, cfg.model
    cuda = cfg.gpu.device == "cuda"
    return {
        "run": {
            # NeMo's own FLOPs estimate looks for "llama3" in it.
            "name": f"llama3_1_{m.name}_{cfg.precision.name}",
            "results_dir": str(run_dir),
        },
        "trainer": {
            "num_nodes": t.num_nodes,
            "devices": t.devices,
            "accelerator": "gpu" if cuda else "cpu",
            "precision": cfg.precision.trainer_precision,
            "logger": False,  # exp_manager brings its own
            "enable_checkpointing": False,
            "use_distributed_sampler": False,
            "max_epochs": None,
            "max_steps": t.max_steps,
            "max_time": "05:23:30:00",
            "log_every_n_steps": 1,
            "val_check_interval": t.max_steps,
            "limit_val_batches": t.limit_val_batches or 0.0,  # a whole number of batches, or the share "none"
            "limit_test_batches": 50,
            "num_sanity_val_steps": 0,
            "accumulate_grad_batches": 1,
            "gradient_clip_val": m.optim.clip_grad,
        },
        "exp_manager": {
            "explicit_log_dir": str(run_dir / "nemo"),
            "exp_dir": None,
            "name": "megatron_llama",
            "create_wandb_logger": False,
            "resume_if_exists": False,
            "resume_ignore_no_checkpoint": True,
            "create_checkpoint_callback": False,
            "log_step_timing": True,
            "step_timing_kwargs": {"sync_cuda": True, "buffer_size": STEP_TIME_WINDOW},
            "log_global_rank_0_only": True,  # not a file a rank
            # So long the other ranks wait at the start; NVIDIA's 60 is meant for a shared file system.
            "seconds_to_sleep": 60 if cfg.cluster.scheduler == "slurm" else 0,
        },
        "model": {**_model(cfg), "optim": _optim(cfg), "data": _data(cfg, run_dir)},
    }


def _model(cfg: TrainConfig) -> dict[str, Any]:
    m, p = cfg.model, cfg.precision
    cuda = cfg.gpu.device == "cuda"
    tp, pp, vp = m.tensor_model_parallel_size, m.pipeline_model_parallel_size, m.virtual_pipeline_model_parallel_size
    half = p.trainer_precision in ("bf16", "bf16-mixed")
    interleaved = (vp or 1) > 1
    # Weight gradients summed by the matrix product itself: Apex's kernel, and master weights (O2).
    accumulation_fusion = cuda and half and m.gradient_accumulation_fusion
    tp_comm_overlap = _tp_comm_overlap(cfg)
    # While its pipeline drains, the last stage catches up on the embedding's.
    defer_embedding_wgrad = m.defer_embedding_wgrad_compute is not False and pp > 1 and accumulation_fusion
    return {
        "mcore_gpt": True,
        "transformer_engine": cuda,
        "micro_batch_size": m.micro_batch_size,
        "global_batch_size": m.global_batch_size,
        "rampup_batch_size": None,
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": vp,
        "context_parallel_size": m.context_parallel_size,
        "sequence_parallel": m.sequence_parallel,
        # architecture
        "encoder_seq_length": m.seq_length,
        "max_position_embeddings": m.seq_length,
        "num_layers": m.num_layers,
        "hidden_size": m.hidden_size,
        "ffn_hidden_size": m.ffn_hidden_size,
        "num_attention_heads": m.num_attention_heads,
        "num_query_groups": m.num_query_groups,
        "kv_channels": None,
        "init_method_std": m.init_method_std,
        "use_scaled_init_method": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "ffn_dropout": 0.0,
        "apply_query_key_layer_scaling": False,  # NVIDIA's true is without effect in bf16 (NeMo turns it off)
        "normalization": "rmsnorm",
        "layernorm_epsilon": m.layernorm_epsilon,
        "do_layer_norm_weight_decay": False,
        "make_vocab_size_divisible_by": m.make_vocab_size_divisible_by,
        "pre_process": True,
        "post_process": True,
        "persist_layer_norm": m.persist_layer_norm,
        "bias": False,
        "activation": "fast-swiglu",
        "headscale": False,
        "transformer_block_type": "pre_ln",
        "openai_gelu": False,
        "normalize_attention_scores": True,
        "position_embedding_type": "rope",
        "rotary_percentage": 1.0,
        "rotary_base": m.rotary_base,
        "scale_positional_embedding": True,  # Llama 3.1's
        "attention_type": "multihead",
        "share_embeddings_and_output_weights": False,
        **_tokenizer(cfg),
        # precision
        "native_amp_init_scale": 4294967296,
        "native_amp_growth_interval": 1000,
        "hysteresis": 2,
        "fp32_residual_connection": False,
        "fp16_lm_cross_entropy": False,
        "megatron_amp_O2": half,
        "fp8": p.fp8 is not None,
        "fp8_e4m3": p.fp8 == "e4m3",
        "fp8_hybrid": p.fp8 == "hybrid",
        "fp8_margin": p.fp8_margin,
        "fp8_interval": 1,
        "fp8_amax_history_len": p.fp8_amax_history_len,
        "fp8_amax_compute_algo": p.fp8_amax_compute_algo,
        "fp8_params": p.fp8_param_gather,
        # fusions and overlaps
        "grad_allreduce_chunk_size_mb": 125,
        "grad_div_ar_fusion": True,
        "gradient_accumulation_fusion": accumulation_fusion,
        "cross_entropy_loss_fusion": m.cross_entropy_loss_fusion,
        "bias_activation_fusion": m.bias_activation_fusion,
        "bias_dropout_add_fusion": m.bias_dropout_fusion,
        "masked_softmax_fusion": m.masked_softmax_fusion,
        "apply_rope_fusion": m.apply_rope_fusion,
        "use_flash_attention": cuda,
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        "ub_tp_comm_overlap": tp_comm_overlap,
        "ub_tp_comm_overlap_cfg": (
            user_buffers.table(hidden_size=m.hidden_size, tensor_model_parallel_size=tp, fp8=p.fp8 is not None)
            if tp_comm_overlap
            else None
        ),
        "defer_embedding_wgrad_compute": defer_embedding_wgrad,
        "wgrad_deferral_limit": m.wgrad_deferral_limit,
        "gradient_as_bucket_view": True,
        "sync_batch_comm": False,
        # recomputation
        "activations_checkpoint_granularity": m.recompute_granularity,
        "activations_checkpoint_method": m.recompute_method,
        "activations_checkpoint_num_layers": m.recompute_num_layers,
        "num_micro_batches_with_partial_activation_checkpoints": None,
        "activations_checkpoint_layers_per_pipeline": None,
        # the rest
        "seed": cfg.trainer.seed,
        "resume_from_checkpoint": None,
        "use_cpu_initialization": not cuda,
        "onnx_safe": False,
        "apex_transformer_log_level": 30,
        "deterministic_mode": False,
        "gc_interval": cfg.trainer.gc_interval,
        "nsys_profile": _nsys_profile(cfg.profile),
    }


def _tokenizer(cfg: TrainConfig) -> dict[str, Any]:
    if cfg.data.kind == "mock":
        # Random tokens need but a vocabulary size and an end-of-document id: no files, no network. The recipe's 405B
        # had GPT-2's tokenizer in its place.
        return {"tokenizer": {"library": "byte-level", "type": None}, "override_vocab_size": cfg.padded_vocab_size}
    return {"tokenizer": {"library": "huggingface", "type": cfg.data.tokenizer, "use_fast": True}}


def _optim(cfg: TrainConfig) -> dict[str, Any]:
    o = cfg.model.optim
    schedule = {
        "name": "CosineAnnealing",
        "warmup_steps": o.warmup_steps,
        "constant_steps": 0,
        "min_lr": o.min_lr,
    }
    adam = {"lr": o.lr, "weight_decay": o.weight_decay, "betas": [o.adam_beta1, o.adam_beta2], "eps": o.adam_eps}
    if cfg.gpu.device != "cuda":
        # The others are Apex's; megatron-core's takes torch's Adam where there is no GPU.
        return {"name": "mcore_distributed_optim", **adam, "sched": schedule}
    if not o.use_distributed_optimizer:
        return {"name": "fused_adam", **adam, "sched": schedule}
    return {
        "name": "distributed_fused_adam",
        **adam,
        "bucket_cap_mb": 125,
        "overlap_grad_sync": o.overlap_grad_reduce,
        "overlap_param_sync": o.overlap_param_gather,
        "contiguous_grad_buffer": True,
        "contiguous_param_buffer": True,
        "grad_sync_dtype": "fp32" if o.grad_reduce_in_fp32 else "bf16",
        "sched": schedule,
    }


def _data(cfg: TrainConfig, run_dir: Path) -> dict[str, Any]:
    data = cfg.data
    weights = data.weights or [1 / len(data.paths) for _ in data.paths]
    # Where Megatron keeps its sample order: the recipe's place, or, of a dataset that may be built anew at its path,
    # one that no other run finds.
    kept = {"megatron": Path(cfg.stage_path) / "index_mapping", "local": run_dir / "index_mapping"}
    return {
        "data_impl": "mock" if data.kind == "mock" else "mmap",
        "splits_string": data.split,
        "seq_length": cfg.model.seq_length,
        "skip_warmup": True,
        "num_workers": data.num_workers,
        "dataloader_type": "single",
        "reset_position_ids": False,
        "reset_attention_mask": False,
        "eod_mask_loss": False,
        "index_mapping_dir": str(kept[data.kind]) if data.kind in kept else None,
        "data_prefix": [item for pair in zip(weights, data.paths) for item in pair],
    }


def yaml_text(cfg: TrainConfig, run_dir: Path) -> str:
    """`nemo_24_09.yaml`, which Hydra reads back as `configuration`."""
    import yaml

    head = f"# Written by NeMo Bench for {cfg.entrypoint.program}; OmegaConf's grammar.\n"
    content = _escaped(configuration(cfg, run_dir))
    return head + str(yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=10_000))


def _escaped(value: Any) -> Any:
    """The value with every text made one that OmegaConf takes as it is, and not for an interpolation."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def overrides(cfg: TrainConfig, run_dir: Path) -> list[str]:
    """Hydra overrides, one an argument, in Hydra's grammar: any path survives it."""
    content = configuration(cfg, run_dir)
    result = []
    for key in _ON_THE_COMMAND_LINE:
        value: Any = content
        for part in key.split("."):
            value = value[part]
        result.append(f"{key}={_in_grammar(_escaped(value))}")
    return result


def _in_grammar(value: Any) -> str:
    from hydra.core.override_parser.types import Quote, QuotedString

    if isinstance(value, list):
        return f"[{','.join(map(_in_grammar, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    # Double quotes: the shell's stand around them.
    return str(QuotedString(value, Quote.double).with_quotes() if isinstance(value, str) else value)


def command(cfg: TrainConfig, run_dir: Path, python: str) -> list[str]:
    """The program's command line; every rank's is the same."""
    program = cfg.entrypoint.program
    assert program is not None
    # On a CPU through a module of ours that answers for the missing GPU.
    start = [program] if cfg.gpu.device == "cuda" else ["-m", "nemo_bench.training.nemo_1_on_cpu", program]
    arguments = [f"--config-path={run_dir}", f"--config-name={CONFIG_FILE}", *overrides(cfg, run_dir)]
    return [python, "-u", *start, *arguments]
