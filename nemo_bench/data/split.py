"""Megatron's split of a dataset's documents into train, validation and test."""

from __future__ import annotations

import math
from itertools import accumulate

PARTS = ("train", "validation", "test")


def split_shares(split: str) -> list[float] | None:
    """Return the shares of `data.split`; None if they are not three numbers, the first above 0."""
    try:
        shares = [float(part) for part in split.split(",")]
    except ValueError:
        return None
    usable = len(shares) == 3 and all(map(math.isfinite, shares)) and min(shares) >= 0 and shares[0] > 0
    return shares if usable else None


def empty_parts(split: str, documents: int) -> list[str]:
    """Return the parts whose share rounds to none of the documents: megatron-core counts their epochs for ever."""
    shares = split_shares(split) or []
    ends = [round(end * documents) for end in accumulate(share / sum(shares) for share in shares)]
    return [part for part, share, begin, end in zip(PARTS, shares, [0, *ends], ends) if share > 0 and end == begin]
