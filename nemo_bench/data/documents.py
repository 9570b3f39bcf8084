"""Documents out of shards: JSON Lines (plain, zstd, gzip) and Parquet, a block at a time, from the stored file."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import orjson
from backports import zstd

from nemo_bench.errors import BenchError

FORMATS = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".parquet")

BLOCK_BYTES = 2 << 20  # of text: enough to keep all threads busy, and some dozens of blocks in memory are little
_LONGEST_LINE = 256 << 20  # a longer one is not a document but a file of another kind


@dataclass(frozen=True)
class Block:
    """Consecutive documents, not yet decoded: lines of JSON, or values of a Parquet column."""

    rows: Any
    before: int  # lines or rows that precede it in the file

    def texts(self, text_key: str) -> tuple[list[str], list[tuple[int, str]]]:
        """Return the usable documents in order, and of the others the line, which counts from 1, and the reason."""
        texts: list[str] = []
        bad: list[tuple[int, str]] = []
        is_json = isinstance(self.rows, list)
        for number, row in enumerate(self.rows, start=self.before + 1):
            try:
                text = _text_of_line(row, text_key) if is_json else _checked(row.as_py(), text_key)
                if text is not None:
                    texts.append(text)
            except UnicodeError as error:
                bad.append((number, f"{text_key!r} is not Unicode text ({error})"))
            except ValueError as reason:
                bad.append((number, str(reason)))
        return texts, bad


def _text_of_line(line: bytes, text_key: str) -> str | None:
    """Return the text of a JSON line, None for a blank one; raise ValueError with the reason if it has none."""
    try:
        text = orjson.loads(line)[text_key]
        if type(text) is str:
            return text
    except (ValueError, KeyError, TypeError):
        if not line or line.isspace():
            return None
    try:  # Python's own json, which Megatron reads with, takes more than the standard allows.
        document = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"broken JSON ({error})") from None
    return _checked(document.get(text_key) if isinstance(document, dict) else None, text_key)


def _checked(value: object, text_key: str) -> str:
    if value is None:
        raise ValueError(f"no {text_key!r}")
    text = value.decode("utf-8") if isinstance(value, bytes) else value
    if not isinstance(text, str):
        raise ValueError(f"{text_key!r} is not a string but {type(text).__name__}")
    text.encode("utf-8")  # UnicodeError: half of a surrogate pair
    return text


class Reader:
    """The blocks of one file, of which `bytes_read` of `size_bytes` have been read.

    Raises BenchError if its format is unknown, it cannot be read, or is damaged or cut short.
    """

    def __init__(self, path: Path, text_key: str = "text") -> None:
        self.path, self.text_key = path, text_key
        self.format = format_of(path.name)
        self.bytes_read = 0
        try:
            with open(path, "rb"):
                self.size_bytes = path.stat().st_size
        except OSError as error:
            raise BenchError(f"Cannot read {path}: {error.strerror}. Correct the path or its permissions.") from error

    def blocks(self) -> Iterator[Block]:
        """Give all blocks in order; raise OSError for the disk."""
        return self._parquet() if self.format == ".parquet" else self._json_lines()

    def _json_lines(self) -> Iterator[Block]:
        before, rest = 0, b""
        try:
            with open(self.path, "rb") as stored:
                stream = self._decompressed(stored)
                while piece := stream.read(BLOCK_BYTES):
                    self.bytes_read = stored.tell()
                    *lines, rest = (rest + piece).split(b"\n")
                    yield Block(lines, before)
                    before += len(lines)
                    if len(rest) > _LONGEST_LINE:
                        long = f"line {before + 1:,} is longer than {_LONGEST_LINE >> 20} MiB"
                        raise BenchError(f"{self.path}: {long}: is this a file of JSON Lines, one document a line?")
        except EOFError:
            raise self._damaged("the compressed data end in the middle: the file is truncated") from None
        except (zlib.error, gzip.BadGzipFile, zstd.ZstdError) as error:
            raise self._damaged(f"the compressed data are damaged ({error})") from None
        yield Block([rest], before)

    def _damaged(self, damage: str) -> BenchError:
        return BenchError(f"{self.path}: {damage}. Download or copy it again")

    def _decompressed(self, stored: IO[bytes]) -> Any:
        if self.format == ".jsonl.gz":
            return gzip.GzipFile(fileobj=stored)
        if self.format == ".jsonl.zst":
            # Some shards are written with long windows, which are refused unless asked for.
            return zstd.ZstdFile(stored, options={zstd.DecompressionParameter.window_log_max: 31})
        return stored

    def _parquet(self) -> Iterator[Block]:
        import pyarrow
        import pyarrow.parquet

        before = 0
        try:
            # In small pieces: by itself the library holds a whole row group in memory, which may be a gigabyte.
            with pyarrow.parquet.ParquetFile(self.path, pre_buffer=False, buffer_size=1 << 20) as file:
                if self.text_key not in file.schema_arrow.names:
                    raise BenchError(
                        f"{self.path} has no column {self.text_key!r}: text_key=... names the column that holds the "
                        f"text; the columns are {', '.join(file.schema_arrow.names)}"
                    )
                for batch in file.iter_batches(batch_size=64, columns=[self.text_key]):
                    yield Block(batch.column(0), before)
                    before += batch.num_rows
                    self.bytes_read = self.size_bytes * before // file.metadata.num_rows
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk's, not the file's
            damage = f"the Parquet file is damaged or truncated ({str(error).splitlines()[0]})"
            raise self._damaged(damage) from None


def format_of(name: str) -> str:
    """Return which of FORMATS a file or URL of this name has; raise BenchError if it has none of them."""
    for suffix in FORMATS:
        if name.lower().endswith(suffix):
            return suffix
    raise BenchError(f"{name}: unknown format; valid: {', '.join(FORMATS)}")
