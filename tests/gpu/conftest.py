"""Training runs on this machine's GPUs, all started once for the whole session.

NeMo is imported once, and ranks are forked from there (benchmarks/fork_server.py): its imports would take longer than
all these runs together.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_speed
from benchmarks.fork_server import ForkServer
from nemo_bench.checks.machine import count_gpus
from nemo_bench.cli import quoted_path
from nemo_bench.record import folder as record


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if count_gpus() == 0:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


# A Llama with heads of 128 as the published sizes have, and layers enough for two interleaved stages on two GPUs.
SMALL = (
    "cluster=local gpu=h200 model=tiny data=local trainer.limit_val_batches=0 trainer.gc_interval=100 "
    "model.name=small model.hidden_size=1024 model.ffn_hidden_size=3584 model.num_attention_heads=8 "
    "model.num_query_groups=4 model.seq_length=1024 model.vocab_size=2048 model.init_method_std=0.02 "
    "model.micro_batch_size=1 model.global_batch_size=8 model.optim.lr=1e-3 model.optim.min_lr=1e-4"
)
# Weights that take a while to be copied
LARGE = "model.hidden_size=8192 model.ffn_hidden_size=28672 model.num_attention_heads=64 model.num_query_groups=8"
STARTS = ("start_1", "start_2", "start_3")
TP, SP = "model.tensor_model_parallel_size", "model.sequence_parallel=true"
PP, VP = "model.pipeline_model_parallel_size", "model.virtual_pipeline_model_parallel_size"
CP = "model.context_parallel_size"
LAYOUTS = {
    "dp2": (2, ""),
    "tp2": (2, f"{TP}=2"),
    "tp2_sp": (2, f"{TP}=2 {SP}"),
    "pp2": (2, f"{PP}=2"),
    "pp2_vp2": (2, f"{PP}=2 {VP}=2"),
    "cp2": (2, f"{CP}=2"),
    "pp2_dp2": (4, f"{PP}=2"),
    "pp2_cp2": (4, f"{PP}=2 {CP}=2"),
    "tp2_sp_dp2": (4, f"{TP}=2 {SP}"),
    "tp2_sp_cp2": (4, f"{TP}=2 {SP} {CP}=2"),
    "tp2_sp_pp2_vp2": (4, f"{TP}=2 {SP} {PP}=2 {VP}=2"),
    "tp4_sp": (4, f"{TP}=4 {SP}"),
    "dp4": (4, ""),
}
RECIPES = {
    "fp8_delayed": "precision=fp8",
    "fp8_delayed_bf16_params": "precision=fp8 precision.fp8_param_gather=false",
    "fp8_tensorwise": "precision=fp8 precision.fp8_recipe=tensorwise",
    "fp8_tensorwise_bf16_ends": "precision=fp8 precision.fp8_recipe=tensorwise precision.first_last_layers_bf16=true",
    "fp8_blockwise": "precision=fp8 precision.fp8_recipe=blockwise",
}
OPTIONS = {
    "recompute_selective": "model.recompute_granularity=selective",
    "recompute_full": "model.recompute_granularity=full model.recompute_method=uniform model.recompute_num_layers=1",
    "op_fuser": "model.use_transformer_engine_op_fuser=true",
    "fused_qkv_rope": "model.fused_single_qkv_rope=true",
    "no_accumulation_fusion": "model.gradient_accumulation_fusion=false",
    "native_cross_entropy": "model.cross_entropy_fusion_impl=native",
    "fp32_gradients": "model.optim.grad_reduce_in_fp32=true",
    "plain_optimizer": "model.optim.use_precision_aware_optimizer=false",
    "param_remainders": "model.optim.store_param_remainders=true",
    "bf16_moments": "model.optim.exp_avg_dtype=bf16 model.optim.exp_avg_sq_dtype=bf16",
    "cuda_graph": "model.cuda_graph_impl=local",
    "cuda_graph_of_a_step": "model.cuda_graph_impl=local model.cuda_graph_scope=full_iteration",
    "offloading": "model.cpu_offloading_num_layers=2",
}


@dataclass(frozen=True)
class Trained:
    """What a case left: its run folder and, when it completed, its steps."""

    run_dir: Path
    error: str | None

    @property
    def steps(self) -> list[dict[str, Any]]:
        assert self.error is None, self.error
        return record.read_lines(self.run_dir / record.STEPS)[0]

    def of(self, key: str) -> list[float]:
        return [float(step[key]) for step in self.steps]


def compose(cases: dict[str, str], stage: Path, *more: str) -> list[gpu_speed.Case]:
    return [gpu_speed.compose(name, [*SMALL.split(), *case.split(), *more], stage) for name, case in cases.items()]


def train_all(stage: Path, gpus: int, server: ForkServer) -> dict[str, Trained]:
    """Train every run of the tests, as many side by side as there are GPUs for."""
    trained: dict[str, Trained] = {}

    def done(case: gpu_speed.Case, numbers: dict[str, Any]) -> None:
        # A run too short for a measurement has its steps all the same.
        error = None if case.run.status().state == "completed" else "\n".join(numbers["failed"])
        trained[case.name] = Trained(case.run.path, error)

    def run(cases: dict[str, str], *more: str) -> None:
        gpu_speed.run_all(server, compose(cases, stage, *more), gpus, 120, done)

    run(
        {
            "whole": "scale=1gpu trainer.max_steps=16 checkpoint.every_n_steps=8",
            "long_bf16": "scale=1gpu trainer.max_steps=60",
            "long_fp8": "scale=1gpu trainer.max_steps=60 precision=fp8",
            "profiled": "scale=1gpu trainer.max_steps=8 profile=torch profile.start_step=4 profile.end_step=5",
            **{name: f"scale=1gpu data=mock trainer.max_steps=2 {LARGE}" for name in STARTS},
        }
    )
    start = quoted_path(trained["whole"].run_dir / record.CHECKPOINTS / "step=7")
    if trained["whole"].error is not None:
        return trained
    run(
        {
            "one_gpu": "scale=1gpu",
            **{name: f"scale=1gpu {overrides}" for name, overrides in (RECIPES | OPTIONS).items()},
            **{name: f"scale={n}gpu {overrides}" for name, (n, overrides) in LAYOUTS.items() if n <= gpus},
        },
        "trainer.max_steps=8",
        # Small steps: large ones drive any two runs apart, whatever their number formats.
        *("model.optim.lr=1e-4", "model.optim.min_lr=1e-5"),
        f"checkpoint.weights_from={start}",
    )
    resumed = {"resumed": "scale=1gpu trainer.max_steps=16"}
    if gpus > 1:  # saved by one GPU, continued by two
        resumed["resumed_tp2"] = "scale=2gpu trainer.max_steps=16 model.tensor_model_parallel_size=2"
    run(resumed, f"checkpoint.resume_from={start}")
    return trained


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    os.environ.pop("PYTORCH_CUDA_ALLOC_CONF", None)  # expandable segments, say: no CUDA graphs with them
    stage = tmp_path_factory.mktemp("stage")
    with gpu_speed.fork_server(*compose({"one_gpu": "scale=1gpu"}, stage)) as server:
        return train_all(stage, count_gpus(), server)
