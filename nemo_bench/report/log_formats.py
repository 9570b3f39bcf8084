"""How the programs that people train with write a step: a table for each family of them.

NeMo 1 (24.09) draws a progress bar with carriage returns, shows three digits, and lists all times at the end::

    Epoch 0: : 100%|...| 100/100 [20:15<00:00, reduced_train_loss=6.370, global_step=99.00, consumed_samples=12800.0,
    train_step_timing in s=11.20]

NeMo 2 prints a line a step::

    Training epoch 0, iteration 49/49 | lr: 0.0003 | global_batch_size: 8 | global_step: 49 |
    reduced_train_loss: 2.63 | train_step_timing in s: 0.3569 | consumed_samples: 400

Megatron-LM and Megatron-Bridge print a line a step on the last rank, and Bridge another one on rank 0::

    Step Time : 1.42s GPU utilization: 0.0MODEL_TFLOP/s/GPU
     [2026-11-28 09:22:22] iteration        1/      20 | consumed samples:           32 | elapsed time per iteration
    (ms): 1419.8 | learning rate: 1.000000E-03 | global batch size:    32 | lm loss: 6.340332E+00 | grad norm: 3.094 |
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

_NUMBER = r"[+-]?(?:\d+\.?\d*(?:[eE][+-]?\d+)?|nan|inf)"


@dataclass(frozen=True)
class Format:
    """How one family of programs writes a step."""

    mark: bytes  # stands in every line of a step
    start: re.Pattern[str]  # where a step begins in a line, with its progress (done, total) as far as printed there
    names: dict[str, str]  # the log's name of a field -> ours
    counts_done: bool  # its progress counts finished steps, and so does its step number
    times_in_a_second: int  # unit of its step times: 1000 for milliseconds

    @cached_property
    def field(self) -> re.Pattern[str]:
        """A name and its number, whole: what cannot follow a number would be another line's rest."""
        return re.compile(rf"\b({'|'.join(map(re.escape, self.names))}) *[:=] *({_NUMBER})(?=[\s,|\]\"\\}}]|$)")


NEMO = Format(
    mark=b"train_step_timing in s",
    start=re.compile(r"Training epoch \d+, iteration (\d{1,12})/(\d{1,12})|Epoch \d+: *:?"),
    names={
        "train_step_timing in s": "time",
        "global_step": "step",
        "reduced_train_loss": "loss",
        "grad_norm": "grad_norm",
        "global_batch_size": "batch",
        "consumed_samples": "samples",
        "max_memory_allocated": "memory_bytes",
        "peak_memory_usage": "memory_bytes",
        "tokens_per_sec_per_gpu": "tokens_per_s_per_gpu",
        "TFLOPS_per_GPU": "tflops_per_gpu",
    },
    counts_done=False,
    times_in_a_second=1,
)
MEGATRON = Format(
    mark=b"elapsed time per iteration (ms)",
    start=re.compile(r"iteration +(\d{1,12})/ *(\d{1,12}) *\|"),
    names={
        "elapsed time per iteration (ms)": "time",
        "lm loss": "loss",
        "grad norm": "grad_norm",
        "global batch size": "batch",
        "consumed samples": "samples",
        "throughput per GPU (TFLOP/s/GPU)": "tflops_per_gpu",
        "number of skipped iterations": "skipped",
        "number of nan iterations": "nan_steps",
    },
    counts_done=True,
    times_in_a_second=1000,
)
FORMATS = (NEMO, MEGATRON)
# Megatron-Bridge's other line of a step, on rank 0
BRIDGE = b"MODEL_TFLOP/s/GPU"
BRIDGE_STEP = re.compile(rf"Step Time : *({_NUMBER})s GPU utilization: *({_NUMBER})MODEL_TFLOP/s/GPU")
# Parts of what tells of something beside the steps
SIGNS = (b"alidation", b"heckpoint", b"nsys profiling", b"STRAGGLER DETECTION", b"Using network Socket")

ESCAPE = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\^_])")
BAR = re.compile(r"\| *(\d{1,12})/(\d{1,12}|\?) \[|\b(\d{1,12})(?:it|/\?) \[")
CHECKPOINT_SAVED = re.compile(r"checkpoint save|\bsav(?:ed|ing)\b[^|]*checkpoint", re.IGNORECASE)
# What Megatron-LM and Lightning print of a run before its first step
ARGUMENT = re.compile(
    r"\b(world_size|num_layers|hidden_size|ffn_hidden_size|num_attention_heads|num_query_groups|padded_vocab_size"
    r"|seq_length|fp8) \.{3,} (\w+)"
)
PROCESSES = re.compile(r"Starting with (\d{1,7}) processes")
# As nvidia-smi lists them, or a line of its own
GPU = re.compile(
    r"(?:^|GPU \d+: |\|\s+\d+\s+)(NVIDIA [A-Z]{1,2}\d{1,3}(?:[ -]\w+){0,3})(?: \(UUID|\s{2,}|$)", re.MULTILINE
)
# "3: ", "[rank3]: ", torchrun's "[default3]:", and NeMo-Run's "llama/0 [default3]:" with the node's number before it
LABEL = re.compile(
    r"\s*(?:\S*/(?P<node>\d{1,6}) +)?(?:(\d{1,6}):\s|\[?rank[ :]?(\d{1,6})\]?:|\[default(\d{1,6})\]:)\s*"
    r"(?:\[[\d :.-]+\]\s*)?$"
)
ALL_TIMES = re.compile(rf"train_step_timing in s: \[({_NUMBER}(?:, {_NUMBER})*)\]")
STRAGGLER = re.compile(r"StragglerId\(rank=(\d{1,6})\b")
REACHED = re.compile(r"`?Trainer\.fit`? stopped: `?max_(steps|epochs)=(\d{1,12})`? reached|\[after training is done\]")
ERROR = re.compile(
    r"^(?!.*Warning).*(?:CANCELLED|DUE TO|Killed|OutOfMemory|[A-Za-z]Error\b|srun: error|Segmentation fault).*$", re.M
)
OTHER_FRAMEWORKS = {
    "Hugging Face Trainer": re.compile(r"\{'loss': [\d.]+, .*'epoch': "),
    "torchtitan": re.compile(r"\bstep: +\d+ .*\bloss: +[\d.]+ .*\btps: "),
    "DeepSpeed": re.compile(r"\bsteps: \d+ loss: [\d.]+ iter time \(s\): "),
    "MaxText": re.compile(r"completed step: \d+, seconds: [\d.]+, TFLOP/s/device: "),
}
