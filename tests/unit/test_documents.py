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
from nemo_bench.data.documents import FORMATS, BadDocument, CutShort, JsonLines, Reader
from nemo_bench.errors import BenchError

TEXTS = ["hello", "", "line\nbreak\r\n", "é 你好 \U0001f600", "x" * 5000, "\u2028 \x85 \x0b", 'quote " \\ backslash']
COMPRESS: dict[str, Callable[[bytes], bytes]] = {".jsonl": bytes, ".zst": zstd.compress, ".gz": gzip.compress}


def lines_of(texts: list[str]) -> bytes:
    return "".join(json.dumps({"meta": {"n": 1}, "text": text}) + "\n" for text in texts).encode()


def write(path: Path, data: bytes) -> Path:
    """Write `data` in the format that the name says."""
    path.write_bytes(COMPRESS[path.suffix](data))
    return path


def read(path: Path, text_key: str = "text") -> tuple[list[str], list[BadDocument]]:
    """Return all of a file, and what was bad in it."""
    texts: list[str] = []
    bad: list[BadDocument] = []
    lines = 0
    for block in Reader(path, text_key).blocks():
        assert block.before == lines
        good, wrong = block.texts(text_key)
        texts += good
        bad += wrong
        lines += block.lines
    return texts, bad


@pytest.fixture(params=[1, 64, 2 << 20], ids=["tiny blocks", "small blocks", "real blocks"])
def block_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "BLOCK_BYTES", request.param)


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.jsonl.gz"])
@pytest.mark.parametrize("end", [b"\n", b""], ids=["newline at the end", "none"])
def test_every_document_comes_back(tmp_path: Path, name: str, end: bytes) -> None:
    path = write(tmp_path / name, lines_of(TEXTS * 20)[:-1] + end)
    assert read(path) == (TEXTS * 20, [])
    reader = Reader(path)
    assert list(reader.blocks()) and reader.bytes_read == reader.size_bytes == path.stat().st_size


@pytest.mark.parametrize("suffix", [".zst", ".gz"])
def test_several_frames(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    data = lines_of(TEXTS)
    path.write_bytes(b"".join(COMPRESS[suffix](part) for part in (data[:50], data[50:51], b"", data[51:])))
    assert read(path) == (TEXTS, [])


def test_blocks_are_small_however_well_packed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl.zst", b'{"text": "a"}\n' * 2_000_000)
    assert path.stat().st_size < 10_000
    sizes = [len(block.data) for block in Reader(path).blocks() if isinstance(block, JsonLines)]
    assert max(sizes) < 2 * documents.BLOCK_BYTES and sum(sizes) == 28_000_000


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
    texts, (bad,) = read(path)
    assert texts == ["good"] * 2 and bad.line == 5 and bad.reason.startswith(reason)


@pytest.mark.parametrize("line", [b'{"text": "a", "score": NaN}', b'{"text": "a", "n": 1e999}', b' {"text":"a"} '])
def test_what_pythons_json_reads_is_read(line: bytes) -> None:
    """Megatron's preprocessing reads with Python's json, which takes more than the standard allows."""
    assert JsonLines(line, 0).texts("text") == (["a"], [])


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize("suffix", [".zst", ".gz"])
def test_truncated_anywhere(tmp_path: Path, suffix: str) -> None:
    """Whole documents of the readable part, never half of one, and always word of the rest."""
    texts = [f"document {number} " + random.Random(number).randbytes(40).hex() for number in range(200)]
    whole = write(tmp_path / f"whole.jsonl{suffix}", lines_of(texts)).read_bytes()
    path = tmp_path / f"cut.jsonl{suffix}"
    for size in (*range(2, len(whole), len(whole) // 13), len(whole) - 1):
        path.write_bytes(whole[:size])
        seen: list[str] = []
        with pytest.raises(CutShort, match="truncated") as caught:
            for block in Reader(path).blocks():
                seen += block.texts("text")[0]
        assert seen == texts[: len(seen)] and caught.value.line == len(seen)


@pytest.mark.parametrize("suffix", [".zst", ".gz"])
def test_damaged_in_the_middle(tmp_path: Path, suffix: str) -> None:
    texts = [random.Random(number).randbytes(300).hex() for number in range(2000)]
    path = tmp_path / f"a.jsonl{suffix}"
    data = bytearray(COMPRESS[suffix](lines_of(texts)))
    data[len(data) // 2 : len(data) // 2 + 64] = b"\xff" * 64
    for content in (bytes(data), b"<html>Not found</html>"):
        path.write_bytes(content)
        with pytest.raises(CutShort, match=r"after line \d+.*(damaged|truncated)"):
            list(Reader(path).blocks())


def test_a_file_without_lines_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_LONGEST_LINE", 10_000)
    with pytest.raises(BenchError, match="one document a line"):
        list(Reader(write(tmp_path / "a.jsonl.zst", b"x" * 3_000_000)).blocks())


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.binary()):
        values: list[Any] = [text.encode() if kind == pyarrow.binary() else text for text in TEXTS * 200]
        expected = TEXTS * 200
        values[700] = None
        del expected[700]
        table = pyarrow.table({"id": list(range(1400)), "text": pyarrow.array(values, kind)})
        pyarrow.parquet.write_table(table, path, row_group_size=333)
        assert read(path) == (expected, [BadDocument(701, "no 'text'")])
    assert {document.reason for document in read(path, "id")[1]} == {"'id' is not a string but int"}
    with pytest.raises(BenchError, match=r"no column 'body'.* the columns are id, text"):
        read(path, "body")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CutShort, match="damaged or truncated"):
        read(path)
    wrong = pyarrow.array([b"good", b"\xff\xfe", b"fine"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": wrong}), path)
    texts, (bad,) = read(path)
    assert texts == ["good", "fine"] and bad.line == 2 and bad.reason.startswith("'text' is not Unicode text (")


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
        assert JsonLines(data.encode("utf-8", "surrogatepass"), 0).texts("text")[0] == usable


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_survived(data: bytes) -> None:
    block = JsonLines(data, 10)
    texts, bad = block.texts("text")
    assert len(texts) + len(bad) <= block.lines
    assert all(10 < document.line <= 10 + block.lines for document in bad)
