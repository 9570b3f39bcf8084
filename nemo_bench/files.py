"""Files that several processes, on several machines, make and read: names, locks, sizes."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_bench.errors import BenchError


def dated_name() -> str:
    """`<date>-<time>-<random>`: a name that sorts by time, also for what is named in the same second."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"


def size_text(size_bytes: int) -> str:
    """A size for people: `19.3 GB`, `12.0 kB`, `14 bytes`."""
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 1000)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.1f} {unit}"
    return f"{size_bytes} bytes"


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable, where the file system can (some have no fsync on a folder)."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path, what: str, report: Callable[[str], None] | None) -> Iterator[int]:
    """Holds the lock file `path`, waiting for it with a line to `report`, or not at all without `report`.

    Gives its descriptor. The kernel frees it when this process has ended, and all that inherited the descriptor. The
    file stays: were it removed, a process waiting on the old file and one that makes a new file would both hold "the"
    lock.

    Args:
        path: in the folder where the files are made; its folder must exist.
        what: what its holder does, in the third person: "makes the dataset".

    Raises:
        BlockingIOError: it is held, and `report` is None.
        BenchError: the file system has no locks.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if report is None:
                    raise
                report(f"Waiting for another process that {what} (`fuser -v {path}` names it).")
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            raise BenchError(
                f"The file system of {path.parent} does not support file locks ({error.strerror}): choose "
                "a folder on another one, or mount it with locks (Lustre: -o flock)."
            ) from error
        yield descriptor
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's contents, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(4 << 20):
            digest.update(chunk)
    return digest.hexdigest()
