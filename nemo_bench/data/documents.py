"""Documents out of shards: JSON Lines (plain, zstd, gzip) and Parquet, a block at a time, from the stored file.

A block is raw; the thread that encodes it also decodes it (`Block.texts`). Documents that cannot be used are named by
their line and never end the reading by themselves: the caller decides how many are too many.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
        pieces: list[bytes] = []  # of the next block
        size = 0
        cut: str | None = None
        with self._opened() as read:
            while True:
                try:
                    piece = read(BLOCK_BYTES - size if size < BLOCK_BYTES else BLOCK_BYTES)
                except _Damaged as error:
                    cut = str(error)
                    break
                if not piece:
                    break
                pieces.append(piece)
                size += len(piece)
                if size > _LONGEST_LINE:
                    raise BenchError(
                        f"{self.path}: line {line + 1:,} is longer than {_LONGEST_LINE >> 20} MiB: is this a file of "
                        f"JSON Lines, one document a line? Known formats: {', '.join(FORMATS)}"
                    )
                if size >= BLOCK_BYTES and b"\n" in piece:
                    block, rest = _split(pieces, line)
                    yield block
                    line += block.lines
                    pieces, size = [rest], len(rest)
        if cut is not None:  # the line that was cut through is lost with the rest
            block, _ = _split(pieces, line)
        else:
            block = JsonLines(b"".join(pieces), line)
        if block.data:
            yield block
            line += block.lines
        if cut is not None:
            raise CutShort(line, cut)

    @contextmanager
    def _opened(self) -> Iterator[Callable[[int], bytes]]:
        """Give a function that reads at most so many decompressed bytes, and never more than one block at once.

        It is `read1`: `read` would lose what it has already decompressed when it meets the end of a truncated file.
        """
        from backports import zstd

        kind = self.format.rpartition(".")[2]
        with open(self.path, "rb") as stored:
            stream: Any = stored
            if kind == "gz":
                stream = gzip.GzipFile(fileobj=stored)
            elif kind == "zst":
                # Some shards are written with long windows, which are refused unless asked for.
                stream = zstd.ZstdFile(stored, options={zstd.DecompressionParameter.window_log_max: 31})

            def read(size: int) -> bytes:
                try:
                    data: bytes = stream.read1(min(size, BLOCK_BYTES))
                except EOFError:
                    raise _Damaged(f"the {kind} data end in the middle: the file is truncated") from None
                except (zlib.error, gzip.BadGzipFile, zstd.ZstdError) as error:
                    raise _Damaged(f"the {kind} data are damaged ({error})") from None
                self.bytes_read = stored.tell()
                return data

            yield read

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
                rows = file.metadata.num_rows
                for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[self.text_key]):
                    yield ParquetRows(batch.column(0), line)
                    line += batch.num_rows
                    self.bytes_read = int(self.size_bytes * line / max(rows, 1))
        except (pyarrow.ArrowInvalid, pyarrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk's, not the file's
            raise CutShort(line, f"the Parquet file is damaged or truncated ({str(error).splitlines()[0]})") from None


def format_of(name: str) -> str:
    """Return which of FORMATS a file or URL of this name has.

    Raises:
        BenchError: none of them.
    """
    for suffix in sorted(FORMATS, key=len, reverse=True):
        if name.lower().endswith(suffix):
            return suffix
    raise BenchError(f"{name}: unknown format; valid: {', '.join(FORMATS)}")


class _Damaged(Exception):
    """The compressed data cannot be read any further."""


def _split(pieces: list[bytes], line: int) -> tuple[JsonLines, bytes]:
    """Return the whole lines in `pieces` as a block, and the beginning of the next line."""
    data = b"".join(pieces)
    end = data.rfind(b"\n") + 1
    return JsonLines(data[:end], line), data[end:]


@dataclass(frozen=True)
class JsonLines:
    """Whole lines, each a JSON object with the text under a key; `before` lines precede them in the file."""

    data: bytes
    before: int

    @property
    def lines(self) -> int:
        return self.data.count(b"\n") + (not self.data.endswith(b"\n"))

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
    except UnicodeDecodeError as error:
        raise ValueError(f"invalid UTF-8 (byte {error.start + 1} of the line)") from None
    except ValueError as error:
        raise ValueError(f"broken JSON ({error})") from None
    except RecursionError:
        raise ValueError("broken JSON (nested too deeply)") from None
    if not isinstance(document, dict):
        raise ValueError(f"not a JSON object but {type(document).__name__}")
    if text_key not in document:
        raise ValueError(f"no {text_key!r}")
    text = document[text_key]
    if not isinstance(text, str):
        raise ValueError(f"{text_key!r} is not a string but {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{text_key!r} has half of a surrogate pair, which is not Unicode text") from None
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
        import pyarrow

        kind = self.column.type
        column = self.column
        # As bytes: one string that is not UTF-8 would spoil the conversion of all.
        if pyarrow.types.is_string(kind):
            column = column.view(pyarrow.binary())
        elif pyarrow.types.is_large_string(kind):
            column = column.view(pyarrow.large_binary())
        texts: list[str] = []
        bad: list[BadDocument] = []
        for number, value in enumerate(column.to_pylist(), start=self.before + 1):
            try:
                text = value.decode("utf-8") if isinstance(value, bytes) else value
            except UnicodeDecodeError as error:
                bad.append(BadDocument(number, f"invalid UTF-8 (byte {error.start + 1} of the text)"))
                continue
            if isinstance(text, str):
                texts.append(text)
            else:
                reason = f"no {text_key!r}" if text is None else f"{text_key!r} is not a string but {kind}"
                bad.append(BadDocument(number, reason))
        return texts, bad


#: Consecutive documents, not yet decoded.
Block = JsonLines | ParquetRows
