"""Documents out of files of every format, good, bad and cut short."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_bench.data import documents
from nemo_bench.data.documents import FORMATS, BadDocument, CutShort, JsonLines, Reader, format_of
from nemo_bench.errors import BenchError

TEXTS = ["hello", "", "line\nbreak\r\n", "é 你好 \U0001f600", "x" * 5000, "\u2028 \x85 \x0b", 'quote " \\ backslash']


def lines_of(texts: list[str]) -> bytes:
    return "".join(json.dumps({"meta": {"n": 1}, "text": text}) + "\n" for text in texts).encode()


def write(path: Path, data: bytes) -> Path:
    """`data` in the format that the name says."""
    if path.name.endswith(".zst"):
        data = zstd.compress(data)
    elif path.name.endswith(".gz"):
        data = gzip.compress(data)
    path.write_bytes(data)
    return path


def read(path: Path, text_key: str = "text") -> tuple[list[str], list[BadDocument]]:
    """All of a file, and what was bad in it."""
    texts: list[str] = []
    bad: list[BadDocument] = []
    lines = 0
    for block in Reader(path, text_key).blocks():
        assert isinstance(block, documents.ParquetRows) or block.before == lines  # type: ignore[attr-defined]
        good, wrong = block.texts(text_key)
        texts += good
        bad += wrong
        lines += block.lines
    return texts, bad


@pytest.fixture(params=[1, 64, 2 << 20], ids=["tiny blocks", "small blocks", "real blocks"])
def block_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(documents, "BLOCK_BYTES", request.param)
    return int(request.param)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.jsonl.gz"])
@pytest.mark.parametrize("end", [b"\n", b""], ids=["newline at the end", "none"])
def test_every_document_comes_back(tmp_path: Path, name: str, end: bytes, block_bytes: int) -> None:
    path = write(tmp_path / name, lines_of(TEXTS * 20)[:-1] + end)
    reader = Reader(path)
    assert read(path) == (TEXTS * 20, [])
    for _ in reader.blocks():
        pass
    assert reader.bytes_read == reader.size_bytes == path.stat().st_size


@pytest.mark.parametrize("suffix", [".zst", ".gz"])
def test_several_frames(tmp_path: Path, suffix: str, block_bytes: int) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    compress = gzip.compress if suffix == ".gz" else zstd.compress
    data = lines_of(TEXTS)
    path.write_bytes(b"".join(compress(part) for part in (data[:50], data[50:51], b"", data[51:])))
    assert read(path) == (TEXTS, [])


def test_blocks_are_small_however_well_packed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl.zst", b'{"text": "a"}\n' * 2_000_000)
    assert path.stat().st_size < 10_000
    sizes = [len(block.data) for block in Reader(path).blocks() if isinstance(block, JsonLines)]
    assert max(sizes) <= documents.BLOCK_BYTES and sum(sizes) == 28_000_000


def test_gzip_padding(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(lines_of(["a"])) + b"\0" * 512)
    assert read(path) == (["a"], [])


def test_windows_line_ends_and_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'\r\n{"text": "a"}\r\n\n   \n{"text": "b"}\r\n{"text": 1}\r\n')
    texts, bad = read(path)
    assert texts == ["a", "b"]
    assert [document.line for document in bad] == [6]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a', "broken JSON"),
        (b"not json", "broken JSON"),
        (b'{"text": "a"} {"text": "b"}', "broken JSON"),
        (b"[" * 100_000, "broken JSON"),
        (b'{"body": "a"}', "no 'text'"),
        (b'["text"]', "not a JSON object but list"),
        (b'"text"', "not a JSON object but str"),
        (b'{"text": null}', "'text' is not a string but NoneType"),
        (b'{"text": ["a"]}', "'text' is not a string but list"),
        (b'{"text": "\xff"}', "invalid UTF-8 (byte 11 of the line)"),
        (b'{"text": "\\ud800"}', "half of a surrogate pair"),
    ],
)
def test_bad_documents_are_named(tmp_path: Path, line: bytes, reason: str, block_bytes: int) -> None:
    good = b'{"text": "good"}\n'
    path = write(tmp_path / "a.jsonl", good * 3 + line + b"\n" + good * 2)
    texts, bad = read(path)
    assert texts == ["good"] * 5
    assert [document.line for document in bad] == [4]
    assert reason in bad[0].reason


@pytest.mark.parametrize("line", [b'{"text": "a", "score": NaN}', b'{"text": "a", "n": 1e999}', b' {"text":"a"} '])
def test_what_pythons_json_reads_is_read(line: bytes) -> None:
    """Megatron's preprocessing reads with Python's json, which takes more than the standard allows."""
    assert JsonLines(line, 0).texts("text") == (["a"], [])


@pytest.mark.parametrize("suffix", [".zst", ".gz"])
def test_truncated_anywhere(tmp_path: Path, suffix: str, block_bytes: int) -> None:
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
        assert seen == texts[: len(seen)]
        assert caught.value.line == len(seen)


@pytest.mark.parametrize("suffix", [".zst", ".gz"])
def test_damaged_in_the_middle(tmp_path: Path, suffix: str) -> None:
    texts = [random.Random(number).randbytes(300).hex() for number in range(2000)]
    data = bytearray(write(tmp_path / f"a.jsonl{suffix}", lines_of(texts)).read_bytes())
    data[len(data) // 2 : len(data) // 2 + 64] = b"\xff" * 64
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(bytes(data))
    with pytest.raises(CutShort, match=r"after line \d+.*(damaged|truncated)"):
        for block in Reader(path).blocks():
            block.texts("text")


def test_not_compressed_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"<html>Not found</html>")
    with pytest.raises(CutShort, match="after line 0: the zst data are damaged"):
        list(Reader(path).blocks())


def test_a_file_without_lines_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_LONGEST_LINE", 10_000)
    monkeypatch.setattr(documents, "BLOCK_BYTES", 1000)
    path = write(tmp_path / "a.jsonl.zst", b"x" * 3_000_000)
    with pytest.raises(BenchError, match="one document a line"):
        list(Reader(path).blocks())


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.binary()):
        values: list[Any] = [text.encode() if kind == pyarrow.binary() else text for text in TEXTS * 200]
        values[700] = None
        table = pyarrow.table({"id": list(range(1400)), "text": pyarrow.array(values, kind)})
        pyarrow.parquet.write_table(table, path, row_group_size=333)
        texts, bad = read(path)
        expected = TEXTS * 200
        del expected[700]
        assert texts == expected
        assert bad == [BadDocument(701, "no 'text'")]
    with pytest.raises(BenchError, match=r"no column 'body'.* the columns are id, text"):
        read(path, "body")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(CutShort, match="damaged or truncated"):
        read(path)


def test_parquet_of_invalid_utf8_and_numbers(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    wrong = pyarrow.array([b"good", b"\xff\xfe", b"fine"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": wrong, "n": [1, 2, 3]}), path)
    assert read(path) == (["good", "fine"], [BadDocument(2, "invalid UTF-8 (byte 1 of the text)")])
    assert [document.reason for document in read(path, "n")[1]] == ["'n' is not a string but int64"] * 3


@pytest.mark.parametrize("name", ["a.json", "a.txt", "a.jsonl.bz2", "a"])
def test_unknown_formats_list_the_known(name: str) -> None:
    with pytest.raises(BenchError) as caught:
        format_of(name)
    assert all(suffix in str(caught.value) for suffix in FORMATS)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"Cannot read .*No such file"):
        Reader(tmp_path / "a.jsonl")


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
