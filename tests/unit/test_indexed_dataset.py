"""The indexed dataset against Megatron's own builder and reader, and against damaged files."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_bench.data.indexed_dataset import IndexedDatasetWriter, bin_path, idx_path, inspect
from nemo_bench.errors import BenchError

DOCUMENTS = [[1, 2, 3], [4], [999, 0], [5, 6]]


def write(prefix: Path, documents: list[list[int]], vocab_size: int = 1000) -> None:
    """Write `documents` at `prefix`."""
    with IndexedDatasetWriter(prefix, vocab_size=vocab_size) as writer:
        for document in documents:
            writer.extend(np.asarray(document, dtype=writer.dtype), np.asarray([len(document)]))


def write_with_megatron(prefix: Path, documents: list[list[int]], vocab_size: int) -> None:
    """The same with Megatron's builder, in the manner of its preprocess_data.py."""
    torch = pytest.importorskip("torch")
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    builder = megatron.IndexedDatasetBuilder(str(bin_path(prefix)), dtype=megatron.DType.optimal_dtype(vocab_size))
    for document in documents:
        builder.add_document(torch.tensor(document, dtype=torch.int64), [len(document)] if document else [])
    builder.finalize(str(idx_path(prefix)))


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """A good dataset of four documents and eight tokens, with a dot in its name."""
    path = tmp_path / "my.data_text_document"
    write(path, DOCUMENTS)
    return path


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 99), max_size=20), min_size=1, max_size=20),
    offset=st.sampled_from([0, 65_399, 65_400, 2**31 - 100]),
)
def test_any_documents_come_back(documents: list[list[int]], offset: int) -> None:
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    documents = [[token + offset for token in document] for document in documents]
    vocab_size = offset + 100
    tokens = sum(map(len, documents))
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder, "ours"), Path(folder, "theirs")
        write(ours, documents, vocab_size)
        write_with_megatron(theirs, documents, vocab_size)
        assert bin_path(ours).read_bytes() == bin_path(theirs).read_bytes()
        assert idx_path(ours).read_bytes() == idx_path(theirs).read_bytes()
        if tokens == 0:
            with pytest.raises(BenchError, match="no tokens"):
                inspect(ours)
            return
        info = inspect(ours)
        assert (info.documents, info.tokens) == (len(documents), tokens)
        read = megatron.IndexedDataset(str(ours))
        assert [read[i].tolist() for i in range(len(read))] == [document for document in documents if document]


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_file(prefix: Path, suffix: str) -> None:
    path = Path(f"{prefix}{suffix}")
    with pytest.raises(BenchError, match=f"without its suffix: {prefix}"):
        inspect(path)
    path.unlink()
    with pytest.raises(BenchError, match=f"{suffix} does not exist"):
        inspect(prefix)


@pytest.mark.parametrize("path_of", [bin_path, idx_path])
def test_any_wrong_size(prefix: Path, path_of: Callable[[Path], Path]) -> None:
    good = path_of(prefix).read_bytes()
    for data in (*(good[:size] for size in range(len(good))), good + b"\0"):
        path_of(prefix).write_bytes(data)
        with pytest.raises(BenchError, match=rf"is damaged.* bytes and has {len(data)} .*[Pp]repare"):
            inspect(prefix)


# Offsets in the index of DOCUMENTS: 34 bytes of header, lengths at 34, pointers at 50, boundaries at 82.
@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, b"X", "no Megatron dataset index"),
        (9, struct.pack("<Q", 2), "version 2"),
        (17, b"\x07", "type code 7"),
        (17, b"\x00", "type code 0"),
        (17, b"\xff", "type code 255"),
        (18, struct.pack("<Q", 5), "bytes and has"),
        (18, struct.pack("<Q", 2**63), "bytes and has"),
        (26, struct.pack("<Q", 0), "no document boundary"),
        (26, struct.pack("<Q", 4), "bytes and has"),
        (34, struct.pack("<i", -3), "negative length"),
        (34, struct.pack("<i", 2), "offsets do not agree"),
        (46, struct.pack("<i", 3), r"\.bin is damaged: it should have 18 bytes and has 16 "),
        (58, struct.pack("<q", 4), "offsets do not agree"),
        (82, struct.pack("<q", 1), "do not run from 0"),
        (90, struct.pack("<q", 3), "out of order"),
        (114, struct.pack("<q", 3), "do not run from 0"),
    ],
)
def test_corrupt_index(prefix: Path, offset: int, value: bytes, message: str) -> None:
    index = bytearray(idx_path(prefix).read_bytes())
    index[offset : offset + len(value)] = value
    idx_path(prefix).write_bytes(index)
    with pytest.raises(BenchError, match=message):
        inspect(prefix)
