"""What a point is, in words: its plan for `launch=dry`, and the folder of its results."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

from nemo_bench.checks.configuration import fused_attention_fits
from nemo_bench.checks.datasets import dataset_remarks
from nemo_bench.cluster import nsys
from nemo_bench.config import TrainConfig
from nemo_bench.entrypoints import entrypoint_of
from nemo_bench.errors import Problem
from nemo_bench.flops import pipeline_bubble
from nemo_bench.memory import GIB, estimate_memory


def results_dir(cfg: TrainConfig) -> Path:
    """Return `<stage>/results/<version>/<precision>/<model>/<gpus>`, the recipe's layout."""
    results = Path(cfg.stage_path) / "results" / cfg.results_version
    return results / cfg.precision.name / cfg.model.name / str(cfg.world_size)


def plan(cfg: TrainConfig, missing: Iterable[Problem] = ()) -> str:
    """Return what a point is: layout, batch, work, memory, where its results go, and what is missing to run it."""
    m = cfg.model
    per_sequence = cfg.architecture.flops_per_sequence(m.seq_length)
    virtual = m.virtual_pipeline_model_parallel_size or 1
    stages = m.pipeline_model_parallel_size
    share = pipeline_bubble(pipeline_stages=stages, virtual_stages=virtual, micro_batches=cfg.num_micro_batches)
    layout = f"VP{virtual} CP{m.context_parallel_size} DP{cfg.data_parallel_size}"
    layout += " SP" if m.sequence_parallel and m.tensor_model_parallel_size > 1 else ""
    layout += f": {share:.1%} of a step is pipeline bubble, if all stages have equal work" if share else ""
    lines = [
        f"Llama 3.1 {m.name} ({cfg.architecture.num_parameters / 1e9:.3g}B parameters), {cfg.precision.name}, "
        f"{cfg.world_size} x {cfg.gpu.name} ({cfg.trainer.num_nodes} nodes x {cfg.trainer.devices}): "
        "the configuration's checks passed",
        f"  layout     TP{m.tensor_model_parallel_size} PP{m.pipeline_model_parallel_size} {layout}",
        *_attention(cfg),
        f"  batch      MBS {m.micro_batch_size}, GBS {m.global_batch_size}, GA {cfg.num_micro_batches}, "
        f"sequence {m.seq_length}: {m.seq_length * m.global_batch_size:,} tokens a step",
        f"  work       {per_sequence:.4g} FLOPs a sequence, {per_sequence * m.global_batch_size:.4g} a step "
        "(the recipe's convention)",
        f"  steps      {cfg.trainer.max_steps}",
        f"  data       {cfg.data.name}: {', '.join(cfg.data.paths) or cfg.data.folder or 'random tokens'}",
        *(f"             {text}" for text in dataset_remarks(tuple(cfg.data.paths), cfg.data.tokenizer or "")),
        *_memory(cfg),
        *_profile(cfg),
        f"  results    {results_dir(cfg)}/<run>/",
    ]
    if missing:
        lines += ["missing, which a run would need:", *(f"  {problem}" for problem in missing)]
    return "\n".join(lines)


def _attention(cfg: TrainConfig) -> list[str]:
    if cfg.model.attention_backend != "auto" or fused_attention_fits(cfg):
        return []
    head = cfg.model.hidden_size / cfg.model.num_attention_heads
    return [f"  attention  auto falls back to unfused, which is slow: no other kernel takes heads of {head:g}"]


def _memory(cfg: TrainConfig) -> list[str]:
    if cfg.gpu.device == "cpu" or not entrypoint_of(cfg).memory_is_estimated:
        return []
    needed_gib, gpu_gib = estimate_memory(cfg).total_bytes / GIB, cfg.gpu.memory_gib
    line = f"  memory     about {needed_gib:.0f} GiB a GPU, by an estimate"
    if gpu_gib is not None:
        line += f"; {cfg.gpu.name} has {gpu_gib:g}{': this does not fit' if needed_gib > gpu_gib else ''}"
    return [line]


def _profile(cfg: TrainConfig) -> list[str]:
    p = cfg.profile
    if p.kind == "none":
        return []
    where = f"steps {p.start_step} to {p.end_step} of ranks {', '.join(map(str, p.ranks))}, to <run>/profile/"
    lines = [f"  profile    {p.kind}: {where}; these and the steps next to them do not count"]
    if p.kind == "nsys":
        command = nsys.command(p, Path("<run>"), p.ranks[0])
        lines.append(f"             around the rank's command: {shlex.join(command)}")
    return lines


def rank_plan(cfg: TrainConfig) -> str:
    """Return what each rank would run on this machine: its command, its environment, and the files it reads."""
    entrypoint, run_dir = entrypoint_of(cfg), results_dir(cfg) / "<run>"
    environment = (f"{name}={shlex.quote(value)}" for name, value in entrypoint.environment(cfg).items())
    command = shlex.join(entrypoint.rank_command(cfg, run_dir, sys.executable))
    return "\n".join([f"  each rank  {command}", f"             {' '.join(environment)}", *files_plan(cfg)])


def files_plan(cfg: TrainConfig) -> list[str]:
    """Return the files that the ranks would read besides the configuration, each with its place."""
    files = entrypoint_of(cfg).files(cfg, results_dir(cfg) / "<run>")
    return [f"# {path}\n{text}" for path, text in files.items()]
