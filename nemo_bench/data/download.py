"""Downloads of large files that outlive broken connections, killed jobs and company.

`download` brings one URL into one file. Beside its destination `<folder>/<name>` it keeps:

    .<name>.part       the bytes so far, renamed to <name> when complete and verified
    .<name>.part.json  what they are the beginning of: URL, validators, size, SHA-256
    .<name>.done.json  what <name> was when it was finished, by which later calls know it again
    .<name>.lock       locked by the process at work on it; stays, empty

So a file that has its name is complete, and a call that ends early, however it ends, is continued by the next one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_bench.data.remote import NETWORK_HINT, SHA256, RemoteFile, Retries, Source, Transient, cause_of, content_range
from nemo_bench.errors import BenchError
from nemo_bench.files import fsync_folder, locked, sha256_of, size_text

if TYPE_CHECKING:
    import requests

_log = logging.getLogger(__name__)

# A connection that is reset takes the chunk being filled with it, so it is no larger than speed asks for.
_CHUNK_BYTES = 64 * 1024
_HASH_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Downloaded:
    """A complete file on disk.

    Attributes:
        path: where it is, absolute.
        url: where it came from, without user name, password and query.
        size_bytes: its size.
        sha256: its hexadecimal SHA-256.
        cached: whether it was there before this call.
    """

    path: Path
    url: str
    size_bytes: int
    sha256: str
    cached: bool


class _Mismatch(Exception):
    """A complete file, or the announcement of one, is not the file expected; `str` says how, as a clause."""


def download(
    url: str,
    destination: Path,
    *,
    sha256: str | None = None,
    token: str | None = None,
    progress: Callable[[int, int | None], None] | None = None,
    report: Callable[[str], None] = _log.info,
    attempts: int = 8,
    backoff_s: float = 1.0,
    max_backoff_s: float = 60.0,
    timeout_s: float = 60.0,
) -> Downloaded:
    """Bring the file at `url` to `destination`, or find it there.

    Safe to call from several threads, processes and machines at once: one downloads, the others wait for it. A call
    that is killed, interrupted, or ended by an exception of a callback is continued by the next one. A finished file
    is known again by its size and time without reading it; one that was put there by hand is compared with what is
    known of it and then taken over.

    Args:
        url: an http or https URL; redirects are followed.
        destination: the file to be; its folder is made. A file that differs from the remote one is never replaced.
        sha256: its hexadecimal SHA-256, where the caller knows it.
        token: a bearer token, sent to the host of `url` alone.
        progress: called with the bytes that are there and the size (None: not known) when a transfer begins and as it
            goes on. The first number falls when the download has to start over.
        report: called with one line (no newline) for each thing a waiting user wants to know.
        attempts: how many attempts in a row may bring nothing new before it gives up.
        backoff_s: upper bound of the random wait after the first such attempt; it doubles with each.
        max_backoff_s: the longest wait, also where the server asks for a longer one.
        timeout_s: how long to wait for a connection, and for each next piece of data.

    Raises:
        BenchError: the server refuses the file, does not have it, sends another one than expected, or brings nothing
            new in `attempts` attempts; `destination` is there and differs; the disk is full, cannot be written or has
            no locks.
    """
    source = Source(url, token, timeout_s)
    wanted = _Wanted(None, _checked_sha256(sha256))
    destination = Path(os.path.abspath(destination))
    try:
        # Looked at without the lock first: reading a finished file takes no right to write beside it.
        if (found := _finished(destination, source, wanted)) is not None:
            return found
        destination.parent.mkdir(parents=True, exist_ok=True)
        with locked(_beside(destination, "lock"), f"downloads {destination}", report):
            if (found := _finished(destination, source, wanted)) is not None:
                return found
            if os.path.lexists(destination):
                return _adopt(destination, source, wanted, report)
            retries = Retries(attempts, backoff_s, max_backoff_s, report)
            with _Transfer(destination, source, wanted, retries, progress, report) as transfer:
                return transfer.run()
    except OSError as error:
        raise BenchError(
            f"Cannot download to {destination}: {error}. Choose a folder that you may write in, on a disk that works."
        ) from error


# --- what is known and what is there ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Wanted:
    """What is known about the file beforehand; the caller may know its checksum, a server both."""

    size_bytes: int | None
    sha256: str | None

    def check(self, size_bytes: int | None, sha256: str | None) -> None:
        """Raise _Mismatch where a file of this size and checksum (None: not known) is another one."""
        if None not in (self.size_bytes, size_bytes) and self.size_bytes != size_bytes:
            raise _Mismatch(f"has {size_bytes} bytes instead of {self.size_bytes}")
        if None not in (self.sha256, sha256) and self.sha256 != sha256:
            raise _Mismatch(f"has the SHA-256 {sha256} instead of {self.sha256}")

    def or_as_of(self, remote: RemoteFile) -> _Wanted:
        """This, with what a server says in place of what the caller does not know."""
        return _Wanted(remote.size_bytes, self.sha256 or remote.sha256)


def _checked_sha256(sha256: str | None) -> str | None:
    if sha256 is None:
        return None
    if not SHA256.fullmatch(sha256.lower()):
        raise BenchError(f"{sha256!r} is not a SHA-256: it has to be 64 hexadecimal digits.")
    return sha256.lower()


def _beside(destination: Path, role: str) -> Path:
    return destination.parent / f".{destination.name}.{role}"


def _finished(destination: Path, source: Source, wanted: _Wanted) -> Downloaded | None:
    """`destination` as an earlier call left it, or None where it takes a closer look."""
    done = _load(_beside(destination, "done.json"))
    try:
        status = os.stat(destination)
    except (FileNotFoundError, NotADirectoryError):
        return None
    size_bytes, sha256 = status.st_size, done.get("sha256")
    if (done.get("size_bytes"), done.get("mtime_ns")) != (size_bytes, status.st_mtime_ns):
        return None
    if done.get("url_sha256") != source.fingerprint or not isinstance(sha256, str):
        return None
    try:
        wanted.check(size_bytes, sha256)
    except _Mismatch:
        return None
    return Downloaded(destination, source.shown, size_bytes, sha256, cached=True)


def _adopt(destination: Path, source: Source, wanted: _Wanted, report: Callable[[str], None]) -> Downloaded:
    """Take over the file that is at `destination`, or raise BenchError where it is another one. The lock is held."""
    if not destination.is_file():
        raise BenchError(f"{destination} is not a file: move it away to download {source.shown} to there.")
    etag = None
    if wanted.sha256 is None:
        try:
            remote = source.describe()
            wanted, etag = wanted.or_as_of(remote), remote.etag
        except (Transient, BenchError) as problem:
            report(f"{destination} is there already, and it cannot be learnt what it should be: {problem}")
    done = _load(_beside(destination, "done.json"))
    if wanted.sha256 is None and done.get("url_sha256") == source.fingerprint:
        wanted = replace(wanted, sha256=done.get("sha256"))
    status = os.stat(destination)
    try:
        wanted.check(status.st_size, None)
        report(f"Checking {destination} ({size_text(status.st_size)}), which is there already.")
        sha256 = sha256_of(destination)
        wanted.check(status.st_size, sha256)
    except _Mismatch as problem:
        raise BenchError(
            f"{destination} is there already, but is not what {source.shown} should be: it {problem}. "
            "Move it away to download it again."
        ) from problem
    _save_done(destination, source, status, sha256, etag)
    _discard_part(destination)
    return Downloaded(destination, source.shown, status.st_size, sha256, cached=True)


def _save_done(destination: Path, source: Source, status: os.stat_result, sha256: str, etag: str | None) -> None:
    done = {
        "url": source.shown,
        "url_sha256": source.fingerprint,
        "size_bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "sha256": sha256,
        "etag": etag,
        "finished_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    _save(_beside(destination, "done.json"), done)


def _discard_part(destination: Path) -> None:
    _beside(destination, "part").unlink(missing_ok=True)
    _beside(destination, "part.json").unlink(missing_ok=True)


def _load(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, empty where there is none."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _save(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object that is found whole or not at all. The lock must be held, for there is one temporary."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "w") as file:
            file.write(json.dumps(value, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


# --- the transfer -------------------------------------------------------------------------------------------


class _Transfer:
    """The download of one file that is not there, with its lock held by the caller."""

    def __init__(
        self,
        destination: Path,
        source: Source,
        wanted: _Wanted,
        retries: Retries,
        progress: Callable[[int, int | None], None] | None,
        report: Callable[[str], None],
    ) -> None:
        self._destination = destination
        self._source = source
        self._wanted = wanted
        self._retries = retries
        self._progress = progress
        self._report = report
        self._part = _beside(destination, "part")
        self._part.touch()
        # Unbuffered: what has been counted is in the file, whatever happens to this process.
        self._file = open(self._part, "r+b", buffering=0)  # noqa: SIM115 - closed by __exit__
        self._remote = RemoteFile(source.shown, None, None, None, None)
        self._digest = hashlib.sha256()
        self._position = 0
        self._furthest = 0

    def __enter__(self) -> _Transfer:
        return self

    def __exit__(self, *_: object) -> None:
        # Asked of the file: the position is 0, too, in a call that is interrupted before it has read what is there.
        is_empty = os.fstat(self._file.fileno()).st_size == 0
        self._file.close()
        if is_empty:
            _discard_part(self._destination)

    def run(self) -> Downloaded:
        """Fetch what is missing, verify the whole, and give it its name."""
        self._take_up()
        try:
            self._fetch_and_verify()
        except _Mismatch as problem:
            self._report(f"{self._source.shown} {problem}. Downloading it once more from the start.")
            self._start_over()
            self._furthest = 0
            try:
                self._fetch_and_verify()
            except _Mismatch as again:
                _discard_part(self._destination)
                raise BenchError(
                    f"{self._source.shown} is not the file expected, and downloading it again changed nothing: it "
                    f"{again}. Check the address and what is expected of it, and whether a proxy changes it on its way."
                ) from again
        return self._finish()

    def _take_up(self) -> None:
        """Begin with what an earlier call has left, where it can be continued."""
        there = os.fstat(self._file.fileno()).st_size
        if there == 0:
            return
        try:
            self._remote = RemoteFile(**_load(_beside(self._destination, "part.json")))
            self._wanted.check(self._remote.size_bytes, self._remote.sha256)
            total = self._remote.size_bytes
            fits = self._remote.url == self._source.shown and (total is None or there <= total)
        except (TypeError, _Mismatch):
            fits = False
        if not (fits and self._can_continue()):
            self._start_over(f"the {size_text(there)} there cannot be continued")
            return
        while block := self._file.read(_HASH_BLOCK_BYTES):
            self._digest.update(block)
            self._position += len(block)
        self._furthest = self._position
        self._report(f"{self._source.shown}: continuing after {size_text(self._position)}.")

    def _can_continue(self) -> bool:
        """Whether bytes that are there can be told from those of a file that has changed since."""
        return (self._remote.validator or self._remote.sha256 or self._wanted.sha256) is not None

    def _start_over(self, why: str | None = None) -> None:
        if why is not None:
            self._report(f"{self._source.shown}: starting over, {why}.")
        self._file.seek(0)
        self._file.truncate()
        self._remote = RemoteFile(self._source.shown, None, None, None, None)
        self._digest = hashlib.sha256()
        self._position = 0

    def _fetch_and_verify(self) -> None:
        """Raises _Mismatch, and BenchError."""
        # It is complete already where the call before was killed between the last byte and the renaming.
        while self._position != self._remote.size_bytes:
            try:
                self._attempt()
            except Transient as problem:
                # Only what has never been there before counts: a server that ignores ranges brings bytes every time.
                progressed = self._position > self._furthest
                self._furthest = max(self._furthest, self._position)
                line = f"{self._source.shown}: {problem}, after {self._done_so_far()}"
                if not self._retries.wait(problem, line, progressed=progressed):
                    raise self._gave_up(problem) from problem
        self._wanted.or_as_of(self._remote).check(self._position, self._digest.hexdigest())

    def _done_so_far(self) -> str:
        total = self._remote.size_bytes
        return size_text(self._position) + ("" if total is None else f" of {size_text(total)}")

    def _gave_up(self, problem: Transient) -> BenchError:
        there = "Nothing of it is there yet."
        if self._position:
            there = f"{self._done_so_far()} are there ({self._part}, {self._position} bytes)"
            there += ", and the next start continues from there." if self._can_continue() else "."
        return BenchError(
            f"{self._source.shown} could not be downloaded: {self._retries.attempts} attempts in a row brought nothing "
            f"new. Last cause: {problem}.\n{there}\n{NETWORK_HINT}"
        )

    def _attempt(self) -> None:
        """Bring the rest of the file in one request. Raises Transient, _Mismatch and BenchError."""
        if self._position and not self._can_continue():
            self._start_over("the server tells nothing by which to continue")
        headers = {}
        if self._position:
            headers["Range"] = f"bytes={self._position}-"
            if self._remote.validator is not None:
                headers["If-Range"] = self._remote.validator
        with self._source.request("GET", headers) as response:
            self._source.check(response, {200, 206, 416} if self._position else {200})
            now = self._source.described(response)
            if response.status_code == 200:
                if self._position:
                    self._start_over("it has changed" if self._has_changed(now) else "the server sends the whole again")
                self._begin(now, response)
            elif not self._continues(now, response):
                return
            self._receive(response)

    def _continues(self, now: RemoteFile, response: requests.Response) -> bool:
        """Whether a 206 or 416 goes on where the part ends; False: there is nothing more to come.

        Raises Transient, with the part emptied, where it does not.
        """
        position = self._position
        first, total = content_range(response)
        if self._has_changed(now):
            self._start_over()
            raise Transient("it has changed, so that it starts over")
        if first != position and (response.status_code, total) != (416, position):
            self._start_over()
            raise Transient(f"the server does not send what comes after {position} bytes, so that it starts over")
        if total is not None:
            self._remote = replace(self._remote, size_bytes=total)
        self._check_space()
        return response.status_code == 206

    def _has_changed(self, now: RemoteFile) -> bool:
        """Whether what the server says now contradicts what it said of the bytes that are there."""
        pairs = [
            (now.size_bytes, self._remote.size_bytes),
            (now.sha256, self._remote.sha256),
            (now.etag, self._remote.etag),
        ]
        return any(None not in pair and pair[0] != pair[1] for pair in pairs)

    def _begin(self, now: RemoteFile, response: requests.Response) -> None:
        """Note down what is about to be received from its first byte on."""
        self._wanted.check(now.size_bytes, now.sha256)
        is_delimited = now.size_bytes is not None or "chunked" in response.headers.get("Transfer-Encoding", "")
        if not is_delimited and self._wanted.sha256 is None:
            raise BenchError(
                f"{self._source.shown}: the server tells neither its size nor its end, so that a broken download could "
                "not be told from a whole one. Give its SHA-256 (URL#sha256=...), or put the file at "
                f"{self._destination}."
            )
        self._remote = now
        self._check_space()
        _save(_beside(self._destination, "part.json"), asdict(now))

    def _check_space(self) -> None:
        total = self._remote.size_bytes
        if total is not None and total - self._position > shutil.disk_usage(self._destination.parent).free:
            raise self._no_space()

    def _no_space(self) -> BenchError:
        total = self._remote.size_bytes
        needed = "more is" if total is None else f"{size_text(total - self._position)} are"
        free = shutil.disk_usage(self._destination.parent).free
        there = f" {size_text(self._position)} are there already, and the next start continues from there."
        return BenchError(
            f"No space for {self._destination}: {needed} needed, {size_text(free)} are free. Free some there, or "
            f"choose a folder on another disk.{there if self._position else ''}"
        )

    def _receive(self, response: requests.Response) -> None:
        """Append the body of the answer. Raises Transient, _Mismatch, and BenchError where the disk is full."""
        import urllib3

        total = self._remote.size_bytes
        body = response.raw.stream(_CHUNK_BYTES, decode_content=False)
        self._show_progress()
        while True:
            try:
                chunk = next(body, None)
            except urllib3.exceptions.HTTPError as error:
                raise Transient(cause_of(error)) from error
            if chunk is None:
                break
            self._append(chunk)
            if total is not None and self._position > total:
                raise _Mismatch(f"has at least {self._position} bytes instead of {total}")
            self._show_progress()
        if total is not None and self._position < total:
            raise Transient("the connection was closed")
        self._remote = replace(self._remote, size_bytes=self._position)

    def _append(self, chunk: bytes) -> None:
        rest = memoryview(chunk)
        try:
            while rest:
                written = self._file.write(rest) or 0
                self._digest.update(rest[:written])
                self._position += written
                rest = rest[written:]
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self._no_space() from error
            raise

    def _show_progress(self) -> None:
        if self._progress is not None:
            self._progress(self._position, self._remote.size_bytes)

    def _finish(self) -> Downloaded:
        os.fsync(self._file.fileno())
        status = os.fstat(self._file.fileno())
        sha256 = self._digest.hexdigest()
        # Before the renaming, which keeps the time: a file with its name then always has its record.
        _save_done(self._destination, self._source, status, sha256, self._remote.etag)
        if os.path.lexists(self._destination):
            raise BenchError(f"{self._destination} has appeared during its download: move it away, and start again.")
        os.rename(self._part, self._destination)
        fsync_folder(self._destination.parent)
        _discard_part(self._destination)
        return Downloaded(self._destination, self._source.shown, status.st_size, sha256, cached=False)
