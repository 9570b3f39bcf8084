"""What `runs=` and `baseline=` name: run folders and logs, wherever they lie."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from nemo_bench.errors import BenchError
from nemo_bench.record.folder import RUN

_LOG_SUFFIXES = (".out", ".log", ".txt", ".err", ".out.gz", ".log.gz", ".txt.gz")
# Megatron's description of a dataset that it cached
_NO_LOG = "-description.txt"


def find(paths: Sequence[Path], key: str = "runs") -> tuple[list[Path], list[str]]:
    """Return the run folders and log files that `paths` name or hold, each once, and what could not be looked into.

    In a folder, every run folder below it is found, and every log (.out, .log, .txt, .err) that is in none of them.

    Raises:
        BenchError: a path does not exist, or is neither a file nor a folder.
    """
    inputs: dict[Path, None] = {}
    closed: list[str] = []
    seen: set[Path] = set()
    for path in paths:
        if not path.is_file() and not path.is_dir():
            what = "neither a file nor a folder" if path.exists() else "there is no such file or folder"
            raise BenchError(f"{key}={path}: {what}\n  name run folders, folders that hold some, or log files")
        for run in [path] if path.is_file() else _below(path, seen, closed):
            inputs[run.resolve()] = None
    return list(inputs), closed


def _below(folder: Path, seen: set[Path], closed: list[str]) -> Iterator[Path]:
    real = folder.resolve()
    if real in seen:  # by a link, perhaps to a folder above
        return
    seen.add(real)
    try:
        if (folder / RUN).is_file():
            yield folder
            return
        entries = sorted(folder.iterdir())
    except OSError as error:
        closed.append(f"{folder}: cannot be looked into ({error.strerror})")
        return
    for path in entries:
        if path.is_dir() and not path.name.startswith("."):
            yield from _below(path, seen, closed)
        elif path.name.endswith(_LOG_SUFFIXES) and not path.name.endswith(_NO_LOG) and path.is_file():
            yield path


def unique_names(paths: Sequence[Path]) -> list[str]:
    """Return a name for each path: its last part, with as many parts before it as it takes to tell all apart."""
    names = [path.name for path in paths]
    for depth in range(2, max((len(path.parts) for path in paths), default=0) + 1):
        counts = Counter(names)
        if max(counts.values(), default=0) < 2:
            break
        names = ["/".join(path.parts[-depth:]) if counts[name] > 1 else name for name, path in zip(names, paths)]
    return [re.sub(r"^/+", "/", name) for name in names]
