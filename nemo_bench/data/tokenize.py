"""One file of documents to one Megatron dataset: read, decode, encode and write at the same time, in bounded memory.

The calling thread reads and decompresses blocks and writes what comes back, in the order of the file; other threads
decode and encode. Everything but decoding JSON runs without the interpreter lock, so that one process can feed a few.
"""

from __future__ import annotations

import os
import sys
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_bench.data.documents import Block, Reader
from nemo_bench.data.encoder import Encoder
from nemo_bench.data.indexed_dataset import IndexedDatasetWriter
from nemo_bench.errors import BenchError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    # Token ids of a block, the length of each document, the bytes of its text, and the bad documents.
    Encoded = tuple[npt.NDArray[np.integer[Any]], npt.NDArray[np.int64], int, list[tuple[int, str]]]

MAX_THREADS = 8  # more would wait for the interpreter lock
EXAMPLES = 20  # bad documents that are listed one by one


@dataclass
class Counts:
    """What went through."""

    documents: int = 0  # written
    tokens: int = 0  # written, those that end documents included
    text_bytes: int = 0  # UTF-8 bytes of the encoded text
    bad: Counter[str] = field(default_factory=Counter)  # documents left out, by reason
    examples: list[str] = field(default_factory=list)  # the first of them: "line N: reason"

    def add_bad(self, line: int, reason: str) -> None:
        self.bad[reason.partition(" (")[0]] += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(f"line {line:,}: {reason}")

    def listed(self) -> str:
        """Return the bad documents as lines: how many of each kind, and the examples."""
        kinds = [f"\n  {number:,} x {reason}" for reason, number in self.bad.most_common()]
        return "".join([*kinds, *(f"\n  {example}" for example in self.examples)])


def tokenize(
    reader: Reader, encoder: Encoder, prefix: Path, *, threads: int | None = None, max_bad_share: float = 0.0
) -> Counts:
    """Write the dataset `prefix` from all documents of `reader`, as Megatron's preprocess_data.py --append-eod does.

    Args:
        threads: threads that decode and encode, besides the calling one; None: as many as serve.
        max_bad_share: the share of bad documents that may be left out; 1 lets all pass, and a truncated file.

    Raises:
        BenchError: too many bad documents, or a truncated file; no index was written.
        RunFailed: the encoder's libraries disagree.
    """
    # Threads that release the interpreter lock thousands of times a second wait less for it.
    sys.setswitchinterval(0.0005)
    counts, threads = Counts(), threads or min(MAX_THREADS, len(os.sched_getaffinity(0)))
    with (
        IndexedDatasetWriter(prefix, vocab_size=encoder.vocab_size) as writer,
        ThreadPoolExecutor(threads, thread_name_prefix="encode") as pool,
    ):
        try:
            for tokens, lengths, text_bytes, bad in _encoded_blocks(reader, encoder, pool, threads, writer.dtype):
                writer.extend(tokens, lengths)
                counts.text_bytes += text_bytes
                for line, reason in bad:
                    counts.add_bad(line, reason)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        counts.documents, counts.tokens = writer.documents, writer.tokens
        _refuse_bad(reader, counts, max_bad_share)
    return counts


def _encoded_blocks(
    reader: Reader, encoder: Encoder, pool: ThreadPoolExecutor, threads: int, dtype: str
) -> Iterator[Encoded]:
    """Give the encoded blocks in order, while the threads encode the next ones."""
    pending: deque[Future[Encoded]] = deque()
    for block in reader.blocks():
        pending.append(pool.submit(_encode, block, reader.text_key, encoder, dtype))
        while len(pending) >= threads + 2 or (pending and pending[0].done()):
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _encode(block: Block, text_key: str, encoder: Encoder, dtype: str) -> Encoded:
    import numpy as np

    texts, bad = block.texts(text_key)
    ids, lengths = encoder.encode(texts)
    # Of its documents' numbers only those of the lines before are known here, which serve as well.
    encoder.check(texts, block.before, ids, lengths)
    if ids.size and int(ids.max()) >= encoder.vocab_size:
        raise BenchError(f"the tokenizer returned the id {ids.max():,}, and its vocabulary has {encoder.vocab_size:,}")
    holding = lengths > 0
    tokens = np.insert(ids.astype(dtype), np.cumsum(lengths)[holding], np.dtype(dtype).type(encoder.eod))
    text_bytes = sum(len(text) if text.isascii() else len(text.encode("utf-8")) for text in texts)
    return tokens, lengths + holding, text_bytes, bad


def _refuse_bad(reader: Reader, counts: Counts, max_bad_share: float) -> None:
    bad, documents = counts.bad.total(), counts.documents + counts.bad.total()
    if reader.cut_short:
        if max_bad_share < 1:
            raise BenchError(
                f"{reader.path} after {documents:,} documents: {reader.cut_short}.\n"
                "Download or copy it again (max_bad_share=1 uses what there is of it)"
            )
        counts.add_bad(documents + 1, reader.cut_short)
    if bad > max_bad_share * documents:
        raise BenchError(
            f"{reader.path}: {bad:,} of {documents:,} documents cannot be used, more than "
            f"max_bad_share={max_bad_share:g} allows; nothing was written.{counts.listed()}\n"
            "Repair or replace the file, name the key that holds the text (text_key=...), or raise max_bad_share."
        )
    if counts.tokens == 0:
        raise BenchError(f"{reader.path} holds no document with text: nothing was written.{counts.listed()}")
