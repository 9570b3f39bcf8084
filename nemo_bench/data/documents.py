"""Documents out of shards: JSON Lines (plain, zstd, gzip) and Parquet, a block at a time, from the stored file.

A block is raw; the thread that encodes it also takes it apart (`Block.texts`). What cannot be used is named with its
line, and never ends the reading by itself: the caller decides how much of it is too much.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nemo_bench.errors import BenchError

FORMATS = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".parquet")

#: Bytes of text in a block: so much keeps all threads busy, and some dozens of blocks in memory are little.
BLOCK_BYTES = 2 << 20
#: Compressed bytes handed to the decompressor at once.
_READ_BYTES = 64 << 10
#: A line longer than this is not a document but a file of another kind.
_LONGEST_LINE = 256 << 20
_PARQUET_ROWS = 64


@dataclass(frozen=True)
class BadDocument:
    """A document that cannot be used: `line` counts from 1 (in Parquet, rows), `reason` is a clause."""

    line: int
    reason: str


class Block(Protocol):
    """Some documents in a row, not yet decoded."""

    @property
    def lines(self) -> int:
        """How many lines (rows) it covers."""

    def texts(self, text_key: str) -> tuple[list[str], list[BadDocument]]:
        """Its usable documents in order, and the unusable ones."""


class CutShort(Exception):
    """The file ends, or is damaged, in the middle of its data: what comes after `line` is missing."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(f"after line {line:,}: {reason}")
        self.line = line
        self.reason = reason


class Reader:
    """The blocks of one file, and how far into it (in stored bytes) the reading is."""

    def __init__(self, path: Path, text_key: str = "text") -> None:
        """Raises BenchError: the file's format is unknown, or it cannot be read."""
        self.path = path
        self.text_key = text_key
        self.format = format_of(path.name)
        self.bytes_read = 0
        try:
            self.size_bytes = path.stat().st_size
            with open(path, "rb"):
                pass
        except OSError as error:
            raise BenchError(f"Cannot read {path}: {error.strerror}. Correct the path, or its permissions.") from error

    def blocks(self) -> Iterator[Block]:
        """All blocks in order.

        Raises:
            CutShort: after the last whole document of a truncated or damaged file.
            OSError: the disk.
        """
        return self._parquet() if self.format == ".parquet" else self._json_lines()

    def _json_lines(self) -> Iterator[Block]:
        line = 0  # lines given out
        pieces: list[bytes] = []  # of the next block
        size = 0
        cut: CutShort | None = None
        chunks = self._decompressed()
        while True:
            try:
                chunk = next(chunks)
            except StopIteration:
                break
            except _Damaged as error:
                cut = CutShort(0, str(error))
                break
            pieces.append(chunk)
            size += len(chunk)
            if size < BLOCK_BYTES:
                continue
            data = b"".join(pieces)
            start = 0
            # More than once where a small chunk holds much: text that repeats itself is packed a thousandfold.
            while (end := _end_of_block(data, start)) > start:
                block = JsonLines(data[start:end], line)
                yield block
                line += block.lines
                start = end
            pieces, size = [data[start:]], len(data) - start
            if start:
                continue
            if size > _LONGEST_LINE:
                raise BenchError(
                    f"{self.path}: line {line + 1:,} is longer than {_LONGEST_LINE >> 20} MiB: is this a file of JSON "
                    f"Lines, one document a line? Known formats: {', '.join(FORMATS)}"
                )
            size = 0  # a long line: joined again only after as much again has come
        data = b"".join(pieces)
        if cut is not None:
            data = data[: data.rfind(b"\n") + 1]  # the line that was cut through is lost with the rest
        if data:
            block = JsonLines(data, line)
            yield block
            line += block.lines
        if cut is not None:
            raise CutShort(line, cut.reason)

    def _decompressed(self) -> Iterator[bytes]:
        with open(self.path, "rb") as file:
            if self.format == ".jsonl":
                while chunk := file.read(1 << 20):
                    self.bytes_read += len(chunk)
                    yield chunk
            else:
                yield from self._frames(file)

    def _frames(self, file: Any) -> Iterator[bytes]:
        """Decompressed chunks of a file of zstd frames or gzip members, of which there may be several.

        Frame by frame, since a stream reader gives no sign when a file ends in the middle of a frame; and never more
        than a block at once, since text that repeats itself is packed ten thousandfold.
        """
        kind = self.format.rpartition(".")[2]
        frame: _Frame | None = None
        while chunk := file.read(_READ_BYTES):
            self.bytes_read += len(chunk)
            while chunk or (frame is not None and frame.holds_more):
                if frame is None:
                    if not chunk.strip(b"\0"):
                        break  # padding after the last gzip member
                    frame = _GzipFrame() if kind == "gz" else _ZstdFrame()
                try:
                    data = frame.decompress(chunk)
                except frame.errors as error:
                    raise _Damaged(f"the {kind} data are damaged ({error})") from None
                if data:
                    yield data
                chunk = b""
                if frame.eof:
                    chunk, frame = frame.rest, None
        if frame is not None:
            raise _Damaged(f"the {kind} data end in the middle: the file is truncated")

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
                        f"text; it has: {', '.join(file.schema_arrow.names)}"
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
    """The one of FORMATS that a file or URL of this name has.

    Raises:
        BenchError: it has none of them.
    """
    for suffix in sorted(FORMATS, key=len, reverse=True):
        if name.lower().endswith(suffix):
            return suffix
    raise BenchError(f"{name}: not a format of documents that is known here: {', '.join(FORMATS)}")


def _end_of_block(data: bytes, start: int) -> int:
    """Where the block that begins at `start` ends, after a newline; `start` where not enough has come for one."""
    full = start + BLOCK_BYTES
    if len(data) < full:
        return start
    end = data.rfind(b"\n", start, full) + 1 or data.find(b"\n", full) + 1
    return end or start


class _Damaged(Exception):
    """The compressed data cannot be read on."""


class _Frame(Protocol):
    """One compressed frame: fed chunk by chunk, and asked again without one while it `holds_more`."""

    errors: Any

    def decompress(self, chunk: bytes) -> bytes: ...
    @property
    def holds_more(self) -> bool: ...
    @property
    def eof(self) -> bool: ...
    @property
    def rest(self) -> bytes: ...


class _ZstdFrame:
    def __init__(self) -> None:
        # The library of Python 3.14, for older ones: others have no bound on what a chunk becomes.
        from backports import zstd

        # Some shards are written with long windows, which are refused unless asked for.
        self._frame = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: 31})
        self.errors = zstd.ZstdError

    def decompress(self, chunk: bytes) -> bytes:
        data: bytes = self._frame.decompress(chunk, max_length=BLOCK_BYTES)
        return data

    @property
    def holds_more(self) -> bool:
        return not (self._frame.eof or self._frame.needs_input)

    @property
    def eof(self) -> bool:
        return bool(self._frame.eof)

    @property
    def rest(self) -> bytes:
        data: bytes = self._frame.unused_data
        return data


class _GzipFrame:
    errors = zlib.error

    def __init__(self) -> None:
        self._frame = zlib.decompressobj(wbits=31)

    def decompress(self, chunk: bytes) -> bytes:
        return self._frame.decompress(chunk or self._frame.unconsumed_tail, BLOCK_BYTES)

    @property
    def holds_more(self) -> bool:
        return not self._frame.eof and bool(self._frame.unconsumed_tail)

    @property
    def eof(self) -> bool:
        return self._frame.eof

    @property
    def rest(self) -> bytes:
        return self._frame.unused_data


@dataclass(frozen=True)
class JsonLines:
    """Whole lines, each a JSON object with the text under a key; `before` lines come before them in the file."""

    data: bytes
    before: int

    @property
    def lines(self) -> int:
        return self.data.count(b"\n") + (not self.data.endswith(b"\n"))

    def texts(self, text_key: str) -> tuple[list[str], list[BadDocument]]:
        import orjson

        texts: list[str] = []
        bad: list[BadDocument] = []
        loads = orjson.loads
        for number, line in enumerate(self.data.split(b"\n")):
            try:
                text = loads(line)[text_key]
                if type(text) is str:
                    texts.append(text)
                    continue
            except (ValueError, KeyError, TypeError):
                pass
            if not line or line.isspace():
                continue
            found = _text_of(line, text_key)
            if isinstance(found, str):
                texts.append(found)
            else:
                bad.append(BadDocument(self.before + number + 1, found.reason))
        return texts, bad


@dataclass(frozen=True)
class _Reason:
    reason: str


def _text_of(line: bytes, text_key: str) -> str | _Reason:
    """The text of a line that the quick look refused: Python's own json, which Megatron reads with, decides."""
    try:
        decoded = line.decode("utf-8")
    except UnicodeDecodeError as error:
        return _Reason(f"invalid UTF-8 (byte {error.start + 1} of the line)")
    try:
        document = json.loads(decoded)
    except ValueError as error:
        return _Reason(f"broken JSON ({error})")
    except RecursionError:
        return _Reason("broken JSON (nested too deeply)")
    if not isinstance(document, dict):
        return _Reason(f"not a JSON object but {type(document).__name__}")
    if text_key not in document:
        return _Reason(f"no {text_key!r}")
    text = document[text_key]
    if not isinstance(text, str):
        return _Reason(f"{text_key!r} is not a string but {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return _Reason(f"{text_key!r} has half of a surrogate pair, which is no Unicode text")
    return text


@dataclass(frozen=True)
class ParquetRows:
    """A column of text, string or binary; `before` rows come before it in the file."""

    column: Any
    before: int

    @property
    def lines(self) -> int:
        return len(self.column)

    def texts(self, text_key: str) -> tuple[list[str], list[BadDocument]]:
        import pyarrow

        kind = self.column.type
        if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
            # As bytes: one string that is not UTF-8 would spoil the conversion of all.
            binary = pyarrow.large_binary() if pyarrow.types.is_large_string(kind) else pyarrow.binary()
            values = self.column.view(binary).to_pylist()
        else:
            values = self.column.to_pylist()
        texts: list[str] = []
        bad: list[BadDocument] = []
        for number, value in enumerate(values, start=self.before + 1):
            if isinstance(value, bytes):
                try:
                    value = value.decode("utf-8")
                except UnicodeDecodeError as error:
                    bad.append(BadDocument(number, f"invalid UTF-8 (byte {error.start + 1} of the text)"))
                    continue
            if isinstance(value, str):
                texts.append(value)
            else:
                reason = f"no {text_key!r}" if value is None else f"{text_key!r} is not a string but {kind}"
                bad.append(BadDocument(number, reason))
        return texts, bad
