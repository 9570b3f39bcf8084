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
from typing import Any

import numpy as np

from nemo_bench.data.documents import Block, Reader
from nemo_bench.data.encoder import Encoder
from nemo_bench.data.indexed_dataset import IndexedDatasetWriter
from nemo_bench.errors import BenchError

# Arrays of a block's token ids and of its documents' lengths; its bad documents.
Encoded = tuple[Any, Any, list[tuple[int, str]]]
MAX_THREADS = 8  # more would wait for the interpreter lock
EXAMPLES = 20  # bad documents that are listed one by one


@dataclass
class Counts:
    """What went through."""

    documents: int = 0  # written
    tokens: int = 0  # written, those that end documents included
    bad: Counter[str] = field(default_factory=Counter)  # documents left out, by reason
    examples: list[str] = field(default_factory=list)  # the first of them: "line N: reason"
    sha256: str = ""  # of the token ids as written

    def listed(self) -> str:
        """Return the bad documents as lines: how many of each kind, and the examples."""
        kinds = [f"{number:,} x {reason}" for reason, number in self.bad.most_common()]
        return "".join(f"\n  {line}" for line in kinds + self.examples)


def tokenize(reader: Reader, encoder: Encoder, prefix: Path, max_bad_share: float = 0.0, threads: int = 0) -> Counts:
    """Write the dataset `prefix` from all documents of `reader`, as Megatron's preprocess_data.py --append-eod does.

    `threads` decode and encode, besides the calling one; 0: as many as serve. Raises BenchError if more than
    `max_bad_share` of the documents are bad, and RunFailed if the encoder's libraries disagree: no index is written.
    """
    # Threads that release the interpreter lock thousands of times a second wait less for it.
    sys.setswitchinterval(0.0005)
    counts, threads = Counts(), threads or min(MAX_THREADS, len(os.sched_getaffinity(0)))
    with (
        IndexedDatasetWriter(prefix, vocab_size=encoder.vocab_size) as writer,
        ThreadPoolExecutor(threads, thread_name_prefix="encode") as pool,
    ):
        try:
            for tokens, lengths, bad in _encoded_blocks(reader, encoder, pool, threads):
                writer.extend(tokens, lengths)
                counts.bad.update(reason.partition(" (")[0] for _, reason in bad)
                room = EXAMPLES - len(counts.examples)
                counts.examples += [f"line {line:,}: {reason}" for line, reason in bad[:room]]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        counts.documents, counts.tokens, counts.sha256 = len(writer.lengths), writer.tokens, writer.sha256.hexdigest()
        bad_documents = counts.bad.total()
        documents = counts.documents + bad_documents
        if bad_documents > max_bad_share * documents:
            raise BenchError(
                f"{reader.path}: {bad_documents:,} of {documents:,} documents cannot be used, more than "
                f"max_bad_share={max_bad_share:g} allows; nothing was written.{counts.listed()}\n"
                "Repair or replace the file, name the key that holds the text (text_key=...), or raise max_bad_share."
            )
        if counts.tokens == 0:
            raise BenchError(f"{reader.path} holds no document with text: nothing was written.{counts.listed()}")
    return counts


def _encoded_blocks(reader: Reader, encoder: Encoder, pool: ThreadPoolExecutor, threads: int) -> Iterator[Encoded]:
    """Give the encoded blocks in order, while the threads encode the next ones."""
    pending: deque[Future[Encoded]] = deque()
    for block in reader.blocks():
        pending.append(pool.submit(_encode, block, reader.text_key, encoder))
        while len(pending) >= threads + 2 or (pending and pending[0].done()):
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _encode(block: Block, text_key: str, encoder: Encoder) -> Encoded:
    texts, bad = block.texts(text_key)
    ids, lengths = encoder.encode(texts)
    # Of its documents' numbers only those of the lines before are known here, which serve as well.
    encoder.check(texts, block.before, ids, lengths)
    if ids.size and int(ids.max()) >= encoder.vocab_size:
        raise BenchError(f"the tokenizer returned the id {ids.max():,}, and its vocabulary has {encoder.vocab_size:,}")
    holding = lengths > 0
    tokens = np.insert(ids, np.cumsum(lengths)[holding], np.uint32(encoder.eod))
    return tokens, lengths + holding, bad
