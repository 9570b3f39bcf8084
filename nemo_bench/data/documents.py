"""Documents out of shards: JSON Lines (plain, zstd, gzip) and Parquet, a block at a time, from the stored file.

A block is raw; the thread that encodes it also decodes it (`Block.texts`). Documents that cannot be used are named by
their line and never end the reading by themselves: the caller decides how many are too many.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_bench.errors import BenchError

FORMATS = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".parquet")

#: Bytes of text in a block: this much keeps all threads busy, and some dozens of blocks in memory are little.
BLOCK_BYTES = 2 << 20
#: A line longer than this is not a document but a file of another kind.
_LONGEST_LINE = 256 << 20
_PARQUET_ROWS = 64


@dataclass(frozen=True)
class BadDocument:
    """A document that cannot be used: `line` counts from 1 (in Parquet, rows), `reason` is a clause."""

    line: int
    reason: str


class CutShort(Exception):
    """The file ends, or is damaged, in the middle of its data: what comes after `line` is missing."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(f"after line {line:,}: {reason}")
        self.line = line
        self.reason = reason


class _Damaged(Exception):
    """The compressed data cannot be read any further."""


class Reader:
    """The blocks of one file. `bytes_read`, of `size_bytes`, says how far the reading is in the stored file."""

    def __init__(self, path: Path, text_key: str = "text") -> None:
        """Raise BenchError if the file's format is unknown or the file cannot be read."""
        self.path = path
        self.text_key = text_key
        self.format = format_of(path.name)
        self.bytes_read = 0
        try:
            with open(path, "rb"):
                self.size_bytes = path.stat().st_size
        except OSError as error:
            raise BenchError(f"Cannot read {path}: {error.strerror}. Correct the path or its permissions.") from error

    def blocks(self) -> Iterator[Block]:
        """Give all blocks in order.

        Raises:
            CutShort: after the last whole document of a truncated or damaged file.
            OSError: the disk.
        """
        return self._parquet() if self.format == ".parquet" else self._json_lines()

    def _json_lines(self) -> Iterator[Block]:
        line = 0  # lines given out
        data = bytearray()  # of the next block
        try:
            for piece in self._pieces():
                data += piece
                if len(data) > _LONGEST_LINE:
                    raise BenchError(
                        f"{self.path}: line {line + 1:,} is longer than {_LONGEST_LINE >> 20} MiB: is this a file of "
                        f"JSON Lines, one document a line? Known formats: {', '.join(FORMATS)}"
                    )
                if len(data) >= BLOCK_BYTES and b"\n" in piece:
                    block = _take_lines(data, line)
                    line += block.lines
                    yield block
        except _Damaged as error:
            block = _take_lines(data, line)  # the line that was cut through is lost with the rest
            if block.data:
                yield block
            raise CutShort(line + block.lines, str(error)) from None
        if data:
            yield JsonLines(bytes(data), line)

    def _pieces(self) -> Iterator[bytes]:
        from backports import zstd

        with open(self.path, "rb") as stored:
            stream: Any = stored
            if self.format == ".jsonl.gz":
                stream = gzip.GzipFile(fileobj=stored)
            elif self.format == ".jsonl.zst":
                # Some shards are written with long windows, which are refused unless asked for.
                stream = zstd.ZstdFile(stored, options={zstd.DecompressionParameter.window_log_max: 31})
            try:
                # `read` would lose what it has already decompressed when it meets the end of a truncated file.
                while piece := stream.read1(BLOCK_BYTES):
                    self.bytes_read = stored.tell()
                    yield piece
            except EOFError:
                raise _Damaged("the compressed data end in the middle: the file is truncated") from None
            except (zlib.error, gzip.BadGzipFile, zstd.ZstdError) as error:
                raise _Damaged(f"the compressed data are damaged ({error})") from None
            self.bytes_read = stored.tell()

    def _parquet(self) -> Iterator[Block]:
        import pyarrow
        import pyarrow.parquet

        line = 0
        try:
            # In small pieces: by itself the library holds a whole row group in memory, which may be a gigabyte.
            with pyarrow.parquet.ParquetFile(self.path, pre_buffer=False, buffer_size=1 << 20) as file:
                if self.text_key not in file.schema_arrow.names:
                    raise BenchError(
                        f"{self.path} has no column {self.text_key!r}: text_key=... names the column that holds the "
                        f"text; the columns are {', '.join(file.schema_arrow.names)}"
                    )
                for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[self.text_key]):
                    yield ParquetRows(batch.column(0), line)
                    line += batch.num_rows
                    self.bytes_read = self.size_bytes * line // file.metadata.num_rows
        except (pyarrow.ArrowInvalid, pyarrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk's, not the file's
            raise CutShort(line, f"the Parquet file is damaged or truncated ({str(error).splitlines()[0]})") from None


def format_of(name: str) -> str:
    """Return which of FORMATS a file or URL of this name has; raise BenchError if it has none of them."""
    for suffix in FORMATS:
        if name.lower().endswith(suffix):
            return suffix
    raise BenchError(f"{name}: unknown format; valid: {', '.join(FORMATS)}")


def _take_lines(data: bytearray, before: int) -> JsonLines:
    """Take the whole lines out of `data`, which keeps the beginning of the next line."""
    end = data.rfind(b"\n") + 1
    block = JsonLines(bytes(data[:end]), before)
    del data[:end]
    return block


@dataclass(frozen=True)
class JsonLines:
    """Whole lines, each a JSON object with the text under a key; `before` lines precede them in the file."""

    data: bytes
    before: int

    @property
    def lines(self) -> int:
        return self.data.count(b"\n") + (not self.data.endswith(b"\n") and bool(self.data))

    def texts(self, text_key: str) -> tuple[list[str], list[BadDocument]]:
        """Return the usable documents in order, and the unusable ones."""
        import orjson

        texts: list[str] = []
        bad: list[BadDocument] = []
        loads = orjson.loads
        for number, line in enumerate(self.data.split(b"\n"), start=self.before + 1):
            try:
                text = loads(line)[text_key]
                if type(text) is str:
                    texts.append(text)
                    continue
            except (ValueError, KeyError, TypeError):
                pass
            if line and not line.isspace():
                try:
                    texts.append(_text_of(line, text_key))
                except ValueError as reason:
                    bad.append(BadDocument(number, str(reason)))
        return texts, bad


def _text_of(line: bytes, text_key: str) -> str:
    """Return the text of a line that orjson refused: Python's own json, which Megatron reads with, takes more.

    Raises:
        ValueError: the line has no text; the reason is a clause.
    """
    try:
        document = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"broken JSON ({error})") from None
    text = _checked(document.get(text_key) if isinstance(document, dict) else None, text_key)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # half of a surrogate pair
        raise ValueError(f"{text_key!r} is not Unicode text ({error})") from None
    return text


def _checked(text: object, text_key: str) -> str:
    if text is None:
        raise ValueError(f"no {text_key!r}")
    if not isinstance(text, str):
        raise ValueError(f"{text_key!r} is not a string but {type(text).__name__}")
    return text


@dataclass(frozen=True)
class ParquetRows:
    """A column of text, string or binary; `before` rows precede it in the file."""

    column: Any
    before: int

    @property
    def lines(self) -> int:
        return len(self.column)

    def texts(self, text_key: str) -> tuple[list[str], list[BadDocument]]:
        """Return the usable documents in order, and the unusable ones."""
        texts: list[str] = []
        bad: list[BadDocument] = []
        for number, row in enumerate(self.column, start=self.before + 1):
            try:
                value = row.as_py()
                texts.append(_checked(value.decode() if isinstance(value, bytes) else value, text_key))
            except UnicodeDecodeError as error:
                bad.append(BadDocument(number, f"{text_key!r} is not Unicode text ({error})"))
            except ValueError as reason:
                bad.append(BadDocument(number, str(reason)))
        return texts, bad


#: Consecutive documents, not yet decoded.
Block = JsonLines | ParquetRows
