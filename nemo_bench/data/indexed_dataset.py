"""Megatron's indexed dataset (a .bin/.idx pair), written and checked with numpy alone.

The layout is that of `megatron.core.datasets.indexed_dataset`, byte for byte, so that data can be prepared and checked
on a login node, which has no torch. All numbers are little-endian:

    .bin  the token ids of all documents, one after another, in one integer type
    .idx  magic (9 bytes), version 1 (uint64), type code (uint8), number of sequences S (uint64), number of
          document boundaries D (uint64), lengths in tokens (int32[S]), offsets in .bin in bytes (int64[S]),
          and the sequence at which each document begins, with S at the end (int64[D])
"""

from __future__ import annotations

import contextlib
import os
import struct
from array import array
from dataclasses import dataclass
from itertools import pairwise
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
_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
# Token ids read at once.
_CHUNK = 1 << 20


def bin_path(prefix: Path) -> Path:
    """Return the token file of `prefix` (`with_suffix` would replace a part of a name such as "wiki.en")."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: Path) -> Path:
    """Return the index file of `prefix`."""
    return Path(f"{prefix}.idx")


def optimal_dtype(vocab_size: int) -> str:
    """Return the numpy name of the type in which Megatron stores ids of a vocabulary of this size."""
    return "uint16" if vocab_size < 65500 else "int32"


class IndexedDatasetWriter:
    """Stream documents of token ids into `prefix`.bin; the end of the `with` block writes `prefix`.idx.

    A document is one sequence, or none if it has no tokens, as by Megatron's preprocess_data.py. A block that raises,
    or a killed process, leaves a .bin without an .idx.
    """

    def __init__(self, prefix: Path, *, vocab_size: int) -> None:
        self.prefix = prefix
        self.dtype = optimal_dtype(vocab_size)
        self.tokens = 0
        self._lengths = array("i")
        self._empty = array("q")  # for each document without tokens, the number of sequences before it
        self._file = open(bin_path(prefix), "wb")  # noqa: SIM115 - closed by __exit__

    @property
    def documents(self) -> int:
        """Documents appended so far."""
        return len(self._lengths) + len(self._empty)

    def extend(self, tokens: npt.NDArray[np.integer[Any]], lengths: npt.NDArray[np.integer[Any]]) -> None:
        """Append many documents: all their ids, of the type `dtype`, and the length in tokens of each document."""
        import numpy as np

        self._file.write(tokens.astype(np.dtype(self.dtype).newbyteorder("<"), copy=False).data)
        holding = lengths > 0
        sequences = len(self._lengths) + np.cumsum(holding)
        self._empty.frombytes(sequences[~holding].astype(np.int64).tobytes())
        self._lengths.frombytes(lengths[holding].astype(np.int32).tobytes())
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
        lengths = np.asarray(self._lengths, dtype="<i4")
        offsets = np.zeros(count, dtype="<i8")
        np.cumsum(lengths[:-1], dtype=np.int64, out=offsets[1:])
        offsets *= np.dtype(self.dtype).itemsize
        boundaries = np.sort(np.concatenate([np.arange(count + 1), np.asarray(self._empty, np.int64)]))
        (code,) = (code for code, dtype in _DTYPES.items() if dtype == self.dtype)
        with atomic_file(idx_path(self.prefix), "wb") as index:
            index.write(_HEADER.pack(_MAGIC, _VERSION, code, count, self.documents + 1))
            for column in (lengths, offsets, boundaries.astype("<i8")):
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
    """Check the dataset `prefix` (a path without suffix), in some 24 bytes of memory a document.

    The whole index is read, and must agree with itself and with the size of .bin. With `read_tokens` all tokens are
    read too: each id must be at least 0, and below `vocab_size` if that is given. Raises BenchError.
    """
    for path in (idx_path(prefix), bin_path(prefix)):
        if not path.is_file():
            hint = f" without its suffix: {prefix.with_suffix('')}" if prefix.suffix in (".bin", ".idx") else ""
            raise BenchError(f"The dataset file {path} does not exist: prepare the dataset, or correct its path{hint}.")
    try:
        return _inspect(prefix, vocab_size, read_tokens)
    except OSError as error:
        raise BenchError(f"Cannot read the dataset {prefix}: {error}. Check its permissions and its disk.") from error


def _inspect(prefix: Path, vocab_size: int | None, read_tokens: bool) -> DatasetInfo:
    import numpy as np

    index, data = idx_path(prefix), bin_path(prefix)
    header = _header(index)
    if header[: len(_MAGIC)] != _MAGIC[: len(header)]:
        raise BenchError(f"{index} is no Megatron dataset index (it does not begin with MMIDIDX): correct the path.")
    _require_size(index, max(_HEADER.size, index.stat().st_size))
    _, version, code, sequences, boundaries = _HEADER.unpack(header)
    _require(version == _VERSION, index, f"it has format version {version}, and Megatron reads version {_VERSION}")
    _require(code in _DTYPES, index, f"its type code {code} is not an integer type of Megatron's")
    _require(boundaries >= 1, index, "it lists no document boundary")
    _require_size(index, _HEADER.size + 12 * sequences + 8 * boundaries)

    dtype = np.dtype(_DTYPES[code]).newbyteorder("<")
    tokens = _check_index(index, dtype.itemsize)
    _require_size(data, tokens * dtype.itemsize)
    if tokens == 0:
        raise BenchError(f"The dataset {prefix} holds no tokens: prepare it again from text that is not empty.")
    largest = _largest_id(data, dtype) if read_tokens else None
    if largest is not None and vocab_size is not None and largest >= vocab_size:
        raise BenchError(
            f"{data} has token id {largest:,}, but the tokenizer has only {vocab_size:,} tokens: the dataset was "
            "prepared with another tokenizer. Set that tokenizer, or prepare the dataset again with this one."
        )
    return DatasetInfo(prefix, boundaries - 1, tokens, _DTYPES[code], largest)


def _header(index: Path) -> bytes:
    with open(index, "rb") as file:
        return file.read(_HEADER.size)


def _columns(index: Path) -> list[npt.NDArray[Any]]:
    """Return lengths, offsets and document boundaries of an index file of the right size, mapped."""
    import numpy as np

    *_, sequences, boundaries = _HEADER.unpack(_header(index))
    columns, offset = [], _HEADER.size
    for dtype, count in (("<i4", sequences), ("<i8", sequences), ("<i8", boundaries)):
        # memmap refuses an empty range.
        columns.append(np.memmap(index, dtype, "r", offset, (count,)) if count else np.empty(0, dtype))
        offset += np.dtype(dtype).itemsize * count
    return columns


def _check_index(index: Path, itemsize: int) -> int:
    """Check the arrays of an index file of the right size, and return the number of tokens it describes."""
    import numpy as np

    lengths, offsets, starts = _columns(index)
    _require(not len(lengths) or lengths.min() >= 0, index, "it has a sequence of negative length")
    ends = np.cumsum(lengths, dtype=np.int64)
    agree = np.array_equal(offsets, (ends - lengths) * itemsize)
    _require(agree, index, "its sequence offsets do not agree with its sequence lengths")
    whole = starts[0] == 0 and starts[-1] == len(lengths)
    _require(whole, index, f"its document boundaries do not run from 0 to its {len(lengths):,} sequences")
    _require(bool(np.all(np.diff(starts) >= 0)), index, "its document boundaries are out of order")
    return int(ends[-1]) if len(ends) else 0


def _largest_id(data: Path, dtype: np.dtype[Any]) -> int:
    """Read all ids and return the largest."""
    import numpy as np

    ids = np.memmap(data, dtype, "r")
    largest = 0
    for begin in range(0, len(ids), _CHUNK):
        part = ids[begin : begin + _CHUNK]
        _require(part.min() >= 0, data, "it has negative token ids")
        largest = max(largest, int(part.max()))
    return largest


def last_ids(info: DatasetInfo, documents: int) -> list[int]:
    """Return the last token id of each of the first `documents` documents of a checked dataset, empty ones left out."""
    import numpy as np

    lengths, offsets, starts = _columns(idx_path(info.prefix))
    ids = np.memmap(bin_path(info.prefix), np.dtype(info.dtype).newbyteorder("<"), "r")
    last = [int(end) - 1 for begin, end in pairwise(starts[: documents + 1]) if end > begin]  # their last sequences
    return [int(ids[offsets[sequence] // ids.itemsize + lengths[sequence] - 1]) for sequence in last]


def _require(condition: bool, path: Path, damage: str) -> None:
    if not condition:
        raise BenchError(f"{path} is damaged: {damage}. Prepare the dataset again, or copy both of its files again.")


def _require_size(path: Path, size_bytes: int) -> None:
    actual = path.stat().st_size
    rule = f"it should have {size_bytes:,} bytes and has {actual:,} (an interrupted copy?)"
    _require(actual == size_bytes, path, rule)
