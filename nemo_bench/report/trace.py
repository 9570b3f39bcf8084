"""Traces of PyTorch's profiler (Chrome's trace event format), read event by event.

A trace of a few steps of a large model is some hundred MB of JSON. Read whole, its objects take ten times that; here
they live a few MB at a time, as long as the file is laid out as the profiler writes it. And it is not always JSON:
values that are empty, `inf` or `nan`, and names with quotation marks and bytes of any kind have been seen in it.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from nemo_bench.errors import BenchError

_CHUNK_BYTES = 4 << 20
_LIST = re.compile(rb'"traceEvents"\s*:\s*\[|\A\s*\[')
# Between two events, in the profiler's layout; what stands within an event is indented further.
_BETWEEN = b"\n  },\n  {"
_LIST_ENDS = b"\n  ]"
_NO_VALUE = re.compile(rb'(":\s*)(?:-?(?:nan|inf))?(?=\s*[,}])')


class Trace:
    """The events of a trace file, plain or gzipped.

    Attributes:
        about: what the file says beside its events (`deviceProperties`, `distributedInfo`, ...).
        damaged: how many events could not be read, and are left out. Both are complete once the events were read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.about: dict[str, Any] = {}
        self.damaged = 0

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
        loads = _reader()
        text = b""
        while (begin := _LIST.search(text)) is None:
            chunk = file.read(_CHUNK_BYTES)
            if not chunk:
                raise ValueError("it has no traceEvents")
            text += chunk
        bare = not begin[0].startswith(b'"')  # a list alone, as Chrome takes it too
        if not bare:
            with contextlib.suppress(ValueError):  # the events count, whatever stands ahead of them
                self.about = loads(text[: begin.start()].rstrip().rstrip(b",") + b"}")
        text = text[begin.end() :]
        while chunk := file.read(_CHUNK_BYTES):
            text += chunk
            cut = text.rfind(_BETWEEN)
            if cut >= 0:
                cut = text.index(b"}", cut) + 1
                yield from self._readable(text[:cut])
                text = text[cut:].lstrip(b",\n ")
        whole = (b"[" if bare else b'{"traceEvents":[') + text
        try:
            rest = loads(whole)
        except ValueError:
            events, end, _ = text.rpartition(_LIST_ENDS)
            if not end:
                raise
            yield from self._readable(events)
        else:
            yield from rest if bare else rest.pop("traceEvents")
            self.about |= {} if bare else rest

    def _readable(self, events: bytes) -> Iterator[dict[str, Any]]:
        """Some events in the profiler's layout; where they are no JSON, those of them that are, or can be mended."""
        loads = _reader()
        try:
            parsed = loads(b"[" + events + b"]")
        except ValueError:
            for event in events.strip().removeprefix(b"{").removesuffix(b"}").split(_BETWEEN):
                text = event.decode("utf-8", "replace").encode()
                try:
                    yield loads(b"{" + _NO_VALUE.sub(rb"\1null", text) + b"}")
                except ValueError:
                    self.damaged += 1
        else:
            yield from parsed


def _reader() -> Callable[[bytes], Any]:
    """What reads JSON here: orjson, or, in a container without it, the standard library, slower."""
    try:
        import orjson
    except ImportError:
        return json.loads
    return orjson.loads
