"""How the programs that people train with write a step, a table for each family, and what else their logs print."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from nemo_bench.report.statistics import CHECKPOINT, PROFILE, VALIDATION

_NUMBER = r"[+-]?(?:[0-9]+\.?[0-9]*(?:[eE][+-]?[0-9]+)?|[nN][aA][nN]|[iI][nN][fF])"


@dataclass(frozen=True)
class Format:
    """How one family of programs writes a step."""

    mark: str  # stands in every line of a step
    start: re.Pattern[str]  # where a step begins in a line; groups: its iteration, and of how many
    names: dict[str, str]  # the log's name of a field -> ours
    times_in_a_second: int  # unit of its step times: 1000 for milliseconds

    @cached_property
    def field(self) -> re.Pattern[str]:
        """A name and its number, whole: what cannot follow a number would be another line's rest."""
        # A word's border (\b) in front of the names would be tried at every character, which takes half as long again.
        names = "|".join(rf"{name}(?<!\w{name})" for name in map(re.escape, self.names))
        return re.compile(rf"({names}) *[:=] *({_NUMBER})(?=[\s,|\]\"\\}}]|$)")


# NeMo 1 (24.09) draws a bar with carriage returns, and rounds to three digits; NeMo 2 prints a line:
#   Epoch 0: : 100%|..| 100/100 [20:15<00:00, reduced_train_loss=6.37, global_step=99.00, train_step_timing in s=11.20]
#   Training epoch 0, iteration 49/49 | global_batch_size: 8 | global_step: 49 | train_step_timing in s: 0.3569
NEMO = Format(
    mark="train_step_timing in s",
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
    times_in_a_second=1,
)
# Megatron-LM and Megatron-Bridge, on the last rank; steps count from 1:
#   iteration        1/      20 | consumed samples:           32 | elapsed time per iteration (ms): 1419.8 | ...
MEGATRON = Format(
    mark="elapsed time per iteration (ms)",
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
    times_in_a_second=1000,
)
# Megatron-Bridge's other line of a step, on rank 0
BRIDGE_STEP = re.compile(rf"Step Time : *({_NUMBER})s GPU utilization: *({_NUMBER})MODEL_TFLOP/s/GPU")
# All times of a run, in NeMo 1's last line
ALL_TIMES = re.compile(rf"train_step_timing in s: \[({_NUMBER}(?:, {_NUMBER})*)\]")

ESCAPE = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\^_])")
# A progress bar's count of finished steps, and of how many
BAR = re.compile(r"\| *(\d{1,12})/(\d{1,12}|\?) \[|\b(\d{1,12})(?:it|/\?) \[")
# "3: ", "[rank3]: ", torchrun's "[default3]:", and NeMo-Run's "llama/0 [default3]:" with the node's number before it
LABEL = re.compile(
    r"\s*(?:\S*/(?P<node>\d{1,6}) +)?(?:(\d{1,6}):\s|\[?rank[ :]?(\d{1,6})\]?:|\[default(\d{1,6})\]:)\s*"
    r"(?:\[[\d :.-]+\]\s*)?$"
)
# What the step after such a line feels
DISTURBANCES = {
    CHECKPOINT: re.compile(r"(?i)checkpoint save|\bsav(?:ed|ing)\b[^|]*checkpoint"),
    VALIDATION: re.compile(r"Validation|validation loss at"),
    PROFILE: re.compile(r"(?:Start|End) nsys profiling"),
}

# What Megatron-LM and Lightning print of a run, and GPUs as nvidia-smi lists them, or on lines of their own
ABOUT = (" ...", "Starting with ", "NVIDIA ")
# Parts of lines that tell of something beside the steps
SIGNS = (*ABOUT, "MODEL_TFLOP/s/GPU", "alidation", "heckpoint", "nsys profiling", "Using network Socket")
ARGUMENT = re.compile(
    r"\b(world_size|num_layers|hidden_size|ffn_hidden_size|num_attention_heads|num_query_groups|padded_vocab_size"
    r"|seq_length|fp8) \.{3,} (\w+)"
)
PROCESSES = re.compile(r"Starting with (\d{1,7}) processes")
GPU = re.compile(
    r"(?:^|GPU \d+: |\|\s+\d+\s+)(NVIDIA [A-Z]{1,2}\d{1,3}(?:[ -]\w+){0,3})(?: \(UUID|\s{2,}|$)", re.MULTILINE
)
# After the last step
REACHED = re.compile(r"`?Trainer\.fit`? stopped: `?max_(steps|epochs)=(\d{1,12})`? reached|\[after training is done\]")
ERROR = re.compile(
    r"^(?!.*Warning).*(?:CANCELLED|DUE TO|Killed|OutOfMemory|[A-Za-z]Error\b|srun: error|Segmentation fault).*$", re.M
)
OTHER_FRAMEWORKS = {
    "Hugging Face Trainer": re.compile(r"\{'loss': [\d.]+, .*'epoch': "),
    "torchtitan": re.compile(r"\bstep: +\d+ .*\bloss: +[\d.]+ .*\btps: "),
}
