"""One file of documents to one Megatron dataset: read, decode, encode and write, all at once, in bounded memory.

The calling thread reads and decompresses blocks and writes what comes back, in the order of the file; threads decode
and encode them. All of that but decoding JSON runs outside the interpreter lock, so that one process can feed a few
threads; shards run in processes of their own.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_bench.data.documents import BadDocument, Block, CutShort, Reader
from nemo_bench.data.encoder import Encoder
from nemo_bench.data.indexed_dataset import IndexedDatasetWriter
from nemo_bench.errors import BenchError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

#: More threads than this wait for the interpreter lock.
MAX_THREADS = 8
#: Bad documents that are reported one by one.
EXAMPLES = 20
#: So many bad documents end a run whose share of them is too large already, rather than at its end.
_HOPELESS = 10_000


@dataclass
class Counts:
    """What went through so far.

    Attributes:
        lines: lines (rows) read, bad and blank ones included.
        documents, tokens: written; tokens with the end-of-document tokens.
        text_bytes: UTF-8 bytes of the text that was encoded.
        bad: documents left out, by reason.
        examples: the first of them, as "line N: reason".
        truncated: whether the file ended before its data did.
    """

    lines: int = 0
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    truncated: bool = False

    @property
    def bad_documents(self) -> int:
        return sum(self.bad.values())

    def bad_share(self) -> float:
        """Bad documents among all."""
        return self.bad_documents / max(self.documents + self.bad_documents, 1)

    def add_bad(self, document: BadDocument) -> None:
        self.bad[document.reason.partition(" (")[0]] += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(f"line {document.line:,}: {document.reason}")


@dataclass(frozen=True)
class _Encoded:
    tokens: npt.NDArray[np.integer[Any]]
    lengths: npt.NDArray[np.int64]
    lines: int
    text_bytes: int
    bad: list[BadDocument]


def usable_cores() -> int:
    """Cores that this process may run on: a job's share of the node, not the node's."""
    return len(os.sched_getaffinity(0))


def tokenize(
    reader: Reader,
    encoder: Encoder,
    prefix: Path,
    *,
    threads: int,
    append_eod: bool = True,
    max_bad_share: float = 0.0,
    progress: Callable[[Counts], None] = lambda counts: None,
) -> Counts:
    """Writes the dataset `prefix` (.bin and .idx, which appear when complete) from all documents of `reader`.

    The files are those of Megatron-LM's tools/preprocess_data.py with `--append-eod`, byte for byte.

    Args:
        threads: that decode and encode, besides the calling one.
        append_eod: end each document that has tokens with the tokenizer's end-of-document token.
        max_bad_share: bad documents among all that are left out without failing; 1 lets all pass, also the missing
            rest of a truncated file.
        progress: called after each block.

    Raises:
        BenchError: too many bad documents, or a truncated file; nothing was written.
        RunFailed: the encoder's libraries disagree.
        OSError: the disk.
    """
    counts = Counts()
    pending: deque[Future[_Encoded]] = deque()
    with (
        IndexedDatasetWriter(prefix, vocab_size=encoder.vocab_size) as writer,
        ThreadPoolExecutor(threads, thread_name_prefix="encode") as pool,
    ):
        try:
            blocks = reader.blocks()
            cut: CutShort | None = None
            more = True
            while more or pending:
                if more and len(pending) < threads + 2:
                    try:
                        block = next(blocks)
                    except StopIteration:
                        more = False
                    except CutShort as error:
                        more, cut = False, error
                    else:
                        # The document's number decides which are checked against the reference: known before the
                        # block is decoded only as the line's number, which is as good.
                        pending.append(
                            pool.submit(
                                _encode, block, reader.text_key, encoder, counts.lines, append_eod, writer.dtype
                            )
                        )
                        counts.lines += block.lines
                        if len(pending) < threads + 2 and not pending[0].done():
                            continue
                if pending:
                    _write(writer, pending.popleft().result(), counts)
                    if counts.bad_documents > _HOPELESS:
                        _refuse_bad(reader, counts, max_bad_share)
                    progress(counts)
        except BaseException:
            for future in pending:
                future.cancel()
            raise
        if cut is not None:
            counts.add_bad(BadDocument(cut.line, cut.reason))
            counts.truncated = True
            if max_bad_share < 1:
                raise BenchError(
                    f"{reader.path} {cut}.\nBring the file again (max_bad_share=1 goes on with what there is of it)"
                )
        _refuse_bad(reader, counts, max_bad_share)
        if writer.tokens == 0:
            raise BenchError(f"{reader.path} holds no document with text: nothing was written.{_told(counts)}")
    return counts


def _encode(block: Block, text_key: str, encoder: Encoder, lines_before: int, append_eod: bool, dtype: str) -> _Encoded:
    """A block's documents as the dataset stores them."""
    import numpy as np

    texts, bad = block.texts(text_key)
    ids, lengths = encoder.encode(texts)
    encoder.check(texts, lines_before, ids, lengths)
    if ids.size and int(ids.max()) >= encoder.vocab_size:
        raise BenchError(f"the tokenizer gave an id of {ids.max():,}, and its vocabulary has {encoder.vocab_size:,}")
    stored: npt.NDArray[np.integer[Any]] = ids.astype(dtype)
    if append_eod:
        holding = lengths > 0
        stored = np.insert(stored, np.cumsum(lengths)[holding], np.dtype(dtype).type(encoder.eod))
        lengths = lengths + holding
    text_bytes = sum(len(text) if text.isascii() else len(text.encode("utf-8")) for text in texts)
    return _Encoded(stored, lengths, block.lines, text_bytes, bad)


def _write(writer: IndexedDatasetWriter, encoded: _Encoded, counts: Counts) -> None:
    writer.extend(encoded.tokens, encoded.lengths)
    counts.documents, counts.tokens = writer.documents, writer.tokens
    counts.text_bytes += encoded.text_bytes
    for document in encoded.bad:
        counts.add_bad(document)


def _refuse_bad(reader: Reader, counts: Counts, max_bad_share: float) -> None:
    if counts.bad_share() > max_bad_share:
        raise BenchError(
            f"{reader.path}: {counts.bad_documents:,} of {counts.documents + counts.bad_documents:,} documents cannot "
            f"be used, more than max_bad_share={max_bad_share:g} allows; nothing was written.{_told(counts)}\n"
            "Mend or replace the file, name the key that holds the text (text_key=...), or raise max_bad_share."
        )


def _told(counts: Counts) -> str:
    lines = [f"\n  {number:,} x {reason}" for reason, number in counts.bad.most_common()]
    return "".join([*lines, *(f"\n  {example}" for example in counts.examples)])
