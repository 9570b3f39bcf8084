"""Download files: from the Hugging Face Hub with its own client, from other servers with curl. Both resume."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote, urlsplit

from nemo_bench.errors import BenchError
from nemo_bench.files import locked, sha256_of, size_text

#: So many attempts in a row may bring nothing new. The pause before the next one starts at PAUSE_S and doubles.
ATTEMPTS = 7
PAUSE_S = 1.0
HUB = "https://huggingface.co"
_NETWORK = "Is the network up? Does it need a proxy (https_proxy)? Then run the same command again."
_HUB_PATH = re.compile(r"/(?:(dataset|space)s/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
# The URL comes through standard input: it may hold a password, and `ps` shows arguments.
_CURL = ["curl", "--silent", "--show-error", "--location", "--globoff", "--connect-timeout", "30", "--config", "-"]
# curl's exit codes for no address, no connection, and connections that break off or stall.
_BROKEN = (5, 6, 7, 16, 18, 28, 35, 52, 55, 56, 92)

T = TypeVar("T")
Progress = Callable[[int, "int | None"], None]


@dataclass(frozen=True)
class HubFile:
    """A file downloaded from the Hub, the commit it belongs to, and its SHA-256."""

    path: Path
    commit: str
    sha256: str


class _Interrupted(Exception):
    """The transfer broke off; `str` is the cause."""


def _ignore(*_: object) -> None:
    """Report nothing."""


def fetch(
    url: str,
    destination: Path,
    *,
    sha256: str | None = None,
    progress: Progress = _ignore,
    report: Callable[[str], None] = _ignore,
) -> str:
    """Download `url` to `destination`, unless that file exists, and return its SHA-256.

    The bytes so far lie in `.<name>.part/` next to it; however a call ends, the next one continues from them.

    Args:
        sha256: the checksum to expect. Checksums that the Hub knows are always compared.
        progress: called twice a second with the bytes received and the size (None: unknown).
        report: called with one line each time the transfer breaks off.

    Raises:
        BenchError: the server refuses the file or does not have it, the transfer keeps breaking off, or the checksum
            differs.
        OSError: the disk is full or cannot be written.
    """
    part = destination.with_name(f".{destination.name}.part")
    destination.parent.mkdir(parents=True, exist_ok=True)
    with locked(destination.with_name(f".{destination.name}.lock"), f"downloads {destination.name}", report):
        if destination.exists():
            actual = sha256_of(destination)
        else:
            part.mkdir(exist_ok=True)
            if hub := hub_address(url):
                repo, name, revision, repo_type = hub
                file = hub_file(
                    repo, name, part, revision=revision, repo_type=repo_type, progress=progress, report=report
                )
                path, actual = file.path, file.sha256
            else:
                path = _retried(lambda: _curl_file(url, part, progress), part, shown(url), report)
                actual = sha256_of(path)
        if sha256 not in (None, actual):
            shutil.rmtree(part, ignore_errors=True)
            raise BenchError(
                f"{shown(url)} has the SHA-256 {actual} instead of {sha256}: correct the checksum or the URL"
                + (f", or delete {destination}" if destination.exists() else "")
            )
        if not destination.exists():
            os.replace(path, destination)
        shutil.rmtree(part, ignore_errors=True)
    return actual


def shown(url: str) -> str:
    """Return the URL without what may be secret: user name, password and query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _bytes_in(folder: Path) -> int:
    with suppress(FileNotFoundError):  # a file was renamed meanwhile
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return 0


def _retried(transfer: Callable[[], T], folder: Path, source: str, report: Callable[[str], None]) -> T:
    """Call `transfer`, which writes into `folder`, until it completes or ATTEMPTS in a row brought nothing new."""
    failures, most = 0, _bytes_in(folder)
    while True:
        try:
            return transfer()
        except _Interrupted as error:
            there = _bytes_in(folder)
            failures, most = (0 if there > most else failures + 1), max(there, most)
            if failures == ATTEMPTS:
                raise BenchError(
                    f"{source} could not be downloaded: {ATTEMPTS} attempts in a row brought nothing new ({error}). "
                    f"{size_text(there)} are here, and the next attempt continues from there.\n{_NETWORK}"
                ) from None
            pause_s = min(PAUSE_S * 2**failures, 60.0)
            report(f"{source}: {error}, after {size_text(there)}. Trying again in {pause_s:.0f} s.")
            time.sleep(pause_s)


@contextmanager
def _watched(folder: Path, size: int | None, progress: Progress) -> Iterator[None]:
    """Call `progress` with the bytes in `folder` twice a second while the block runs."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.5):
            progress(_bytes_in(folder), size)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


# --- any server, with curl --------------------------------------------------------------------------------------------


def _curl_file(url: str, part: Path, progress: Progress) -> Path:
    """Download the rest of `url` into a file in `part`, in one request."""
    about = _headers(url)
    size = int(about["content-length"]) if "content-length" in about else None
    # A file that has changed on the server gets another name here, and so starts from its beginning.
    version = about.get("etag") or about.get("last-modified") or ""
    path = part / hashlib.sha256(f"{version} {size}".encode()).hexdigest()[:16]
    if size is None or not path.exists() or path.stat().st_size != size:
        with _watched(part, size, progress):
            _curl(url, "--fail", "--speed-time", "60", "--continue-at", "-", "--output", str(path))
    if size not in (None, path.stat().st_size):
        raise _Interrupted(f"it has {path.stat().st_size:,} bytes instead of {size:,}")
    return path


def _headers(url: str) -> dict[str, str]:
    """Return what the server says about the file; {} if it answers no HEAD request (signed URLs may allow only GET)."""
    try:
        answer = _curl(url, "--fail", "--head").strip().split("\r\n\r\n")[-1]
    except BenchError:
        return {}
    rows = (line.partition(":") for line in answer.splitlines()[1:])
    return {name.lower(): value.strip() for name, _, value in rows}


def _curl(url: str, *options: str) -> str:
    """Run curl on `url` and return what it printed; raise _Interrupted if another attempt may work."""
    escaped = url.replace("\\", "%5C").replace('"', "%22")
    try:
        done = subprocess.run(
            [*_CURL, "--write-out", "\n%{http_code}", *options],
            input=f'url = "{escaped}"',
            capture_output=True,
            text=True,
            errors="replace",
        )
    except FileNotFoundError:
        raise BenchError("curl is not installed, but downloads from URLs need it") from None
    output, _, status = done.stdout.rpartition("\n")
    cause = done.stderr.strip().partition(") ")[2] or f"curl ended with status {done.returncode}"
    if done.returncode == 0:
        return output
    if done.returncode in _BROKEN or status in ("408", "425", "429") or status >= "500":
        raise _Interrupted(cause)
    if done.returncode == 33:  # the server cannot continue in the middle
        Path(options[-1]).unlink()
        raise _Interrupted("the server sends files only from their beginning")
    if done.returncode == 23:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), options[-1])
    refusals = {"401": "access refused", "403": "access refused", "404": "does not exist", "410": "does not exist"}
    raise BenchError(f"{shown(url)} {refusals.get(status, f'cannot be downloaded: {cause}')} ({status})")


# --- the Hugging Face Hub ---------------------------------------------------------------------------------------------


def hub_address(url: str) -> tuple[str, str, str, str] | None:
    """Return repository, file, revision and repository type of a URL on the Hub or its mirror (HF_ENDPOINT)."""
    parts = urlsplit(url)
    match = _HUB_PATH.fullmatch(parts.path)
    if match is None or f"{parts.scheme}://{parts.netloc}" not in (HUB, os.environ.get("HF_ENDPOINT", HUB).rstrip("/")):
        return None
    return match[2], unquote(match[4]), unquote(match[3]), match[1] or "model"


def hub_file(
    repo: str,
    name: str,
    folder: Path,
    *,
    revision: str = "main",
    repo_type: str = "model",
    progress: Progress = _ignore,
    report: Callable[[str], None] = _ignore,
) -> HubFile:
    """Download one file of a Hub repository into `folder` and compare its checksum with the Hub's.

    Token, endpoint and time limits are huggingface_hub's: HF_TOKEN or its stored login, HF_ENDPOINT, HF_HUB_*.

    Raises:
        BenchError: the Hub refuses or does not have the file, cannot be reached, or the checksum differs; the error of
            huggingface_hub, where there was one, is its cause.
        OSError: the disk is full or cannot be written.
    """
    # Read at the import: transfers over Xet cannot be resumed by another process, those over HTTP can.
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    import requests
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.utils.logging import set_verbosity
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    set_verbosity(logging.ERROR)  # its warnings quote signed URLs

    def transfer() -> tuple[Path, str, str]:
        try:
            about = get_hf_file_metadata(hf_hub_url(repo, name, repo_type=repo_type, revision=revision))
            commit = about.commit_hash or revision
            with _watched(folder, about.size, progress):
                path = hf_hub_download(repo, name, repo_type=repo_type, revision=commit, local_dir=folder)
            return Path(path), commit, about.etag or ""
        except OSError as error:
            # The client itself retries all but these. It reports a body of the wrong length as a bare OSError.
            short = type(error) is OSError and error.errno is None
            busy = getattr(getattr(error, "response", None), "status_code", None) == 429
            if short or busy or isinstance(error, requests.exceptions.ChunkedEncodingError):
                raise _Interrupted("the Hub is busy" if busy else "the connection broke off") from None
            raise

    try:
        path, commit, etag = _retried(transfer, folder, f"{name} of {repo}", report)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's
        raise _explained(error, repo, name, revision, repo_type) from error
    sha256 = sha256_of(path)
    known = sha256 if len(etag) == 64 else etag
    if len(etag) == 40:  # small files are known by git's id of the blob
        data = path.read_bytes()
        known = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    if known != etag:
        path.unlink()
        raise BenchError(f"{name} of {repo} was damaged on its way (checksum): run the same command again")
    return HubFile(path, commit, sha256)


def _explained(error: Exception, repo: str, name: str, revision: str, repo_type: str) -> BenchError:
    """Say what an error of huggingface_hub means for the user, without its own text, which may quote signed URLs."""
    from huggingface_hub import constants, errors, get_token

    page, token = f"{HUB}/{'datasets/' if repo_type == 'dataset' else ''}{repo}", get_token()
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.RepositoryNotFoundError) and not isinstance(error, errors.GatedRepoError):
        account = "to the account of this token" if token else "without a token (HF_TOKEN is not set)"
        return BenchError(
            f"Hugging Face shows no {repo_type} {repo} {account}: correct the name, or, if it is private, "
            "export HF_TOKEN=<a token of an account that may read it>"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return BenchError(f"{repo} has no revision {revision}: {page}/commits lists them")
    if isinstance(error, errors.EntryNotFoundError) and status is not None:
        return BenchError(f"{name} does not exist in {repo} ({status}): {page}/tree/main lists its files")
    if status in (401, 403):
        refused = f"{repo}: access refused ({status})" + (" to this token." if token else "; HF_TOKEN is not set.")
        return BenchError(
            f"{refused}\n"
            f"  1. access: log in, open {page}, accept the licence. Approval can take a day or more.\n"
            "  2. token: https://huggingface.co/settings/tokens, of the same account, with read access to gated "
            "repositories\n"
            "  3. export HF_TOKEN=<token>, and run the same command again"
        )
    if isinstance(error, errors.HFValidationError):
        return BenchError(f"{repo} is not the name of a repository, ORGANISATION/NAME")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return BenchError("HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set, so nothing is downloaded: unset it")
    cause = f"status {status}" if status is not None else type(error.__cause__ or error).__name__
    endpoint = re.sub(r"//[^/@]*@", "//", constants.ENDPOINT)
    return BenchError(f"{endpoint} cannot be reached for {repo} ({cause}).\n{_NETWORK}")
