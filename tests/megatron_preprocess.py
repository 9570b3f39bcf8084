"""Megatron-LM's way to tokenise, as a yardstick: what its tools/preprocess_data.py does with `--append-eod`.

Its algorithm with its own parts, megatron-core's tokenizer and IndexedDatasetBuilder: `json.loads` and one tokenizer
call a document in worker processes that are handed 32 lines at a time, and the main process that writes.

    python tests/megatron_preprocess.py INPUT.jsonl TOKENIZER_FOLDER OUTPUT_PREFIX WORKERS

writes OUTPUT_PREFIX_text_document.bin and .idx and prints, as JSON, the seconds without start-up.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from typing import Any

_tokenizer: Any = None


def build_tokenizer(folder: str) -> Any:
    """What Megatron-LM builds for `--tokenizer-type HuggingFaceTokenizer`."""
    from megatron.core.tokenizers.text.libraries.huggingface_tokenizer import HuggingFaceTokenizer

    return HuggingFaceTokenizer(folder)


def _start_worker(folder: str) -> None:
    global _tokenizer
    _tokenizer = build_tokenizer(folder)


def _encode(line: str) -> tuple[list[int], list[int]]:
    ids = _tokenizer.text_to_ids(json.loads(line)["text"])
    if not ids:
        return [], []
    ids.append(_tokenizer.eod)
    return ids, [len(ids)]


def preprocess(source: str, folder: str, output_prefix: str, workers: int) -> dict[str, float]:
    """Writes the dataset; returns documents, tokens and the seconds from the first document to the last byte."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    prefix = f"{output_prefix}_text_document"
    vocab_size = build_tokenizer(folder).vocab_size
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
    documents = tokens = 0
    with multiprocessing.Pool(workers, _start_worker, (folder,)) as pool, open(source, encoding="utf-8") as lines:
        # The workers load their tokenizers now; Megatron too leaves this out of its figures.
        pool.map(_encode, ['{"text": "a"}'] * workers * 8, 1)
        started = time.perf_counter()
        for ids, lengths in pool.imap(_encode, lines, 32):
            builder.add_document(ids, lengths)
            documents += 1
            tokens += len(ids)
        builder.finalize(f"{prefix}.idx")
        seconds = time.perf_counter() - started
    return {"documents": documents, "tokens": tokens, "seconds": seconds}


if __name__ == "__main__":
    print(json.dumps(preprocess(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))))
