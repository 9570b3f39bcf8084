"""Megatron's indexed dataset (a .bin/.idx pair), written, checked and split with numpy alone.

The layout is that of `megatron.core.datasets.indexed_dataset`, byte for byte, so that data can be prepared and checked
on a login node, which has no torch. All numbers are little-endian:

    .bin  the token ids of all documents, one after another, in one integer type
    .idx  magic (9 bytes), version 1 (uint64), type code (uint8), number of sequences S (uint64), number of
          document boundaries D (uint64), lengths in tokens (int32[S]), offsets in .bin in bytes (int64[S]),
          and the sequence at which each document begins, with S at the end (int64[D])
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import struct
from array import array
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from nemo_bench.errors import BenchError
from nemo_bench.files import atomic_file

PARTS = ("train", "validation", "test")  # of a split, by whole documents
_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
# Megatron's type codes. 6 and 7 are floating-point types, which hold no token ids.
_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}


def bin_path(prefix: Path) -> Path:
    """Return the token file of `prefix`."""
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
        self.sha256 = hashlib.sha256()  # of what was written to .bin
        self.lengths = array("i")  # of all documents
        self._file = open(bin_path(prefix), "wb")  # noqa: SIM115 - closed by __exit__

    def extend(self, tokens: Any, lengths: Any) -> None:
        """Append many documents: all their ids, and the length in tokens of each document."""
        content = tokens.astype(np.dtype(self.dtype).newbyteorder("<"), copy=False).data
        self._file.write(content)
        self.sha256.update(content)
        self.lengths.frombytes(lengths.astype(np.int32).tobytes())
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
        of_documents = np.asarray(self.lengths, dtype="<i4")
        lengths = of_documents[of_documents > 0]  # of sequences
        offsets = (np.cumsum(lengths, dtype="<i8") - lengths) * np.dtype(self.dtype).itemsize
        boundaries = np.concatenate([[0], np.cumsum(of_documents > 0)]).astype("<i8")
        (code,) = (code for code, dtype in _DTYPES.items() if dtype == self.dtype)
        with atomic_file(idx_path(self.prefix), "wb") as index:
            index.write(_HEADER.pack(_MAGIC, _VERSION, code, len(lengths), len(boundaries)))
            for column in (lengths, offsets, boundaries):
                index.write(column.tobytes())


@dataclass(frozen=True)
class DatasetInfo:
    """What `inspect` read: counts, and the numpy name of the stored type."""

    prefix: Path
    documents: int
    tokens: int
    dtype: str


def inspect(prefix: Path) -> DatasetInfo:
    """Check the dataset `prefix` (a path without suffix), in some 40 bytes of memory a document, but not its tokens.

    The whole index is read, and must agree with itself and with the size of .bin. Raises BenchError.
    """
    for path in (idx_path(prefix), bin_path(prefix)):
        if not path.is_file():
            hint = f" without its suffix: {prefix.with_suffix('')}" if prefix.suffix in (".bin", ".idx") else ""
            raise BenchError(f"The dataset file {path} does not exist: prepare the dataset, or correct its path{hint}.")
    try:
        info = _read_index(prefix)
        _require_size(bin_path(prefix), info.tokens * np.dtype(info.dtype).itemsize)
    except OSError as error:
        raise BenchError(f"Cannot read the dataset {prefix}: {error}. Check its permissions and its disk.") from error
    if info.tokens == 0:
        raise BenchError(f"The dataset {prefix} holds no tokens: prepare it again from text that is not empty.")
    return info


def _read_index(prefix: Path) -> DatasetInfo:
    """Return what the index says, whose parts must agree with each other."""
    path = idx_path(prefix)
    content = path.read_bytes()
    if content[: len(_MAGIC)] != _MAGIC[: len(content)]:
        raise BenchError(f"{path} is no Megatron dataset index (it does not begin with MMIDIDX): correct the path.")
    _require_size(path, max(_HEADER.size, len(content)))
    _, version, code, sequences, boundaries = _HEADER.unpack_from(content)
    _require(version == _VERSION, path, f"it has format version {version}, and Megatron reads version {_VERSION}")
    _require(code in _DTYPES, path, f"its type code {code} is not an integer type of Megatron's")
    _require(boundaries >= 1, path, "it lists no document boundary")
    _require_size(path, _HEADER.size + 12 * sequences + 8 * boundaries)
    lengths = np.frombuffer(content, "<i4", sequences, _HEADER.size)
    offsets = np.frombuffer(content, "<i8", sequences, _HEADER.size + 4 * sequences)
    starts = np.frombuffer(content, "<i8", boundaries, _HEADER.size + 12 * sequences)
    _require(not sequences or lengths.min() >= 0, path, "it has a sequence of negative length")
    ends = np.cumsum(lengths, dtype=np.int64)
    agree = np.array_equal(offsets, (ends - lengths) * np.dtype(_DTYPES[code]).itemsize)
    _require(agree, path, "its sequence offsets do not agree with its sequence lengths")
    whole = starts[0] == 0 and starts[-1] == sequences
    _require(whole, path, f"its document boundaries do not run from 0 to its {sequences:,} sequences")
    _require(bool(np.all(np.diff(starts) >= 0)), path, "its document boundaries are out of order")
    return DatasetInfo(prefix, boundaries - 1, int(ends[-1]) if sequences else 0, _DTYPES[code])


def _require(condition: bool, path: Path, damage: str) -> None:
    if not condition:
        raise BenchError(f"{path} is damaged: {damage}. Prepare the dataset again, or copy both of its files again.")


def _require_size(path: Path, size_bytes: int) -> None:
    actual = path.stat().st_size
    rule = f"it should have {size_bytes:,} bytes and has {actual:,} (an interrupted copy?)"
    _require(actual == size_bytes, path, rule)


def split_shares(split: str) -> list[float] | None:
    """Return the shares of train, validation and test; None if they are not three numbers, the first above 0."""
    try:
        shares = [float(part) for part in split.split(",")]
    except ValueError:
        return None
    usable = len(shares) == 3 and all(map(math.isfinite, shares)) and min(shares) >= 0 and shares[0] > 0
    return shares if usable else None


def split_documents(split: str, documents: int) -> dict[str, int]:
    """Return how many documents each of PARTS gets by a valid split, rounded as in megatron-core."""
    shares = split_shares(split) or [1.0, 0.0, 0.0]
    ends = [round(end * documents) for end in accumulate(share / sum(shares) for share in shares)]
    return {part: end - begin for part, begin, end in zip(PARTS, [0, *ends], ends)}


def empty_parts(split: str, documents: int) -> list[str]:
    """Return the parts whose share rounds to no document: megatron-core would count their epochs for ever."""
    counts = split_documents(split, documents)
    return [part for part, share in zip(PARTS, split_shares(split) or []) if share > 0 and counts[part] == 0]
