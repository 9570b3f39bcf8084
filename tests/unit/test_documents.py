"""Documents out of files of every format, good, bad and cut short."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_bench.data import documents
from nemo_bench.data.documents import FORMATS, Block, Reader
from nemo_bench.errors import BenchError

TEXTS = ["hello", "", "line\nbreak\r\n", "é 你好 \U0001f600", "x" * 5000, "\u2028 \x85 \x0b", 'quote " \\ backslash']
COMPRESS: dict[str, Callable[[bytes], bytes]] = {".jsonl": bytes, ".zst": zstd.compress, ".gz": gzip.compress}


def lines_of(texts: list[str]) -> bytes:
    return "".join(json.dumps({"meta": {"n": 1}, "text": text}) + "\n" for text in texts).encode()


def write(path: Path, data: bytes) -> Path:
    """Write `data` in the format that the name says."""
    path.write_bytes(COMPRESS[path.suffix](data))
    return path


def read(path: Path, text_key: str = "text") -> tuple[list[str], list[tuple[int, str]], str]:
    """Return the texts of a file, what was bad in it, and why it cannot be read to its end."""
    texts: list[str] = []
    bad: list[tuple[int, str]] = []
    lines = 0
    reader = Reader(path, text_key)
    try:
        for block in reader.blocks():
            assert block.before == lines
            good, wrong = block.texts(text_key)
            texts, bad, lines = texts + good, bad + wrong, lines + len(block.rows)
    except BenchError as error:
        return texts, bad, str(error)
    assert reader.bytes_read == reader.size_bytes
    return texts, bad, ""


@pytest.fixture(params=[1, 64, 2 << 20], ids=["tiny blocks", "small blocks", "real blocks"])
def block_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "BLOCK_BYTES", request.param)


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst", ".jsonl.gz"])
def test_every_document_comes_back(tmp_path: Path, suffix: str) -> None:
    path, data = tmp_path / f"a{suffix}", lines_of(TEXTS * 20)
    for whole in (data, data[:-1]):  # with and without a newline at the end
        assert read(write(path, whole)) == (TEXTS * 20, [], "")
    path.write_bytes(b"".join(COMPRESS[path.suffix](part) for part in (data[:50], data[50:51], b"", data[51:])))
    assert read(path) == (TEXTS * 20, [], "")  # in several frames


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a', "broken JSON (Unterminated string"),
        (b'{"text": "a"} {"text": "b"}', "broken JSON (Extra data"),
        (b"[" * 100_000, "broken JSON (maximum recursion"),
        (b'{"text": "\xff"}', "broken JSON ('utf-8' codec can't decode byte 0xff in position 10"),
        (b'{"body": "a"}', "no 'text'"),
        (b'["text"]', "no 'text'"),
        (b'{"text": null}', "no 'text'"),
        (b'{"text": ["a"]}', "'text' is not a string but list"),
        (b'{"text": "\\ud800"}', "'text' is not Unicode text ("),
    ],
)
def test_bad_documents_are_named(tmp_path: Path, line: bytes, reason: str) -> None:
    path = write(tmp_path / "a.jsonl", b'\r\n{"text": "good"}\r\n\n   \n' + line + b'\n{"text": "good"}')
    texts, ((number, why),), _ = read(path)
    assert texts == ["good"] * 2 and number == 5 and why.startswith(reason)


@pytest.mark.parametrize("line", [b'{"text": "a", "score": NaN}', b'{"text": "a", "n": 1e999}', b' {"text":"a"} '])
def test_what_pythons_json_reads_is_read(line: bytes) -> None:
    """Megatron's preprocessing reads with Python's json, which takes more than the standard allows."""
    assert Block([line], 0).texts("text") == (["a"], [])


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize("suffix", [".zst", ".gz"])
def test_truncated_anywhere(tmp_path: Path, suffix: str) -> None:
    """Never half of a document, and always word of the rest."""
    texts = [f"document {number} " + random.Random(number).randbytes(40).hex() for number in range(200)]
    whole = write(tmp_path / f"whole.jsonl{suffix}", lines_of(texts)).read_bytes()
    path = tmp_path / f"cut.jsonl{suffix}"
    for size in (*range(2, len(whole), len(whole) // 13), len(whole) - 1):
        path.write_bytes(whole[:size])
        seen, bad, cut_short = read(path)
        assert seen == texts[: len(seen)] and bad == [] and "truncated" in cut_short


@pytest.mark.parametrize("suffix", [".zst", ".gz"])
def test_damaged_in_the_middle(tmp_path: Path, suffix: str) -> None:
    texts = [random.Random(number).randbytes(300).hex() for number in range(2000)]
    path = tmp_path / f"a.jsonl{suffix}"
    data = bytearray(COMPRESS[suffix](lines_of(texts)))
    data[len(data) // 2 : len(data) // 2 + 64] = b"\xff" * 64
    for content in (bytes(data), b"<html>Not found</html>"):
        path.write_bytes(content)
        assert "a.jsonl" in read(path)[2] and ": the compressed data " in read(path)[2]


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.binary()):
        values: list[Any] = [text.encode() if kind == pyarrow.binary() else text for text in TEXTS * 200]
        expected = TEXTS * 200
        values[700] = None
        del expected[700]
        table = pyarrow.table({"id": list(range(1400)), "text": pyarrow.array(values, kind)})
        pyarrow.parquet.write_table(table, path, row_group_size=333)
        assert read(path) == (expected, [(701, "no 'text'")], "")
    assert {reason for _, reason in read(path, "id")[1]} == {"'id' is not a string but int"}
    assert "no column 'body'" in read(path, "body")[2] and "the columns are id, text" in read(path, "body")[2]
    path.write_bytes(path.read_bytes()[:1000])
    assert "damaged or truncated" in read(path)[2]
    wrong = pyarrow.array([b"good", b"\xff\xfe", b"fine"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": wrong}), path)
    texts, ((number, reason),), _ = read(path)
    assert texts == ["good", "fine"] and number == 2 and reason.startswith("'text' is not Unicode text (")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl.bz2", "a", "missing.jsonl"])
def test_files_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(BenchError) as caught:
        Reader(tmp_path / name)
    expected = ["Cannot read", "No such file"] if name == "missing.jsonl" else FORMATS
    assert all(words in str(caught.value) for words in expected)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=50)))
def test_any_text_comes_back(texts: list[str]) -> None:
    for ascii_only in (True, False):
        data = "\n".join(json.dumps({"text": text}, ensure_ascii=ascii_only) for text in texts)
        usable = [text for text in texts if not any("\ud800" <= character <= "\udfff" for character in text)]
        assert Block(data.encode("utf-8", "surrogatepass").split(b"\n"), 0).texts("text")[0] == usable


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_survived(data: bytes) -> None:
    lines = data.split(b"\n")
    texts, bad = Block(lines, 10).texts("text")
    assert len(texts) + len(bad) <= len(lines)
    assert all(10 < number <= 10 + len(lines) for number, _ in bad)
