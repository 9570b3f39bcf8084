"""Megatron's split of a dataset into training, validation and test, by whole documents."""

from __future__ import annotations

import math
from itertools import accumulate

PARTS = ("train", "validation", "test")


def split_shares(split: str) -> list[float] | None:
    """Return the shares of train, validation and test; None if they are not three numbers, the first above 0."""
    try:
        shares = [float(part) for part in split.split(",")]
    except ValueError:
        return None
    usable = len(shares) == 3 and all(map(math.isfinite, shares)) and min(shares) >= 0 and shares[0] > 0
    return shares if usable else None


def split_documents(split: str, documents: int) -> dict[str, int]:
    """Return how many documents each of PARTS gets by a valid split, rounded as in megatron-core."""
    shares = split_shares(split) or [1.0, 0.0, 0.0]
    ends = [round(end * documents) for end in accumulate(share / sum(shares) for share in shares)]
    return {part: end - begin for part, begin, end in zip(PARTS, [0, *ends], ends)}


def empty_parts(split: str, documents: int) -> list[str]:
    """Return the parts whose share rounds to no document: megatron-core would count their epochs for ever."""
    counts = split_documents(split, documents)
    return [part for part, share in zip(PARTS, split_shares(split) or []) if share > 0 and counts[part] == 0]
