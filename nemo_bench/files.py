"""Files that several processes, on several machines, write and read: written aside and renamed, locked, hashed."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from nemo_bench.errors import BenchError


def dated_name() -> str:
    """Return `<date>-<time>-<random>`: sorts by time, and differs within a second."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"


def temporary_path(path: Path) -> Path:
    """Return a name next to `path` that only this process uses; reports and listings skip it."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextmanager
def atomic_file(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a new file, "w" (UTF-8) or "wb", that replaces `path` in one step when the block ends, unless it raises."""
    temporary = temporary_path(path)
    try:
        # A path in the text may hold bytes that are no text in this locale.
        encoding, errors = (None, None) if "b" in mode else ("utf-8", "surrogateescape")
        with open(temporary, mode, encoding=encoding, errors=errors) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def plain_yaml(path: Path) -> str:
    """Return the text of a YAML file; raise ValueError if it has aliases, which can grow without bound."""
    import yaml  # this module is also imported where there is the standard library only

    text = path.read_text()
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, loader)):
        raise ValueError("YAML aliases are not read")
    return text


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step."""
    with atomic_file(path) as file:
        file.write(text)


def write_json(path: Path, content: Any) -> None:
    """Replace `path` by indented JSON in one step."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def hidden_path(path: Path) -> Path:
    """Return the folder next to `path` in which it is made; reports and listings skip it."""
    return path.with_name(f".{path.name}.making")


@contextmanager
def hidden_folder(path: Path) -> Iterator[Path]:
    """Give `hidden_path`, empty, and remove it at the end. Callers hold a lock: what was there a kill has left."""
    folder = hidden_path(path)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def replace_durably(new: Path, path: Path) -> None:
    """Rename a file, or a folder and all in it, once it is durable: no name then appears without its contents."""
    for entry in (new, *new.rglob("*")):
        fsync(entry)
    path.parent.mkdir(parents=True, exist_ok=True)
    os.replace(new, path)
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Make a file, or the names in a folder, durable, where the file system can (some cannot for folders)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(descriptor)


@contextmanager
def explained_disk_errors(folder: Path, remedy: str) -> Iterator[None]:
    """Turn the OSError of a full disk, a read-only folder or a file in its place into a BenchError with the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BenchError(f"No space left in {folder}: {remedy}") from None
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
            raise BenchError(f"Cannot write in {folder} ({error.strerror}): {remedy}") from None
        raise


@contextmanager
def locked(path: Path, what: str) -> Iterator[int]:
    """Hold the lock file `path` and give its descriptor; say so when it waits for a process that `what`.

    All that inherit the descriptor hold it. The file stays: else one process could wait for the old and lock a new one.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Waiting for another process that {what} (`fuser -v {path}` names it).", flush=True)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            why = f"The file system of {path.parent} does not support file locks ({error.strerror}): choose another"
            raise BenchError(f"{why}, or mount it with locks (Lustre: -o flock).") from error
        yield descriptor
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's contents."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(4 << 20):
            digest.update(chunk)
    return digest.hexdigest()
