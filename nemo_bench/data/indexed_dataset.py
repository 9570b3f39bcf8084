"""Megatron's indexed dataset (a .bin/.idx pair), written and checked with numpy alone.

The layout is that of `megatron.core.datasets.indexed_dataset`, byte for byte, so that data can be prepared and checked
on a login node, which has no torch. All numbers are little-endian:

    .bin  the token ids of all documents, one after another, in one integer type
    .idx  magic (9 bytes), version 1 (uint64), type code (uint8), number of sequences S (uint64), number of
          document boundaries D (uint64), lengths in tokens (int32[S]), offsets in .bin in bytes (int64[S]),
          and the sequence at which each document begins, with S at the end (int64[D])

A document is written as one sequence, or as none if it has no tokens, as by Megatron's preprocess_data.py; `inspect`
reads documents of any number of sequences.
"""

from __future__ import annotations

import contextlib
import os
import struct
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_bench.errors import BenchError
from nemo_bench.files import atomic_file

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")

# Megatron's type codes. 6 and 7 are floating-point types, which hold no token ids.
_DTYPE_CODES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
_CODE_OF_DTYPE = {name: code for code, name in _DTYPE_CODES.items()}

_MAX_LENGTH = 2**31 - 1  # a sequence's length is an int32

# Elements read at once: 8 MiB of int64, whatever the size of the file.
_CHUNK = 1 << 20


def bin_path(prefix: Path) -> Path:
    """Return the token file of `prefix`. Not `with_suffix`, which would replace a part of a name such as "wiki.en"."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: Path) -> Path:
    """Return the index file of `prefix`."""
    return Path(f"{prefix}.idx")


def optimal_dtype(vocab_size: int | None) -> str:
    """Return the numpy name of the type that Megatron stores ids of a vocabulary of `vocab_size` tokens in.

    This is its `DType.optimal_dtype`: uint16 below 65,500 tokens; int32 from there on, and for None.
    """
    return "uint16" if vocab_size is not None and vocab_size < 65500 else "int32"


class IndexedDatasetWriter:
    """Stream documents of token ids into `prefix`.bin; the end of the `with` block writes `prefix`.idx.

    A block that raises, or a killed process, leaves a .bin without an .idx. The index stays in memory (4 bytes a
    document).

    Args:
        prefix: path without suffix; its folder must exist.
        vocab_size: number of tokens of the vocabulary, which decides the stored type; None stores int32.

    Raises:
        OSError: the folder cannot be written or the disk is full.
    """

    def __init__(self, prefix: Path, *, vocab_size: int | None) -> None:
        import numpy as np

        self.prefix = prefix
        self.dtype = optimal_dtype(vocab_size)
        self._stored = np.dtype(self.dtype).newbyteorder("<")
        self.tokens = 0
        self._lengths = array("i")
        self._empty = array("q")  # for each document without tokens, the number of sequences before it
        self._file = open(bin_path(prefix), "wb")  # noqa: SIM115 - closed by __exit__

    @property
    def documents(self) -> int:
        """Documents appended so far."""
        return len(self._lengths) + len(self._empty)

    def extend(self, tokens: npt.NDArray[np.integer[Any]], lengths: npt.NDArray[np.integer[Any]]) -> None:
        """Append many documents: all their ids one after another, and the length in tokens of each.

        The ids must be below the vocabulary's size and of the stored type (`dtype`): the caller checks and converts
        them, on another thread.

        Raises:
            ValueError: the type is another one, or the lengths do not fit `tokens` or the format.
        """
        import numpy as np

        if tokens.dtype != self.dtype or tokens.ndim != 1:
            raise ValueError(f"ids must be a 1-D array of {self.dtype}, not {tokens.dtype} of shape {tokens.shape}")
        if lengths.size and (int(lengths.min()) < 0 or int(lengths.max()) > _MAX_LENGTH):
            raise ValueError(f"a document has from 0 to {_MAX_LENGTH} tokens")
        if int(lengths.sum()) != tokens.size:
            raise ValueError(f"the lengths sum to {lengths.sum()}, and there are {tokens.size} tokens")
        self._file.write(tokens.astype(self._stored, copy=False).data)
        holding = lengths > 0
        if not holding.all():
            sequences = len(self._lengths) + np.cumsum(holding)
            self._empty.frombytes(sequences[~holding].astype(np.int64).tobytes())
            lengths = lengths[holding]
        self._lengths.frombytes(lengths.astype(np.int32).tobytes())
        self.tokens += tokens.size

    def __enter__(self) -> IndexedDatasetWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
                self._write_index()
        finally:
            # Closing flushes, which fails again on the full disk that may be the reason.
            with contextlib.suppress(OSError):
                self._file.close()

    def _write_index(self) -> None:
        import numpy as np

        count = len(self._lengths)
        lengths = np.frombuffer(self._lengths, dtype=np.int32) if count else np.empty(0, dtype=np.int32)
        pointers = np.zeros(count, dtype="<i8")
        np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])
        pointers *= np.dtype(self.dtype).itemsize
        boundaries = np.arange(count + 1, dtype="<i8")
        if self._empty:
            boundaries = np.sort(np.concatenate([boundaries, np.asarray(self._empty, dtype="<i8")]))
        with atomic_file(idx_path(self.prefix), "wb") as index:
            index.write(_HEADER.pack(_MAGIC, _VERSION, _CODE_OF_DTYPE[self.dtype], count, self.documents + 1))
            for column in (lengths.astype("<i4"), pointers, boundaries):
                index.write(column.tobytes())


@dataclass(frozen=True)
class DatasetInfo:
    """What `inspect` read: counts, and the numpy name of the stored type. `max_token_id` needs `read_tokens`."""

    prefix: Path
    documents: int
    tokens: int
    dtype: str
    max_token_id: int | None


def inspect(prefix: Path, *, vocab_size: int | None = None, read_tokens: bool = False) -> DatasetInfo:
    """Check the dataset `prefix` (a path without suffix) as far as possible before training on it.

    The whole index is read, and must agree with itself and with the size of .bin. With `read_tokens` all tokens are
    read too: each id must be at least 0, and below `vocab_size` if that is given. Memory stays at a few MiB whatever
    the size of the files.

    Raises:
        BenchError: a file is missing, unreadable, truncated or damaged, the dataset holds no token, or an id does not
            belong to the vocabulary.
    """
    try:
        return _inspect(prefix, vocab_size, read_tokens)
    except OSError as error:
        raise BenchError(
            f"Cannot read the dataset {prefix}: {error}. Check its permissions and that its disk is mounted."
        ) from error


def _inspect(prefix: Path, vocab_size: int | None, read_tokens: bool) -> DatasetInfo:
    """Do the work of `inspect`."""
    import numpy as np

    index, data = idx_path(prefix), bin_path(prefix)
    for path in (index, data):
        if not path.is_file():
            hint = ""
            if prefix.suffix in (".bin", ".idx"):
                hint = f" Give the path without its suffix: {prefix.with_suffix('')}."
            raise BenchError(f"The dataset file {path} does not exist: prepare the dataset, or correct its path.{hint}")

    index_bytes = index.stat().st_size
    if index_bytes < _HEADER.size:
        raise _size_error(index, f"at least {_HEADER.size:,}", index_bytes)
    with open(index, "rb") as file:
        magic, version, code, sequences, boundaries = _HEADER.unpack(file.read(_HEADER.size))
    if magic != _MAGIC:
        raise BenchError(
            f"{index} is not a Megatron dataset index (it does not begin with MMIDIDX): prepare the dataset "
            "again with Megatron's preprocess_data.py or with this program, or correct the path."
        )
    if version != _VERSION:
        raise _damaged(index, f"it has format version {version}, and Megatron reads version {_VERSION}")
    if code not in _DTYPE_CODES:
        raise _damaged(index, f"its type code {code} is not an integer type of Megatron's")
    if boundaries < 1:
        raise _damaged(index, "it lists no document boundary")
    expected = _HEADER.size + 12 * sequences + 8 * boundaries
    if index_bytes != expected:
        raise _size_error(index, f"{expected:,}", index_bytes)

    dtype = np.dtype(_DTYPE_CODES[code]).newbyteorder("<")
    tokens = _check_index(index, sequences, boundaries, dtype.itemsize)
    data_bytes = data.stat().st_size
    if data_bytes != tokens * dtype.itemsize:
        raise _size_error(data, f"{tokens * dtype.itemsize:,}", data_bytes)
    if tokens == 0:
        raise BenchError(f"The dataset {prefix} holds no tokens: prepare it again from text that is not empty.")

    max_token_id = _check_tokens(data, dtype, tokens, vocab_size) if read_tokens else None
    return DatasetInfo(prefix, boundaries - 1, tokens, _DTYPE_CODES[code], max_token_id)


def _check_index(index: Path, sequences: int, boundaries: int, itemsize: int) -> int:
    """Check the arrays of an index file of the right size, and return the number of tokens it describes."""
    import numpy as np

    def column(dtype: str, offset: int, count: int) -> npt.NDArray[Any]:
        # memmap refuses an empty range.
        return np.memmap(index, dtype, "r", offset, (count,)) if count else np.empty(0, dtype)

    lengths = column("<i4", _HEADER.size, sequences)
    pointers = column("<i8", _HEADER.size + 4 * sequences, sequences)
    starts = column("<i8", _HEADER.size + 12 * sequences, boundaries)

    tokens = 0
    for begin in range(0, sequences, _CHUNK):
        part = np.asarray(lengths[begin : begin + _CHUNK], dtype=np.int64)
        if part.min() < 0:
            raise _damaged(index, "it has a sequence of negative length")
        ends = tokens + np.cumsum(part)
        if not np.array_equal(pointers[begin : begin + _CHUNK], (ends - part) * itemsize):
            raise _damaged(index, "its sequence offsets do not agree with its sequence lengths")
        tokens = int(ends[-1])

    if starts[0] != 0 or starts[-1] != sequences:
        raise _damaged(index, f"its document boundaries do not run from 0 to its {sequences:,} sequences")
    for begin in range(0, boundaries - 1, _CHUNK):
        # One more than the chunk, so that the step from each chunk to the next is checked too.
        if np.any(np.diff(starts[begin : begin + _CHUNK + 1]) < 0):
            raise _damaged(index, "its document boundaries are out of order")
    return tokens


def _check_tokens(data: Path, dtype: np.dtype[Any], tokens: int, vocab_size: int | None) -> int:
    """Read all ids of a .bin file of the right size, and return the largest."""
    import numpy as np

    ids = np.memmap(data, dtype, "r", 0, (tokens,))
    largest = 0
    for begin in range(0, tokens, _CHUNK):
        part = ids[begin : begin + _CHUNK]
        if int(part.min()) < 0:
            raise _damaged(data, "it has negative token ids")
        largest = max(largest, int(part.max()))
    if vocab_size is not None and largest >= vocab_size:
        raise BenchError(
            f"{data} has token id {largest:,}, but the tokenizer has only {vocab_size:,} tokens (ids 0 to "
            f"{vocab_size - 1:,}): the dataset was prepared with another tokenizer. Set that tokenizer, or prepare the "
            "dataset again with this one."
        )
    return largest


def _size_error(path: Path, expected: str, actual: int) -> BenchError:
    """Return the error for a file whose size is not what the index says; `expected` is in bytes."""
    return BenchError(
        f"{path} is damaged: it should have {expected} bytes and has {actual:,} (an interrupted copy or "
        "preparation?). Prepare the dataset again, or copy both of its files again."
    )


def _damaged(path: Path, what: str) -> BenchError:
    """Return the error for a file whose contents contradict themselves; `what` is a clause."""
    return BenchError(f"{path} is damaged: {what}. Prepare the dataset again, or copy both of its files again.")
