"""Traces of PyTorch's profiler, in Chrome's trace event format.

They are not always JSON: empty, `inf` and `nan` values, and names with unescaped quotation marks have been seen.
"""

from __future__ import annotations

import gzip
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_bench.errors import BenchError

Event = dict[str, Any]

# How the profiler lays out the list of events; the fields of an event are indented further.
_LIST_BEGINS, _BETWEEN_EVENTS, _LIST_ENDS = b'"traceEvents": [', b"\n  },\n  {", b"\n  ]"
_NO_VALUE = re.compile(rb'(":\s*)(?:-?(?:nan|inf))?(?=\s*[,}])')


@dataclass(frozen=True)
class Trace:
    """The content of a trace file."""

    events: list[Event]  # those that have a duration, with `name`, `ts` and `args`
    header: dict[str, Any]  # what else the file holds: deviceProperties, distributedInfo, ...
    unreadable: int  # events that were left out because they are not JSON


def read_trace(path: Path) -> Trace:
    """Read a trace file, plain or gzipped.

    Raises:
        BenchError: the file cannot be read, is not a trace, or is cut off.
    """
    import orjson

    try:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise BenchError(f"{path}: cannot be read ({error})") from None
    unreadable = 0
    try:
        parsed = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        if _LIST_BEGINS not in content or _LIST_ENDS not in content:
            raise BenchError(f"{path}: not a trace of PyTorch's profiler, or cut off ({error})") from None
        parsed, unreadable = _mended(content)
    if isinstance(parsed, list):  # Chrome accepts the list of events alone
        parsed = {"traceEvents": parsed}
    if not isinstance(parsed, dict) or not isinstance(parsed.get("traceEvents"), list):
        raise BenchError(f"{path}: not a trace of PyTorch's profiler (it has no list traceEvents)")
    events = [event for event in parsed.pop("traceEvents") if _is_timed(event)]
    for event in events:
        event.setdefault("args", {})
    return Trace(events, parsed, unreadable)


def _is_timed(event: Any) -> bool:
    is_span = isinstance(event, dict) and event.get("ph") == "X" and isinstance(event.get("name"), str)
    return is_span and all(isinstance(value, (int, float)) for value in (event.get("ts"), event.get("dur", 0)))


def _mended(content: bytes) -> tuple[dict[str, Any], int]:
    """Return the trace with null for values that are not JSON, and the number of events that remain unreadable."""
    import orjson

    header, _, rest = content.partition(_LIST_BEGINS)
    parsed: dict[str, Any] = orjson.loads(header.rstrip().rstrip(b",") + b"}")
    events, unreadable = [], 0
    list_text = rest.rpartition(_LIST_ENDS)[0].strip()
    for text in list_text.removeprefix(b"{").removesuffix(b"}").split(_BETWEEN_EVENTS):
        try:
            valid_utf8 = text.decode("utf-8", "replace").encode()
            events.append(orjson.loads(b"{" + _NO_VALUE.sub(rb"\1null", valid_utf8) + b"}"))
        except orjson.JSONDecodeError:
            unreadable += 1
    return {**parsed, "traceEvents": events}, unreadable
