"""Files of the stage folder: measured, written beside their place and renamed into it, locked, and room for them."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from nemo_bench.errors import BenchError
from nemo_bench.files import fsync_folder, size_text

CHUNK_BYTES = 1 << 20
# Below this a progress bar would be gone before it is seen.
_WORTH_SHOWING_BYTES = 256 << 20

Advance = Callable[[int], None]  # called with the number of bytes done since the last call


@dataclass(frozen=True)
class FileRecord:
    """A file as it was when it was recorded; `sha256` is hexadecimal."""

    size_bytes: int
    sha256: str
    mtime_ns: int


def say(line: str) -> None:
    """A line for the person who waits; also where output goes to a file."""
    print(line, flush=True)


@contextlib.contextmanager
def byte_progress(title: str, total_bytes: int) -> Iterator[Advance]:
    """Shows how far a pass over much data is: a bar on a terminal, a line at its beginning elsewhere."""
    if total_bytes < _WORTH_SHOWING_BYTES:
        yield lambda _: None
        return
    from nemo_bench.report.terminal import make_console

    console = make_console()
    if not console.is_terminal:
        say(f"{title} ({size_text(total_bytes)})")
        yield lambda _: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(24), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task(title, total=total_bytes)
        yield lambda size: bar.update(task, advance=size)


def measure(path: Path, advance: Advance = lambda _: None) -> FileRecord:
    """Reads a file in whole.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(CHUNK_BYTES):
            digest.update(block)
            advance(len(block))
        status = os.fstat(file.fileno())
        return FileRecord(file.tell(), digest.hexdigest(), status.st_mtime_ns)


def walk(path: Path) -> list[Path]:
    """The file `path`, or all files below the folder `path`, but for what Python itself leaves beside its sources."""
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.rglob("*") if not file.is_dir() and "__pycache__" not in file.parts)


def make_durable(path: Path) -> None:
    """Puts a file, or all of a folder, on the disk, so that a rename never shows a name without its contents."""
    # At once: one after the other, a thousand small files take many seconds.
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(_fsync_file, walk(path)))
    if path.is_dir():
        for folder in (path, *(entry for entry in path.rglob("*") if entry.is_dir())):
            fsync_folder(folder)


def _fsync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


# --- places -------------------------------------------------------------------------------------------------


def aside(destination: Path, role: str = "making") -> Path:
    """A new hidden path beside `destination`, thus on its file system, that `leftovers` recognises."""
    return destination.parent / f".{destination.name}.{role}-{os.getpid()}-{secrets.token_hex(4)}"


def leftovers(destination: Path) -> list[Path]:
    """What killed processes left beside `destination`; only with its lock held is it known that they are dead."""
    prefixes = (f".{destination.name}.making-", f".{destination.name}.replaced-")
    try:
        names = os.listdir(destination.parent)
    except OSError:
        return []
    return [destination.parent / name for name in names if name.startswith(prefixes)]


def remove(path: Path) -> None:
    """Removes a file or folder as far as that goes: a file that NFS keeps is left to a later call."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def publish(made: Path, destination: Path) -> None:
    """Gives the finished file or folder `made` the name `destination`.

    Where that is a folder already, only the files that it lacks are moved into it: the caller has seen that the others
    are the same.
    """
    if not os.path.lexists(destination):
        os.rename(made, destination)
        fsync_folder(destination.parent)
        return
    for file in walk(made):
        place = destination / file.relative_to(made)
        if not os.path.lexists(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            os.rename(file, place)
            fsync_folder(place.parent)
    remove(made)


# --- room --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Room:
    """Free space that something needs below `folder`, which need not exist yet."""

    folder: Path
    size_bytes: int
    what: str


def require_room(needs: list[Room]) -> None:
    """Needs on one file system add up.

    Raises:
        BenchError: a file system has less free space than is needed there.
    """
    by_device: dict[int, list[Room]] = {}
    for need in needs:
        above = next(folder for folder in (need.folder, *need.folder.parents) if folder.exists())
        by_device.setdefault(above.stat().st_dev, []).append(need)
    short = []
    for same in by_device.values():
        above = next(folder for folder in (same[0].folder, *same[0].folder.parents) if folder.exists())
        free, needed = shutil.disk_usage(above).free, sum(need.size_bytes for need in same)
        if free < needed:
            what = ", ".join(f"{size_text(need.size_bytes)} for {need.what}" for need in same)
            short.append(f"  {same[0].folder}: {size_text(free)} free, {size_text(needed)} needed ({what})")
    if short:
        raise BenchError("not enough disk space; nothing was done:\n" + "\n".join(short))


_STAGE_PATH = "STAGE_PATH (or stage_path=...)"


def require_stage_folder(folder: Path) -> None:
    """Leaves nothing behind.

    Raises:
        BenchError: the stage folder is not there and cannot be made, or something else has its name.
    """
    if os.path.isdir(folder):
        return
    if os.path.lexists(folder):
        raise BenchError(f"{folder} is not a folder\n{_STAGE_PATH} must name a place that you can write")
    above = next(parent for parent in folder.parents if os.path.lexists(parent))
    try:
        # Tried, not asked for: access rights say nothing of read-only and special file systems.
        with tempfile.TemporaryDirectory(prefix=".nemo-bench-", dir=above):
            pass
    except OSError as error:
        raise BenchError(
            f"{folder} cannot be made ({above}: {error.strerror})\n{_STAGE_PATH} must name a place that you can write"
        ) from error


def writing_error(folder: Path, error: OSError, key: str = _STAGE_PATH) -> BenchError:
    """The error that tells the user of `error`, met while writing in `folder`, which `key` names."""
    if isinstance(error, BrokenPipeError):  # of our own output, whose reader went away: cli's to deal with
        raise error
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(next(above for above in (folder, *folder.parents) if above.exists())).free
        return BenchError(
            f"no space left in {folder} ({error.strerror}; {size_text(free)} are free now that what was half-made is "
            "gone): free some, and run this again"
        )
    return BenchError(f"{folder} cannot be written: {error}\n{key} must name a place that you can write")
