"""The local dataset: a tokenizer and a Megatron dataset made from text that this machine already has.

    <parent>/local-<hash>/my-llama_00_text_document.bin/.idx/.json  one document for each source file
    <parent>/local-<hash>/tokenizer/                                a Hugging Face tokenizer folder

The hash is of everything that decides the contents. A folder is built aside and renamed: one that exists is complete.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nemo_bench.data import corpus, tokenizer
from nemo_bench.data.indexed_dataset import inspect
from nemo_bench.data.shard import Shard, prepare, read_manifest
from nemo_bench.errors import BenchError
from nemo_bench.files import explained_disk_errors, hidden_folder, locked, replace_durably

DATASET_NAME = "my-llama_00_text_document"  # as the recipe's
_FORMAT_VERSION = 2  # raise it when the same inputs would give other files


@dataclass(frozen=True)
class LocalDataset:
    """A local dataset on disk, with absolute paths."""

    prefix: Path
    tokenizer_folder: Path
    vocab_size: int
    documents: int
    tokens: int


def prepare_local(parent: Path, *, vocab_size: int, corpus_bytes: int, report: Callable[[str], None]) -> LocalDataset:
    """Make the local dataset of about `corpus_bytes` of text in a folder of `parent`, or return the one that is there.

    Of several processes at once one builds, and the others wait. A small corpus gives fewer tokens than `vocab_size`.
    Raises BenchError if the folder is damaged or cannot be written, or the text is too small.
    """
    texts = corpus.collect(corpus_bytes)
    prefix = _prefix(parent, texts, vocab_size)
    folder = prefix.parent
    if not folder.exists():
        with explained_disk_errors(parent, "the local dataset needs 50 MB: free them, or choose another data.folder"):
            parent.mkdir(parents=True, exist_ok=True)
            with locked(parent / ".local.lock", "makes the local dataset", report):
                if not folder.exists():
                    with hidden_folder(folder) as building:
                        _build(building, texts, vocab_size, report)
                        replace_durably(building, folder)
    try:
        info, manifest = inspect(prefix), read_manifest(prefix) or {}
    except BenchError as error:
        raise BenchError(f"{error}\nDelete the folder {folder}, and it is made again") from None
    return LocalDataset(prefix, folder / "tokenizer", manifest["vocab_size"], info.documents, info.tokens)


def local_prefix(parent: Path, *, vocab_size: int, corpus_bytes: int) -> Path:
    """Return where the local dataset of these inputs is, or would be."""
    return _prefix(parent, corpus.collect(corpus_bytes), vocab_size)


def _prefix(parent: Path, texts: dict[str, str], vocab_size: int) -> Path:
    inputs = [
        _FORMAT_VERSION,
        f"{platform.python_implementation()} {platform.python_version()}",
        [tokenizer.LLAMA3_SPLIT, tokenizer.SPECIAL_TOKENS, tokenizer.MIN_FREQUENCY, vocab_size],
        list(texts.items()),
    ]
    digest = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()
    return parent.absolute() / f"local-{digest[:16]}" / DATASET_NAME


def _build(folder: Path, texts: dict[str, str], vocab_size: int, report: Callable[[str], None]) -> None:
    report(f"Training a tokenizer of {vocab_size:,} tokens on {len(texts):,} files of Python's standard library.")
    tokenizer.write(folder / "tokenizer", texts.values(), vocab_size=vocab_size)
    lines = folder / "corpus.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts.values()))
    prepare(Shard(str(lines), str(folder / DATASET_NAME), str(folder / "tokenizer")), report)
    lines.unlink()
