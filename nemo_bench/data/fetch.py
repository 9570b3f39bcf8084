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
from email import message_from_string
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from rich import filesize

from nemo_bench.errors import BenchError
from nemo_bench.files import locked, sha256_of

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

Announce = Callable[[int | None], None]  # told the size in bytes once it is known (None: it is not)


class _Interrupted(Exception):
    """The transfer broke off; another attempt may work."""


def fetch(url: str, destination: Path, announce: Announce) -> None:
    """Download `url` to `destination`, unless that file exists; of two processes at once, one downloads.

    The bytes so far lie in `.<name>.part/` next to it, and the next call continues from them.
    Raises BenchError if the server refuses, the transfer keeps breaking off, or the Hub knows another checksum.
    """
    part = part_of(destination)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with locked(destination.with_name(f".{destination.name}.lock"), f"downloads {destination.name}") as lock:
        if not destination.exists():
            part.mkdir(exist_ok=True)
            if hub := _hub_address(url):
                path, _ = hub_file(*hub, part, announce)
            else:
                path = _retried(lambda: _curl_file(url, part, announce, lock), part, shown(url))
            os.replace(path, destination)
        shutil.rmtree(part, ignore_errors=True)


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


def _retried(transfer: Callable[[], Any], folder: Path, source: str) -> Any:
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
                    f"{filesize.decimal(there)} are here, and the next attempt continues from there.\n{_NETWORK}"
                ) from None
            pause_s = min(PAUSE_S * 2**failures, 60.0)
            broken = f"{source}: {error}, after {filesize.decimal(there)}"
            print(f"{broken}. Trying again in {pause_s:.0f} s.", flush=True)
            time.sleep(pause_s)


def _curl_file(url: str, part: Path, announce: Announce, lock: int) -> Path:
    """Download the rest of `url` into a file in `part`, in one request."""
    try:
        answer = _curl(url, "--head").strip().split("\r\n\r\n")[-1]
    except BenchError:  # signed URLs may allow only GET
        answer = ""
    headers = message_from_string(answer.partition("\n")[2])
    size = int(headers["content-length"]) if "content-length" in headers else None
    announce(size)
    # A file that has changed on the server gets another name here, and so starts from its beginning.
    version = f"{headers['etag'] or headers['last-modified']} {size}"
    path = part / hashlib.sha256(version.encode()).hexdigest()[:16]
    if size is None or not path.exists() or path.stat().st_size != size:
        # A curl whose caller was killed goes on, and keeps the lock until it ends: two would write into one file.
        _curl(url, "--continue-at", "-", "--output", str(path), pass_fds=[lock])
    return path


def _curl(url: str, *options: str, pass_fds: Sequence[int] = ()) -> str:
    """Run curl on `url` and return what it printed; raise _Interrupted if another attempt may work."""
    config = 'url = "{}"'.format(url.replace("\\", "%5C").replace('"', "%22"))
    if shutil.which("curl") is None:
        raise BenchError("curl is not installed, and downloads need it")
    done = subprocess.run([*_CURL, *options], input=config, capture_output=True, text=True, pass_fds=pass_fds)
    if done.returncode == 0:
        return done.stdout
    cause = done.stderr.strip().partition(") ")[2]
    if done.returncode in _BROKEN or _BUSY.search(cause):
        raise _Interrupted(cause)
    raise BenchError(f"{shown(url)} cannot be downloaded: {cause}")


def _hub_address(url: str) -> tuple[str, str, str, str] | None:
    """Return repository type, repository, revision and file of a URL on the Hub or its mirror (HF_ENDPOINT)."""
    parts = urlsplit(url)
    match = _HUB_PATH.fullmatch(parts.path)
    is_hub = f"{parts.scheme}://{parts.netloc}" in (HUB, os.environ.get("HF_ENDPOINT", HUB).rstrip("/"))
    return (match[1] or "model", match[2], unquote(match[3]), unquote(match[4])) if match and is_hub else None


def hub_file(repo_type: str, repo: str, revision: str, name: str, folder: Path, announce: Announce) -> tuple[Path, str]:
    """Download a file of a Hub repository into `folder`; return its path, and the commit it belongs to.

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
            if getattr(error, "errno", None) is not None:
                raise  # the disk's
            # The client itself retries all but these. It reports a body of the wrong length as a bare OSError.
            busy = getattr(getattr(error, "response", None), "status_code", None) == 429
            if busy or type(error) is OSError or isinstance(error, requests.exceptions.ChunkedEncodingError):
                raise _Interrupted("the Hub is busy" if busy else "the connection broke off") from None
            raise BenchError(_explained(error, repo, repo_type, f"{name} in revision {revision}")) from error

    path, commit, etag = _retried(transfer, folder, f"{name} of {repo}")
    if len(etag) == 64 and etag != sha256_of(path):  # the Hub knows the SHA-256 of large files
        path.unlink()
        raise BenchError(f"{name} of {repo} was damaged on its way (checksum): run the same command again")
    return path, commit


def _explained(error: Exception, repo: str, repo_type: str, file: str) -> str:
    """Say what an error of huggingface_hub means for the user, without its own text, which may quote signed URLs."""
    from huggingface_hub import constants, errors, get_token

    page = f"{HUB}/{'datasets/' if repo_type == 'dataset' else ''}{repo}"
    status = getattr(getattr(error, "response", None), "status_code", None)
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
