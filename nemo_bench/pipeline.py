"""How layers stand on the stages of a pipeline, by Megatron's rules: pure arithmetic."""

from __future__ import annotations

import re
from typing import Any


def chunks_of(layout: str) -> list[str]:
    """Return each chunk's parts, in order: E the embedding, t a layer, L the loss.

    megatron-core's grammar (`pipeline_model_parallel_layout`): `Et*2|(t*2|)*3,tL` is Ett, tt, tt, tt, tL.
    """
    text = layout.replace(",", "")
    for pattern in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        text = re.sub(pattern, lambda match: match[1] * int(match[2]), text)
    return text.split("|")


def layers_of_chunks(model: Any) -> list[list[int]]:
    """Return the number of layers that a `ModelConfig` puts on each stage, by chunk (virtual stage)."""
    stages, chunks = model.pipeline_model_parallel_size, model.virtual_pipeline_model_parallel_size or 1
    if model.pipeline_model_parallel_layout is not None:
        parts = [chunk.count("t") for chunk in chunks_of(model.pipeline_model_parallel_layout)]
        return [parts[stage::stages] for stage in range(stages)]
    first, last = model.account_for_embedding_in_pipeline_split, model.account_for_loss_in_pipeline_split
    layers = [[(model.num_layers + first + last) // (stages * chunks)] * chunks for _ in range(stages)]
    layers[0][0] -= first
    layers[-1][-1] -= last
    return layers
