"""A small dataset as `prepare_data.py` makes it, with its description."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from nemo_bench.data.shard import Shard, prepare

TEXTS = [f"def answer_{number}():\n    return {number}\n" for number in range(50)]


def make_dataset(prefix: Path, tokenizer: Path) -> None:
    """Makes `prefix`.json, .bin and .idx."""
    with tempfile.TemporaryDirectory() as folder:
        _make(prefix, tokenizer, Path(folder))


def _make(prefix: Path, tokenizer: Path, work: Path) -> None:
    source = work / "documents.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    prepare(Shard(str(source), str(prefix), str(tokenizer), encoder="tokenizers"))
