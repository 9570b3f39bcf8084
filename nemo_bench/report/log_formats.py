"""How the programs that people train with write a step, by `log_formats.yaml`, and what else their logs print."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml

from nemo_bench.report.statistics import CHECKPOINT, PROFILE, VALIDATION

_NUMBER = r"[+-]?(?:[0-9]+\.?[0-9]*(?:[eE][+-]?[0-9]+)?|[nN][aA][nN]|[iI][nN][fF])"


@dataclass(frozen=True)
class Format:
    """How one family of programs writes a step; the fields are explained in `log_formats.yaml`."""

    mark: str
    start: re.Pattern[str]
    names: dict[str, str]
    times_in_a_second: int

    @cached_property
    def field(self) -> re.Pattern[str]:
        """A name and its number, whole: what cannot follow a number would be another line's rest."""
        # A word's border (\b) in front of the names would be tried at every character, which takes half as long again.
        names = "|".join(rf"{name}(?<!\w{name})" for name in map(re.escape, self.names))
        return re.compile(rf"({names}) *[:=] *({_NUMBER})(?=[\s,|\]\"\\}}]|$)")


_TABLES = yaml.safe_load(Path(__file__).with_name("log_formats.yaml").read_text())
NEMO, MEGATRON = (Format(**table | {"start": re.compile(table["start"])}) for table in _TABLES["formats"].values())
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
OTHER_FRAMEWORKS = {name: re.compile(pattern) for name, pattern in _TABLES["other_frameworks"].items()}
