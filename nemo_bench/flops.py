"""Model FLOPs, MFU, tokens/s and time to train: pure arithmetic, each formula with its source.

Two conventions are in use for the same model, and a number without its convention means little:

* `RECIPE`: NVIDIA's Llama 3.1 70B 24.09 performance recipe counts the attention scores in full, as if every token
  saw every other. All of the recipe's published MFU figures use it.
* `CAUSAL`: Megatron-LM's `num_floating_point_operations` halves the attention core, since a causal mask leaves half
  of it undone. `RECIPE` is 7.2% more for the 70B at a sequence length of 8192.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TypedDict

SECONDS_PER_DAY = 86400


class FlopsConvention(Enum):
    """How the attention core (QK^T and AV) is counted."""

    RECIPE = "recipe"
    CAUSAL = "causal"


class Architecture(TypedDict):
    """A Llama's sizes, Megatron's names; `vocab_size` is the tokenizer's, without padding."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    vocab_size: int


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of one training step (forward and backward) for ONE sequence, with the convention they assume."""

    attention: float
    mlp: float
    embedding: float
    convention: FlopsConvention

    @property
    def total(self) -> float:
        """FLOPs a sequence."""
        return self.attention + self.mlp + self.embedding


def model_flops(
    *,
    seq_length: int,
    num_layers: int,
    hidden_size: int,
    ffn_hidden_size: int,
    num_attention_heads: int,
    num_query_groups: int,
    vocab_size: int,
    convention: FlopsConvention = FlopsConvention.RECIPE,
) -> ModelFlops:
    """FLOPs to train on one sequence of `seq_length` tokens.

    The recipe's formula, per token (its closing section; the sum is then multiplied by the sequence length)::

        attention = 12 * layers * hidden^2 * (1 + groups/heads + seq/hidden)
        mlp       = 18 * layers * ffn * hidden
        embedding =  6 * vocab * hidden

    The recipe prints "model flops = 8129 * (...)"; 8129 is a slip for 8192, with which its result of 3.94e15 comes out.
    In the causal convention `seq/hidden`, the attention core, counts half.
    """
    core = seq_length / hidden_size
    if convention is FlopsConvention.CAUSAL:
        core /= 2
    attention = 12 * num_layers * hidden_size**2 * (1 + num_query_groups / num_attention_heads + core)
    mlp = 18 * num_layers * ffn_hidden_size * hidden_size
    embedding = 6 * vocab_size * hidden_size
    return ModelFlops(seq_length * attention, seq_length * mlp, seq_length * embedding, convention)


def num_parameters(
    *,
    num_layers: int,
    hidden_size: int,
    ffn_hidden_size: int,
    num_attention_heads: int,
    num_query_groups: int,
    vocab_size: int,
) -> int:
    """Parameters of a Llama 3.1 with untied embeddings: 8,030,261,248 for the 8B, 70,553,706,496 for the 70B."""
    attention = hidden_size * hidden_size * (2 + 2 * num_query_groups / num_attention_heads)
    mlp = 3 * hidden_size * ffn_hidden_size
    norms = 2 * hidden_size
    return int(num_layers * (attention + mlp + norms) + 2 * vocab_size * hidden_size + hidden_size)


def tokens_per_second(*, seq_length: int, global_batch_size: int, step_time_s: float) -> float:
    """Throughput of the whole job in tokens/s (recipe: sequence length * global batch size / step time)."""
    return seq_length * global_batch_size / step_time_s


def days_to_train(*, tokens: float, tokens_per_s: float) -> float:
    """Days to train on `tokens` tokens (recipe: total tokens / throughput / 86400)."""
    return tokens / tokens_per_s / SECONDS_PER_DAY


def pipeline_bubble(*, pipeline_stages: int, virtual_stages: int, micro_batches: int) -> float:
    """The share of a step in which a pipeline stage waits for its first and behind its last micro-batch.

    `virtual_stages` chunks of layers a stage; `micro_batches` of a step for each copy of the model. The bubble lasts
    (p - 1) / v micro-batches' work of a stage, for m micro-batches of it; stages of unequal work lose more. Source:
    Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", 2.2.
    """
    waiting = (pipeline_stages - 1) / virtual_stages
    return waiting / (micro_batches + waiting)


def tflops_per_gpu(*, global_batch_size: int, flops_per_sequence: float, step_time_s: float, num_gpus: int) -> float:
    """Model TFLOP/s that each GPU achieved."""
    return global_batch_size * flops_per_sequence / step_time_s / num_gpus / 1e12


def mfu(
    *,
    global_batch_size: int,
    flops_per_sequence: float,
    step_time_s: float,
    num_gpus: int,
    peak_tflops: float,
) -> float:
    """Model FLOPs utilization as a fraction of the peak of one GPU (`peak_tflops`, dense, in TFLOP/s).

    Recipe: global batch size * model flops / step time / number of GPUs / peak GPU FLOPS.
    """
    achieved = tflops_per_gpu(
        global_batch_size=global_batch_size,
        flops_per_sequence=flops_per_sequence,
        step_time_s=step_time_s,
        num_gpus=num_gpus,
    )
    return achieved / peak_tflops
