"""Prints the order in which megatron-core's own 1F1B schedule calls forward and backward passes, as JSON.

Arguments: pipelines as PPxVPxM (stages, chunks a stage, micro-batches). The schedule's function runs on the CPU, once a
stage; what computes and what communicates is replaced.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel import schedules


class Peers:
    """Stands for the communication between stages: whatever is received is there at once."""

    def __init__(self, stages: int, chunks: int, stage: int, config: Any) -> None:
        self.pp_group = SimpleNamespace(size=lambda: stages, rank=lambda: stage)
        self.virtual_pipeline_model_parallel_size = chunks if chunks > 1 else None
        self.config = config

    def __getattr__(self, name: str) -> Any:
        both = name in ("send_forward_backward_recv_forward_backward",)
        return lambda *args, **kwargs: ("input", "gradient") if both else "received"


def order(stages: int, chunks: int, micro_batches: int, stage: int) -> list[tuple[bool, int, int]]:
    calls: list[tuple[bool, int, int]] = []

    def forward_step(*args: Any, current_microbatch: int, vp_stage: int = 0, **kwargs: Any) -> Any:
        calls.append((True, vp_stage or 0, current_microbatch))
        return (vp_stage or 0, current_microbatch), torch.zeros([], dtype=torch.int)

    def backward_step(input_tensor: Any, output_tensor: Any, *args: Any) -> str:
        calls.append((False, *output_tensor))
        return "gradient"

    config = ModelParallelConfig(pipeline_model_parallel_size=stages, pipeline_dtype=torch.float32)
    config.hidden_size, config.timers = 8, None
    config.virtual_pipeline_model_parallel_size = chunks if chunks > 1 else None
    config.microbatch_group_size_per_vp_stage = stages
    config.deallocate_pipeline_outputs = False
    schedules.forward_step, schedules.backward_step = forward_step, backward_step
    one = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    groups = SimpleNamespace(tp=one, cp=one, embd=None, pos_embd=None, dp_cp=one)
    peers = Peers(stages, chunks, stage, config)
    groups.pp = peers.pp_group
    models = []
    for _ in range(chunks):
        model = torch.nn.Linear(1, 1)
        model.config, model.model_type = config, None
        models.append(model)
    interleaved = chunks > 1
    run = getattr(schedules, f"forward_backward_pipelining_with{'' if interleaved else 'out'}_interleaving")
    run(
        forward_step_func=None,
        data_iterator=[None] * chunks if interleaved else None,
        model=models if interleaved else models[0],
        num_microbatches=micro_batches,
        seq_length=8,
        micro_batch_size=1,
        p2p_communicator=peers,
        pg_collection=groups,
    )
    return calls


zeros = torch.zeros
torch.zeros = lambda *args, **kwargs: zeros(*args, **{key: kwargs[key] for key in kwargs if key != "device"})
schedules.is_pp_first_stage = lambda group: group.rank() == 0
schedules.is_pp_last_stage = lambda group: group.rank() == group.size() - 1
traced = {}
for name in sys.argv[1:]:
    stages, chunks, micro_batches = map(int, name.split("x"))
    traced[name] = [order(stages, chunks, micro_batches, stage) for stage in range(stages)]
print(json.dumps(traced))
