"""`entrypoint=nemo_24_09`: the program that the published tables were measured with, NeMo 1's
`megatron_gpt_pretraining.py` of nvcr.io/nvidia/nemo:24.09 (NeMo 2.0.0, megatron-core 0.9.0).

It is a Hydra application. The run folder gets its whole configuration, `nemo_24_09.yaml`, made from the file of that
name next to this one, with conf/recipe/ for what differs between models; the command line repeats what the recipe gave
there: places, scale, number format. docs/recipe.md says what differs from the recipe, and why.
"""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import OmegaConf

from nemo_bench.cluster import nsys
from nemo_bench.config import TrainConfig
from nemo_bench.entrypoints import Entrypoint
from nemo_bench.errors import Need, Problem, text_of, value_of
from nemo_bench.project import PROJECT

NAME = "nemo_24_09"
CONFIG_FILE = f"{NAME}.yaml"
# megatron-core 0.9's MockGPTDataset makes up token ids below this, whatever the vocabulary.
MOCK_TOKEN_IDS = 4096
TEMPLATE = Path(__file__).with_suffix(".yaml")
USER_BUFFERS = Path(__file__).with_name("user_buffers.yaml")
LAUNCHERS_FP8 = "launcher_fp8"  # a choice of model.tp_comm_overlap_cfg

# NVTE_FLASH_ATTN and NVTE_FUSED_ATTN. In 24.09 these variables choose, and megatron-core does not touch them.
_ATTENTION = {"fused": ("0", "1"), "flash": ("1", "0"), "unfused": ("0", "0")}

# What the recipe passed on the command line; dotted keys of NeMo's configuration.
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


class Nemo2409(Entrypoint):
    """`megatron_gpt_pretraining.py`, inside its container or, on a CPU, behind a module that answers for the GPU."""

    memory_is_estimated = False

    def problems(self, cfg: TrainConfig) -> list[Problem]:
        need, here, m = Need(cfg), f"(entrypoint={NAME})", cfg.model
        backends = (*_ATTENTION, "auto")
        known = m.attention_backend in backends or cfg.gpu.device != "cuda"
        need(known, "model.attention_backend", f"unknown attention backend {here}", f"valid: {', '.join(backends)}")
        holds_tokens = m.vocab_size >= MOCK_TOKEN_IDS or cfg.data.kind != "mock"
        rule = f"is smaller than the token ids in NeMo's mock data {here}"
        need(holds_tokens, "model.vocab_size", rule, f"nearest that works: {MOCK_TOKEN_IDS}")
        tables = ["auto", *([LAUNCHERS_FP8] if cfg.precision.fp8 else []), None]
        rule, fix = f"unknown table of user buffers {here}", f"valid: {', '.join(map(text_of, tables))}"
        need(m.tp_comm_overlap_cfg in tables, "model.tp_comm_overlap_cfg", rule, fix)
        return need.problems

    def machine_problems(self, cfg: TrainConfig) -> list[Problem]:
        need, program = Need(cfg, missing=True), cfg.entrypoint.program
        rule = "not found on this machine: it is part of the container nvcr.io/nvidia/nemo:24.09"
        fix = (
            "cluster=slurm runs it in the container; entrypoint.program=... names it where NeMo 2.0 is installed for "
            "this Python; entrypoint=nemo2 is this project's own program"
        )
        need(program is None or Path(program).is_file(), "entrypoint.program", rule, fix)
        return need.problems

    def rank_command(self, cfg: TrainConfig, run_dir: Path, python: str) -> list[str]:
        command = [python, "-u", str(PROJECT / "nemo_bench" / "launch" / "program_rank.py"), str(run_dir)]
        # As the recipe does: in NeMo's folder, which holds the examples, and with that folder first on the import path.
        program = cfg.entrypoint.program or ""
        examples = [folder for folder in Path(program).parents if folder.name == "examples"]
        command += [f"--in={folder.parent}" for folder in examples]
        if cfg.profile.kind == "nsys":
            ranks = ",".join(map(str, cfg.profile.ranks))
            command += ["--on-ranks", ranks, *nsys.command(cfg.profile, run_dir, "{rank}"), "--"]
        start = [program] if cfg.gpu.device == "cuda" else ["-m", "nemo_bench.training.nemo_1_on_cpu", program]
        command += [python, "-u", *start, f"--config-path={run_dir}", f"--config-name={CONFIG_FILE}"]
        return command + overrides(cfg, run_dir)

    def derived_environment(self, cfg: TrainConfig) -> dict[str, str]:
        return dict(zip(("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN"), _ATTENTION.get(cfg.model.attention_backend, ())))

    def srun_options(self, cfg: TrainConfig) -> list[str]:
        # The recipe's. In 24.09 the user buffers of Transformer Engine meet through MPI.
        return ["--mpi=pmix"] if cfg.gpu.device == "cuda" else []

    def keeps_image_pythonpath(self, cfg: TrainConfig) -> bool:
        return cfg.gpu.device == "cuda"

    def files(self, cfg: TrainConfig, run_dir: Path) -> dict[Path, str]:
        return {run_dir / CONFIG_FILE: yaml_text(cfg, run_dir)}


ENTRYPOINT = Nemo2409()


def configuration(cfg: TrainConfig, run_dir: Path) -> dict[str, Any]:
    """Return NeMo 1's whole configuration as plain values, paths as they are."""
    values = _escaped({"cfg": asdict(cfg), "derived": _derived(cfg, run_dir), "run_dir": str(run_dir)})
    settings = _escaped(cfg.entrypoint.settings)
    content: Any = OmegaConf.to_container(OmegaConf.merge(OmegaConf.load(TEMPLATE), values, settings), resolve=True)
    for name in (*values, "choices"):
        del content[name]
    if cfg.data.kind != "mock":
        del content["model"]["override_vocab_size"]
    assert isinstance(content, dict)
    return content


def _derived(cfg: TrainConfig, run_dir: Path) -> dict[str, Any]:
    """Return the values of the template that are not fields of `cfg`."""
    m, p, data = cfg.model, cfg.precision, cfg.data
    cuda, bf16 = cfg.gpu.device == "cuda", p.trainer_precision in ("bf16", "bf16-mixed")
    interleaved = (m.virtual_pipeline_model_parallel_size or 1) > 1
    # The matrix product itself sums up the weight gradients: Apex's kernel, and master weights (O2).
    accumulation_fusion = cuda and bf16 and m.gradient_accumulation_fusion
    # Megatron's sample order: where the recipe keeps it; with the run, where the dataset may be built anew at its path.
    index_mapping = {"megatron": Path(cfg.stage_path) / "index_mapping", "local": run_dir / "index_mapping"}
    weights = data.weights or [1 / len(data.paths) for _ in data.paths]
    return {
        "cuda": cuda,
        "cpu": not cuda,
        "accelerator": "gpu" if cuda else "cpu",
        "limit_val_batches": cfg.trainer.limit_val_batches or 0.0,  # a whole number of batches, or the share "none"
        # So long the other ranks wait at the start. NVIDIA's 60 is meant for a shared file system.
        "seconds_to_sleep": 60 if cfg.cluster.scheduler == "slurm" else 0,
        "bf16": bf16,
        "fp8": p.fp8 is not None,
        "fp8_e4m3": p.fp8 == "e4m3",
        "fp8_hybrid": p.fp8 == "hybrid",
        "gradient_accumulation_fusion": accumulation_fusion,
        "interleaved": interleaved,
        "not_interleaved": not interleaved,
        "tp_comm_overlap": _tp_comm_overlap(cfg),
        "user_buffers": _user_buffers(cfg),
        # While its pipeline drains, the last stage catches up on the embedding's weight gradients.
        "defer_embedding_wgrad_compute": m.defer_embedding_wgrad_compute is not False
        and m.pipeline_model_parallel_size > 1
        and accumulation_fusion,
        "padded_vocab_size": cfg.padded_vocab_size,
        "tokenizer": "mock" if data.kind == "mock" else "files",
        "nsys": cfg.profile.kind == "nsys",
        "optim": ("distributed" if m.optim.use_distributed_optimizer else "fused") if cuda else "cpu",
        "grad_sync_dtype": "fp32" if m.optim.grad_reduce_in_fp32 else "bf16",
        "data_impl": "mock" if data.kind == "mock" else "mmap",
        "index_mapping_dir": str(index_mapping[data.kind]) if data.kind in index_mapping else None,
        "data_prefix": [item for pair in zip(weights, data.paths) for item in pair],
    }


def _tp_comm_overlap(cfg: TrainConfig) -> bool:
    return cfg.gpu.device == "cuda" and cfg.model.tp_comm_overlap and cfg.model.tensor_model_parallel_size > 1


def _user_buffers(cfg: TrainConfig) -> Any:
    """Return the table for these sizes; None if there is none, and Transformer Engine's defaults serve."""
    m, name = cfg.model, cfg.model.tp_comm_overlap_cfg
    if not _tp_comm_overlap(cfg) or name is None:
        return None
    tables = yaml.safe_load(USER_BUFFERS.read_text())["recipe" if name == "auto" else name]
    table = tables.get(f"h{m.hidden_size}_tp{m.tensor_model_parallel_size}")
    for layer in (table or {}).values():
        if layer.get("fp8_buf") == "precision":
            layer["fp8_buf"] = cfg.precision.fp8 is not None
    return table


def yaml_text(cfg: TrainConfig, run_dir: Path) -> str:
    """Return the text of `nemo_24_09.yaml`, which Hydra reads back as `configuration`."""
    content = _escaped(configuration(cfg, run_dir))
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=10_000)
    return f"# Written by NeMo Bench for {cfg.entrypoint.program}; OmegaConf's grammar.\n{text}"


def _escaped(value: Any) -> Any:
    """Return the value with its texts escaped, so that OmegaConf finds no interpolation in them."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def overrides(cfg: TrainConfig, run_dir: Path) -> list[str]:
    """Return Hydra overrides, one an argument, quoted so that any path survives Hydra's grammar."""
    content = configuration(cfg, run_dir)
    return [f"{key}={_in_grammar(_escaped(value_of(content, key)))}" for key in _ON_THE_COMMAND_LINE]


def _in_grammar(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_in_grammar, value))}]"
    # Double quotes: the shell's are single.
    return str(QuotedString(value, Quote.double).with_quotes()) if isinstance(value, str) else text_of(value)
