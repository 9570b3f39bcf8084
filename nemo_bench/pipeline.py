"""How layers stand on the stages of a pipeline, by Megatron's rules: pure arithmetic."""

from __future__ import annotations

import math
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


def layers_of_stage(model: Any, stage: int) -> int:
    """Return how many layers a stage (from 0) of a `ModelConfig` holds."""
    stages = model.pipeline_model_parallel_size
    if model.pipeline_model_parallel_layout is not None:
        return "".join(chunks_of(model.pipeline_model_parallel_layout)[stage::stages]).count("t")
    first, last = model.account_for_embedding_in_pipeline_split, model.account_for_loss_in_pipeline_split
    own = (first and stage == 0) + (last and stage == stages - 1)
    return int(math.ceil((model.num_layers + first + last) / stages) - own)
