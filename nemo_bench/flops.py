"""Model FLOPs, tokens/s and time to train: pure arithmetic, each formula with its source."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """The sizes of a Llama, by Megatron's names; `vocab_size` is the tokenizer's, without padding."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    vocab_size: int

    @property
    def num_parameters(self) -> int:
        """Parameters with untied embeddings: 8,030,261,248 for the 8B, 70,553,706,496 for the 70B."""
        attention = self.hidden_size**2 * (2 + 2 * self.num_query_groups / self.num_attention_heads)
        mlp, norms = 3 * self.hidden_size * self.ffn_hidden_size, 2 * self.hidden_size
        embeddings = 2 * self.vocab_size * self.hidden_size
        return int(self.num_layers * (attention + mlp + norms) + embeddings + self.hidden_size)

    def flops_per_sequence(self, seq_length: int, *, causal: bool = False) -> float:
        """Return the FLOPs of one training step (forward and backward) for one sequence of `seq_length` tokens.

        The recipe's formula (its closing section); the 8129 that it prints is a slip for 8192, which gives its 3.94e15.
        `causal` counts half of the attention core (QK^T and AV), as the mask leaves it and Megatron-LM counts.
        """
        core = seq_length / self.hidden_size / (2 if causal else 1)
        groups_per_head = self.num_query_groups / self.num_attention_heads
        attention = 12 * self.num_layers * self.hidden_size**2 * (1 + groups_per_head + core)
        mlp = 18 * self.num_layers * self.ffn_hidden_size * self.hidden_size
        embedding = 6 * self.vocab_size * self.hidden_size
        return seq_length * (attention + mlp + embedding)


def tokens_per_second(*, seq_length: int, global_batch_size: int, step_time_s: float) -> float:
    """Return the throughput of the whole job (recipe: sequence length * global batch size / step time)."""
    return seq_length * global_batch_size / step_time_s


def days_to_train(*, tokens: float, tokens_per_s: float) -> float:
    """Return the days to train on `tokens` tokens (recipe: total tokens / throughput / 86400)."""
    return tokens / tokens_per_s / 86400


def tflops_per_gpu(*, global_batch_size: int, flops_per_sequence: float, step_time_s: float, num_gpus: int) -> float:
    """Return the model TFLOP/s of each GPU; divided by the GPU's dense peak in TFLOP/s, this is the MFU."""
    return global_batch_size * flops_per_sequence / step_time_s / num_gpus / 1e12


def pipeline_bubble(*, pipeline_stages: int, virtual_stages: int, micro_batches: int) -> float:
    """Return the share of a step in which a pipeline stage waits before its first and after its last micro-batch.

    Stages of unequal work lose more. Source: Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on
    GPU Clusters Using Megatron-LM", 2.2.
    """
    waiting = (pipeline_stages - 1) / virtual_stages
    return waiting / (micro_batches + waiting)
