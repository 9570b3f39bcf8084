"""The local dataset: a tokenizer and a Megatron dataset made from text that this machine already has.

    <parent>/local-<hash>/my-llama_00_text_document.bin/.idx/.json  one document for each source file
    <parent>/local-<hash>/tokenizer/                                a Hugging Face tokenizer folder

The hash is of everything that decides the contents. A folder is built aside and renamed: one that exists is complete.
"""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

from nemo_bench.config import DataConfig
from nemo_bench.data import corpus, tokenizer
from nemo_bench.data.indexed_dataset import DatasetInfo, inspect
from nemo_bench.data.shard import Shard, prepare, read_manifest
from nemo_bench.errors import BenchError
from nemo_bench.files import explained_disk_errors, hidden_folder, locked, replace_durably

DATASET_NAME = "my-llama_00_text_document"  # as the recipe's
_FORMAT_VERSION = 2  # raise it when the same inputs would give other files


def prepare_local(data: DataConfig, vocab_size: int) -> tuple[DatasetInfo, dict[str, Any]]:
    """Make the local dataset of about `data.corpus_bytes` of text, or find it; return it with its description.

    Of several processes at once one builds, and the others wait. A small corpus gives fewer tokens than `vocab_size`.
    Raises BenchError if the folder is damaged or cannot be written, or the text is too small.
    """
    texts = corpus.collect(data.corpus_bytes)
    prefix = local_prefix(data, vocab_size, texts)
    folder, parent = prefix.parent, prefix.parents[1]
    if not folder.exists():
        with explained_disk_errors(parent, "the local dataset needs 50 MB: free them, or choose another data.folder"):
            parent.mkdir(parents=True, exist_ok=True)
            with locked(parent / ".local.lock", "makes the local dataset"):
                if not folder.exists():
                    with hidden_folder(folder) as building:
                        _build(building, texts, vocab_size)
                        replace_durably(building, folder)
    try:
        return inspect(prefix), read_manifest(prefix) or {}
    except BenchError as error:
        raise BenchError(f"{error}\nDelete the folder {folder}, and it is made again") from None


def local_prefix(data: DataConfig, vocab_size: int, texts: dict[str, str]) -> Path:
    """Return where the local dataset of these texts is, or would be."""
    inputs = [
        _FORMAT_VERSION,
        f"{platform.python_implementation()} {platform.python_version()}",
        [tokenizer.LLAMA3_SPLIT, tokenizer.SPECIAL_TOKENS, tokenizer.MIN_FREQUENCY, vocab_size],
        list(texts.items()),
    ]
    digest = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()
    return Path(data.folder or "").absolute() / f"local-{digest[:16]}" / DATASET_NAME


def _build(folder: Path, texts: dict[str, str], vocab_size: int) -> None:
    trained = f"a tokenizer of {vocab_size:,} tokens on {len(texts):,} files of Python's standard library"
    print(f"Training {trained}.", flush=True)
    tokenizer.write(folder / "tokenizer", texts.values(), vocab_size=vocab_size)
    lines = folder / "corpus.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts.values()))
    prepare(Shard(str(lines), str(folder / DATASET_NAME), str(folder / "tokenizer")))
    lines.unlink()
