"""Download files: from the Hugging Face Hub with its own client, from other servers with curl. Both resume."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from nemo_bench.errors import BenchError
from nemo_bench.files import locked, sha256_of, size_text

ATTEMPTS, PAUSE_S = 7, 1.0  # so many in a row may bring nothing new; the pause between them doubles
HUB = "https://huggingface.co"
_NETWORK = "Is the network up? Does it need a proxy (https_proxy)? Then run the same command again."
_HUB_PATH = re.compile(r"/(?:(dataset|space)s/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
# The URL comes through standard input: it may hold a password, and `ps` shows arguments.
_CURL = ["curl", "--fail", "--silent", "--show-error", "--location", "--globoff", "--config", "-"]
_CURL += ["--connect-timeout", "30", "--speed-time", "60"]
# curl's exit codes for no address, no connection, and connections that break off or stall; then its words.
_BROKEN = (5, 6, 7, 16, 18, 28, 35, 52, 55, 56, 92)
_BUSY = re.compile(r"returned error: (408|425|429|5\d\d)")

Report = Callable[[str], None]  # told a line each time a transfer breaks off
Announce = Callable[[int | None], None]  # told the size in bytes once it is known (None: it is not)


class _Interrupted(Exception):
    """The transfer broke off; another attempt may work."""


def fetch(url: str, destination: Path, sha256: str, report: Report, announce: Announce) -> str:
    """Download `url` to `destination`, unless that file exists, and return its SHA-256.

    The bytes so far lie in `.<name>.part/` next to it; however a call ends, the next one continues from them.
    `sha256` is the checksum to expect ("": any); one that the Hub knows is always compared.
    Raises BenchError if the server refuses, the transfer keeps breaking off, or the checksum differs.
    """
    part = part_of(destination)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with locked(destination.with_name(f".{destination.name}.lock"), f"downloads {destination.name}", report) as lock:
        path = destination
        if destination.exists():
            actual = sha256_of(destination)
        elif hub := hub_address(url):
            repo, name, revision, kind = hub
            path, _, actual = hub_file(repo, name, part, revision, kind, report, announce)
        else:
            part.mkdir(exist_ok=True)
            path = _retried(lambda: _curl_file(url, part, announce, lock), part, shown(url), report)
            actual = sha256_of(path)
        if sha256 not in ("", actual):
            raise BenchError(
                f"{shown(url)} has the SHA-256 {actual} instead of {sha256}: correct the checksum or delete {path}"
            )
        os.replace(path, destination)
        shutil.rmtree(part, ignore_errors=True)
    return actual


def shown(url: str) -> str:
    """Return the URL without what may be secret: user name, password and query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def part_of(destination: Path) -> Path:
    """Return the folder of what has come of an unfinished download."""
    return destination.with_name(f".{destination.name}.part")


def bytes_in(folder: Path) -> int:
    """Return the size of all files in a folder."""
    with suppress(FileNotFoundError):  # a file was renamed meanwhile
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return 0


def _retried(transfer: Callable[[], Any], folder: Path, source: str, report: Report) -> Any:
    """Call `transfer`, which writes into `folder`, until it completes or ATTEMPTS in a row brought nothing new."""
    failures, most = 0, bytes_in(folder)
    while True:
        try:
            return transfer()
        except _Interrupted as error:
            there = bytes_in(folder)
            failures, most = (0 if there > most else failures + 1), max(there, most)
            if failures == ATTEMPTS:
                raise BenchError(
                    f"{source} could not be downloaded: {ATTEMPTS} attempts in a row brought nothing new ({error}). "
                    f"{size_text(there)} are here, and the next attempt continues from there.\n{_NETWORK}"
                ) from None
            pause_s = min(PAUSE_S * 2**failures, 60.0)
            report(f"{source}: {error}, after {size_text(there)}. Trying again in {pause_s:.0f} s.")
            time.sleep(pause_s)


def _curl_file(url: str, part: Path, announce: Announce, lock: int) -> Path:
    """Download the rest of `url` into a file in `part`, in one request."""
    try:
        answer = _curl(url, "--head").strip().split("\r\n\r\n")[-1]
    except BenchError:  # signed URLs may allow only GET
        answer = ""
    headers = {name.lower(): value for name, value in re.findall(r"^([\w-]+): *(.*?)\r?$", answer, re.MULTILINE)}
    size = int(headers["content-length"]) if "content-length" in headers else None
    announce(size)
    # A file that has changed on the server gets another name here, and so starts from its beginning.
    version = f"{headers.get('etag') or headers.get('last-modified')} {size}"
    path = part / hashlib.sha256(version.encode()).hexdigest()[:16]
    if size is None or not path.exists() or path.stat().st_size != size:
        # A curl whose caller was killed goes on, and keeps the lock until it ends: two would write into one file.
        _curl(url, "--continue-at", "-", "--output", str(path), pass_fds=[lock])
    if size not in (None, path.stat().st_size):
        raise _Interrupted(f"it has {path.stat().st_size:,} bytes instead of {size:,}")
    return path


def _curl(url: str, *options: str, pass_fds: Sequence[int] = ()) -> str:
    """Run curl on `url` and return what it printed; raise _Interrupted if another attempt may work."""
    config = 'url = "{}"'.format(url.replace("\\", "%5C").replace('"', "%22"))
    try:
        done = subprocess.run([*_CURL, *options], input=config, capture_output=True, text=True, pass_fds=pass_fds)
    except FileNotFoundError:
        raise BenchError("curl is not installed, but downloads from URLs need it") from None
    if done.returncode == 0:
        return done.stdout
    cause = done.stderr.strip().partition(") ")[2] or f"curl ended with status {done.returncode}"
    if done.returncode in _BROKEN or _BUSY.search(cause):
        raise _Interrupted(cause)
    raise BenchError(f"{shown(url)} cannot be downloaded: {cause}")


def hub_address(url: str) -> tuple[str, str, str, str] | None:
    """Return repository, file, revision and repository type of a URL on the Hub or its mirror (HF_ENDPOINT)."""
    parts = urlsplit(url)
    match = _HUB_PATH.fullmatch(parts.path)
    is_hub = f"{parts.scheme}://{parts.netloc}" in (HUB, os.environ.get("HF_ENDPOINT", HUB).rstrip("/"))
    return (match[2], unquote(match[4]), unquote(match[3]), match[1] or "model") if match and is_hub else None


def hub_file(
    repo: str, name: str, folder: Path, revision: str, repo_type: str, report: Report, announce: Announce
) -> tuple[Path, str, str]:
    """Download a file of a Hub repository into `folder`; return its path, the commit it belongs to, and its SHA-256.

    Token, endpoint and time limits are huggingface_hub's: HF_TOKEN or its stored login, HF_ENDPOINT, HF_HUB_*.
    Raises BenchError if the Hub refuses or does not have the file, cannot be reached, or has another checksum.
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
            announce(about.size)
            commit = about.commit_hash or revision
            path = hf_hub_download(repo, name, repo_type=repo_type, revision=commit, local_dir=folder)
            return Path(path), commit, about.etag or ""
        except (OSError, ValueError) as error:
            # The client itself retries all but these. It reports a body of the wrong length as a bare OSError.
            status = getattr(getattr(error, "response", None), "status_code", None)
            short = type(error) is OSError and error.errno is None
            if short or status == 429 or isinstance(error, requests.exceptions.ChunkedEncodingError):
                raise _Interrupted("the Hub is busy" if status else "the connection broke off") from None
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk's
            page = f"{HUB}/{'datasets/' if repo_type == 'dataset' else ''}{repo}"
            raise BenchError(_explained(error, status, repo, page, f"{name} in revision {revision}")) from error

    path, commit, etag = _retried(transfer, folder, f"{name} of {repo}", report)
    sha256 = sha256_of(path)
    if len(etag) == 64 and etag != sha256:  # the Hub knows the SHA-256 of large files
        path.unlink()
        raise BenchError(f"{name} of {repo} was damaged on its way (checksum): run the same command again")
    return path, commit, sha256


def _explained(error: Exception, status: int | None, repo: str, page: str, file: str) -> str:
    """Say what an error of huggingface_hub means for the user, without its own text, which may quote signed URLs."""
    from huggingface_hub import constants, errors, get_token

    if isinstance(error, errors.HFValidationError):
        return f"{repo} is not the name of a repository, ORGANISATION/NAME"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set, so nothing is downloaded: unset it"
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403):
        token = "with this token" if get_token() else "and HF_TOKEN is not set"
        return (
            f"{repo}: access refused or no such repository ({status}), {token}.\n"
            f"  1. access: log in, open {page}, accept the licence. Approval can take a day or more.\n"
            "  2. token: https://huggingface.co/settings/tokens, with read access to gated repositories\n"
            "  3. export HF_TOKEN=<token>, and run the same command again"
        )
    if status == 404:
        return f"{repo} has no {file}: {page}/tree/main lists its files and revisions"
    cause = f"status {status}" if status is not None else type(error.__cause__ or error).__name__
    return f"{shown(constants.ENDPOINT)} cannot be reached for {repo} ({cause}).\n{_NETWORK}"
