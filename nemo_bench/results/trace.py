"""Traces of PyTorch's profiler (Chrome's trace event format), read event by event.

A trace of a few steps of a large model is some hundred MB of JSON. Read whole, its objects take ten times that; here
they live a few MB at a time.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from nemo_bench.errors import BenchError

_CHUNK_BYTES = 4 << 20
# The end of one event and the beginning of the next. No string of JSON holds a line's end, so this is never within one.
_BETWEEN = re.compile(rb"\}\s*,\s*\n\s*(?=\{)")
_LIST = re.compile(rb'"traceEvents"\s*:\s*\[|\A\s*\[')


class Trace:
    """The events of a trace file, plain or gzipped.

    Attributes:
        about: what the file says beside its events (`deviceProperties`, `distributedInfo`, ...); complete once the
            events were read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.about: dict[str, Any] = {}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The events.

        Raises:
            BenchError: the file cannot be read, is no trace, or is cut off.
        """
        try:
            with open(self.path, "rb") as file:
                packed = file.read(2) == b"\x1f\x8b"
                file.seek(0)
                plain = cast("IO[bytes]", gzip.GzipFile(fileobj=file)) if packed else file
                yield from self._events(plain)
        except OSError as error:
            raise BenchError(f"{self.path}: cannot be read ({error.strerror or error})") from None
        except (ValueError, EOFError, zlib.error) as error:
            raise BenchError(f"{self.path}: no trace of PyTorch's profiler, or cut off ({error})") from None

    def _events(self, file: IO[bytes]) -> Iterator[dict[str, Any]]:
        import orjson

        text = b""
        while (begin := _LIST.search(text)) is None:
            chunk = file.read(_CHUNK_BYTES)
            if not chunk:
                raise ValueError("it has no traceEvents")
            text += chunk
        bare = not begin[0].startswith(b'"')  # a list alone, as Chrome takes it too
        if not bare:
            head = text[: begin.start()].rstrip().rstrip(b",") + b"}"
            self.about = orjson.loads(head)
        text = text[begin.end() :]
        searched = 0
        while chunk := file.read(_CHUNK_BYTES):
            text += chunk
            cuts = deque(_BETWEEN.finditer(text, max(0, searched - 256)), maxlen=1)
            searched = len(text)
            if not cuts:
                continue
            cut = cuts[0]
            try:
                events = orjson.loads(b"[" + text[: cut.start() + 1] + b"]")
            except orjson.JSONDecodeError:
                continue  # the cut was in a list within an event: a later one will do, or the end
            yield from events
            text, searched = text[cut.end() :], 0
        if bare:
            yield from orjson.loads(b"[" + text)
        else:
            rest = orjson.loads(b'{"traceEvents":[' + text)
            yield from rest.pop("traceEvents")
            self.about |= rest
