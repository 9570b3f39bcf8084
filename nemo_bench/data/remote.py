"""Asking an HTTP server for a file: what it says about it, what its errors mean, and when to ask again."""

from __future__ import annotations

import hashlib
import os
import random
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from nemo_bench.errors import BenchError

if TYPE_CHECKING:
    import requests

_sleep = time.sleep

SHA256 = re.compile(r"[0-9a-f]{64}")
_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)")

NETWORK_HINT = "Is the network up here, and does it take a proxy (HTTPS_PROXY, HTTP_PROXY)? Then run the same again."


@dataclass(frozen=True)
class RemoteFile:
    """What a server says about a file; None for what it does not say.

    Attributes:
        url: where it is, without user name, password and query, which may be secrets.
        size_bytes: its size.
        sha256: its hexadecimal SHA-256, which Hugging Face tells of large files.
        etag: the ETag header, quotes included.
        last_modified: the Last-Modified header.
    """

    url: str
    size_bytes: int | None
    sha256: str | None
    etag: str | None
    last_modified: str | None

    @property
    def validator(self) -> str | None:
        """What If-Range can name it by: a weak ETag may be shared by files that differ."""
        return self.etag if self.etag is not None and self.etag.startswith('"') else self.last_modified


class Transient(Exception):
    """An attempt failed in a way that another one may not; `str` is the cause, as a clause."""

    def __init__(self, cause: str, retry_after_s: float | None = None) -> None:
        super().__init__(cause)
        self.retry_after_s = retry_after_s


def default_token() -> str | None:
    """The user's Hugging Face token: HF_TOKEN, or the one that `hf auth login` stored. For Hugging Face URLs only."""
    if token := os.environ.get("HF_TOKEN", "").strip():
        return token
    import huggingface_hub

    return huggingface_hub.get_token()


class Source:
    """One URL and how to ask for it."""

    def __init__(self, url: str, token: str | None, timeout_s: float) -> None:
        try:
            parts = urlsplit(url)
            host = parts.hostname
        except ValueError as error:
            raise BenchError(f"{url} is not a URL: {error}.") from error
        if parts.scheme not in ("http", "https") or not host:
            raise BenchError(f"{url} is not a URL to download from: it has to begin with http:// or https://.")
        self.url = url
        self.shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        # Tells URLs apart by their queries without giving away what is in them.
        self.fingerprint = hashlib.sha256(f"{self.shown}?{parts.query}".encode()).hexdigest()
        self.token = None if token is None else token.strip() or None
        self.timeout_s = timeout_s
        if self.token is not None and not re.fullmatch(r"[!-~]+", self.token):
            raise BenchError("The access token holds characters that no token has: copy it again (HF_TOKEN).")

    def request(self, method: str, headers: Mapping[str, str]) -> requests.Response:
        """The answer to a request for the URL, redirects followed, its body still to come.

        Raises:
            Transient: no answer.
            BenchError: no answer, nor will there be one.
        """
        import requests

        def authorize(prepared: requests.PreparedRequest) -> requests.PreparedRequest:
            prepared.headers["Authorization"] = f"Bearer {self.token}"
            return prepared

        try:
            with requests.Session() as session:
                return session.request(
                    method,
                    self.url,
                    # Sizes and ranges have to mean the bytes as they are stored.
                    headers={"Accept-Encoding": "identity", **headers},
                    # Not a plain header: an entry of ~/.netrc would replace that.
                    auth=authorize if self.token is not None else None,
                    timeout=self.timeout_s,
                    allow_redirects=True,
                    stream=True,
                )
        except (
            requests.exceptions.InvalidSchema,
            requests.exceptions.InvalidURL,
            requests.exceptions.TooManyRedirects,
        ) as error:
            raise BenchError(f"{self.shown} cannot be asked for: {cause_of(error)}.") from error
        except requests.RequestException as error:
            cause = cause_of(error)
            if "CERTIFICATE_VERIFY_FAILED" in cause:
                raise BenchError(
                    f"{self.shown}: the server's certificate is not trusted ({cause}). Where a proxy of your site "
                    "signs its own, name its CA file: export REQUESTS_CA_BUNDLE=<file>."
                ) from error
            raise Transient(cause) from error
        except OSError as error:  # of the machine's own settings, e.g. a CA bundle that is not there
            raise BenchError(f"{self.shown} cannot be asked for: {error}.") from error

    def describe(self) -> RemoteFile:
        """What the server says about the file. Raises Transient and BenchError."""
        with self.request("HEAD", {}) as response:
            # Not every server answers HEAD, and a signed URL may allow GET only.
            if response.status_code not in (403, 405, 501):
                self.check(response, {200})
                return self.described(response)
        with self.request("GET", {"Range": "bytes=0-0"}) as response:
            self.check(response, {200, 206, 416})  # 416: it is empty
            return self.described(response)

    def described(self, response: requests.Response) -> RemoteFile:
        """What the headers of an answer, and of the redirects before it, say about the file."""
        # Hugging Face tells on its redirect, the servers that it leads to often tell nothing.
        told = [hop.headers for hop in response.history if "X-Linked-Etag" in hop.headers]
        hub: Mapping[str, str] = told[0] if told else {}
        sha256 = hub.get("X-Linked-Etag", "").removeprefix("W/").strip('"').lower()
        if response.status_code in (206, 416):
            size_bytes = content_range(response)[1]
        else:
            size_bytes = _number(hub.get("X-Linked-Size") or response.headers.get("Content-Length"))
        return RemoteFile(
            url=self.shown,
            size_bytes=size_bytes,
            sha256=sha256 if SHA256.fullmatch(sha256) else None,
            etag=response.headers.get("ETag"),
            last_modified=response.headers.get("Last-Modified"),
        )

    def check(self, response: requests.Response, good: set[int]) -> None:
        """Raise Transient or BenchError unless the answer has one of these statuses."""
        status = response.status_code
        answer = f"{status} {response.reason}".strip()
        if status in good:
            return
        if status in (401, 403):
            raise BenchError(f"{self.shown}: access refused ({answer}). {self._how_to_get_access(response)}")
        if status in (404, 410):
            raise BenchError(f"{self.shown} does not exist ({answer}): check the address.")
        if status in (408, 425, 429) or status >= 500:
            raise Transient(f"the server answers {answer}", _retry_after_s(response))
        raise BenchError(f"{self.shown} cannot be downloaded: the server answers {answer}.")

    def _how_to_get_access(self, response: requests.Response) -> str:
        page, is_hub, _ = self.shown.partition("/resolve/")
        if response.history and "X-Error-Code" not in response.headers:
            host = urlsplit(response.url).hostname
            return f"This is the answer of {host}, which it redirects to: try again, or ask who runs it."
        if is_hub:
            # The hub gives this answer for a repository that does not exist, too.
            ask = f"check the address, log in and accept the terms at {page} (approval can take a day or more)"
            if self.token is None:
                return f"Without an access token there is no more to know: {ask}, then export HF_TOKEN=<your token>."
            return f"Either the access token (HF_TOKEN) is not valid, or its account has no access: {ask}."
        return (
            f"It was asked for with {'no' if self.token is None else 'the given'} access token: may it be read with it?"
        )


class Retries:
    """Counts the attempts in a row that brought nothing new, and waits after each failed one."""

    def __init__(self, attempts: int, backoff_s: float, max_backoff_s: float, report: Callable[[str], None]) -> None:
        self.attempts = attempts
        self._backoff_s = backoff_s
        self._max_backoff_s = max_backoff_s
        self._report = report
        self._in_vain = 0

    def wait(self, problem: Transient, what_happened: str, *, progressed: bool = False) -> bool:
        """Wait before the next attempt; False, at once, where there is none left."""
        self._in_vain = 0 if progressed else self._in_vain + 1
        if self._in_vain >= self.attempts:
            return False
        delay_s = problem.retry_after_s
        if delay_s is None:
            # Anywhere up to the bound: many downloads that broke together must not come back together.
            doublings = min(max(self._in_vain - 1, 0), 60)
            delay_s = random.uniform(0, min(self._backoff_s * 2.0**doublings, self._max_backoff_s))
        delay_s = min(delay_s, self._max_backoff_s)
        self._report(f"{what_happened}. Trying again in {delay_s:.0f} s.")
        _sleep(delay_s)
        return True


def _retry_after_s(response: requests.Response) -> float | None:
    """The wait that the answer asks for, in seconds."""
    import urllib3

    try:
        return float(urllib3.Retry().parse_retry_after(response.headers["Retry-After"]))
    except (KeyError, urllib3.exceptions.InvalidHeader):
        return None


def content_range(response: requests.Response) -> tuple[int | None, int | None]:
    """First byte and size of the whole, from the Content-Range header."""
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    return (_number(match[1]), _number(match[2])) if match else (None, None)


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isascii() and text.isdigit() else None


def cause_of(error: BaseException) -> str:
    """The innermost reason of a failed request: the messages around it hold URLs, whose queries may be secrets."""
    for inner in (getattr(error, "reason", None), *error.args):
        if isinstance(inner, BaseException):
            return cause_of(inner)
    return re.sub(r"^(<[^>]*>|HTTPS?ConnectionPool\([^)]*\)): ", "", str(error)) or type(error).__name__
