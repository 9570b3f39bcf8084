"""A real HTTP server on 127.0.0.1 that misbehaves on demand and answers like huggingface.co where asked to.

    with FileServer() as server:
        server.put("/shard.zst", data)
        server.script("/shard.zst", Twist(cut_after=1000), Twist(status=503, headers={"Retry-After": "1"}))
        fetch(server.url("/shard.zst"))  # its first GET breaks after 1000 bytes, the second gets a 503, the third all
        assert [request.headers.get("range") for request in server.seen("GET", "/shard.zst")] == [None, ...]

        server.put_hub("org/model", "tokenizer.json", data, gated=True)
        hf_hub_download("org/model", "tokenizer.json", endpoint=server.endpoint, token=GOOD_TOKEN)

`127.0.0.1` and `localhost` reach it as two hosts: the second stands for the content delivery network. It is also a
plain HTTP proxy to itself: a request for an absolute URL is answered by its path.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import ssl
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote, unquote, urlsplit

#: What a protected file asks for: `Authorization: Bearer good`.
GOOD_TOKEN = "good"
#: A token of a user of the hub who has not been granted access to gated repositories.
UNGRANTED_TOKEN = "ungranted"
#: The commit that every repository of the hub is at, on its branch `main`.
COMMIT = "0123456789abcdef0123456789abcdef01234567"

_PIECE_BYTES = 64 * 1024


@dataclass(frozen=True)
class Request:
    """One request as the server saw it; header names are in lower case, `path` is without query and percent signs."""

    method: str
    path: str
    host: str
    headers: Mapping[str, str]


@dataclass(frozen=True)
class Twist:
    """How one answer differs from the right one.

    Attributes:
        method: the method whose next answer it is for.
        status: answer with this status and `body` instead of the file.
        headers: added to the answer, or put in place of its own; None leaves the header out.
        body: the body that goes with `status`.
        redirect: answer with a redirect (`status` or 302) to this URL.
        drop: close the connection without an answer.
        cut_after: close the connection after this many bytes of the body.
        stall_after: after this many bytes of the body wait until `release` is set.
        release: see `stall_after`; also set when the server ends.
        extra_length: promise this many bytes more than the body has, and close the connection after it.
        framing: how the end of the body is told: "length", "chunked", or "close" (by closing the connection).
        ignore_range: answer a request for a range with 200 and the whole file.
    """

    method: str = "GET"
    status: int | None = None
    headers: Mapping[str, str | None] = field(default_factory=dict)
    body: bytes = b""
    redirect: str | None = None
    drop: bool = False
    cut_after: int | None = None
    stall_after: int | None = None
    release: threading.Event = field(default_factory=threading.Event)
    extra_length: int = 0
    framing: str = "length"
    ignore_range: bool = False


_STRAIGHT = Twist()


@dataclass(frozen=True)
class _File:
    data: bytes
    etag: str | None
    last_modified: str | None
    token: str | None
    piece_bytes: int
    pause_s: float


@dataclass(frozen=True)
class _HubFile:
    data: bytes
    lfs: bool
    gated: bool


@dataclass
class _Answer:
    status: int
    headers: dict[str, str]
    body: bytes
    piece_bytes: int = _PIECE_BYTES
    pause_s: float = 0.0


class FileServer:
    """The server; started by `with`, stopped at its end. Its methods may be called while it serves.

    Attributes:
        requests: all that it was asked, in the order of arrival.
        body_bytes: bytes of bodies sent so far, over all answers; counted just before they are sent.

    Args:
        certificate: PEM file of a certificate and its key: the server then speaks HTTPS.
    """

    def __init__(self, *, certificate: Path | None = None) -> None:
        self.requests: list[Request] = []
        self.body_bytes = 0
        self._files: dict[str, _File] = {}
        self._hub: dict[str, dict[str, _HubFile]] = {}
        self._twists: dict[tuple[str, str], deque[Twist]] = {}
        self._releases: list[threading.Event] = []
        self._changed = threading.Condition()
        self._scheme = "http" if certificate is None else "https"
        self._server = _Server(self, certificate)
        # Polled often: `shutdown` waits for the next poll, and each test ends with one.
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> FileServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        with self._changed:
            for release in self._releases:
                release.set()
        if kind is None and self._server.failures:
            raise self._server.failures[0]

    # --- where it is ---

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def endpoint(self) -> str:
        """The URL of its root, as the first of its two hosts."""
        return f"{self._scheme}://127.0.0.1:{self.port}"

    @property
    def other_endpoint(self) -> str:
        """The URL of its root, as the second of its two hosts."""
        return f"{self._scheme}://localhost:{self.port}"

    def url(self, path: str) -> str:
        return self.endpoint + quote(path)

    # --- what it serves ---

    def put(
        self,
        path: str,
        content: bytes | Path,
        *,
        etag: str | None = "",
        last_modified: str | None = None,
        token: str | None = None,
        piece_bytes: int = _PIECE_BYTES,
        pause_s: float = 0.0,
    ) -> None:
        """Serve `content` (a file's, as it is now) at `path`, in place of what was there.

        Args:
            etag: its ETag header, quotes included; "" makes one of the content, None sends none.
            last_modified: its Last-Modified header.
            token: the bearer token it asks for: without one the answer is 401, with another one 403.
            piece_bytes: sent at once, `pause_s` apart.
        """
        data = content if isinstance(content, bytes) else content.read_bytes()
        if etag == "":
            etag = f'"{hashlib.md5(data).hexdigest()}"'
        with self._changed:
            self._files[path] = _File(data, etag, last_modified, token, piece_bytes, pause_s)

    def put_hub(
        self,
        repo: str,
        name: str,
        content: bytes | Path,
        *,
        repo_type: str = "model",
        lfs: bool = False,
        gated: bool = False,
    ) -> str:
        """Serve `content` as file `name` of a repository of the hub, and return its `resolve/main` URL.

        With `lfs` it is redirected to the other host, which tells, like the hub's, neither ETag nor Last-Modified.
        With `gated` the repository asks for GOOD_TOKEN.
        """
        data = content if isinstance(content, bytes) else content.read_bytes()
        root = f"/datasets/{repo}" if repo_type == "dataset" else f"/{repo}"
        with self._changed:
            self._hub.setdefault(root, {})[name] = _HubFile(data, lfs, gated)
            if lfs:
                self._files[_cdn_path(data)] = _File(data, None, None, None, _PIECE_BYTES, 0.0)
        return self.url(f"{root}/resolve/main/{name}")

    def remove(self, path: str) -> None:
        """Serve nothing at `path` any more."""
        with self._changed:
            del self._files[path]

    def script(self, path: str, *twists: Twist) -> None:
        """Twist the next answers for `path`, one each, in this order."""
        with self._changed:
            for twist in twists:
                self._twists.setdefault((twist.method, path), deque()).append(twist)
                self._releases.append(twist.release)

    # --- what it saw ---

    def seen(self, method: str | None = None, path: str | None = None) -> list[Request]:
        """The requests of this method and path so far; None: of any."""
        with self._changed:
            return [r for r in self.requests if method in (None, r.method) and path in (None, r.path)]

    def wait_for(self, condition: Callable[[FileServer], bool], timeout_s: float = 30.0) -> None:
        """Return once `condition` of this server holds; it is looked at after each request and piece of a body."""
        with self._changed:
            if not self._changed.wait_for(lambda: condition(self), timeout_s):
                raise AssertionError(f"did not happen within {timeout_s} s; requests so far: {self.requests}")

    # --- answering, called by the threads of the connections ---

    def _arrived(self, request: Request) -> Twist:
        with self._changed:
            self.requests.append(request)
            self._changed.notify_all()
            queue = self._twists.get((request.method, request.path))
            return queue.popleft() if queue else _STRAIGHT

    def _sends(self, size_bytes: int) -> None:
        with self._changed:
            self.body_bytes += size_bytes
            self._changed.notify_all()

    def _answer(self, request: Request, twist: Twist) -> _Answer:
        """The whole answer, range included, but for what the twist does to the sending of it."""
        if twist.redirect is not None:
            return _Answer(twist.status or 302, {"Location": twist.redirect}, b"Found. Redirecting.")
        if twist.status is not None:
            return _Answer(twist.status, {"Content-Type": "text/plain"}, twist.body)
        with self._changed:
            file = self._files.get(request.path)
            hub = self._hub_answer(request) if file is None else None
        if hub is not None:
            return hub
        if file is None:
            return _Answer(404, {"Content-Type": "text/plain"}, b"Not Found")
        if file.token is not None and _token(request) != file.token:
            return _Answer(401 if _token(request) is None else 403, {"Content-Type": "text/plain"}, b"No entry")
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
        if file.etag is not None:
            headers["ETag"] = file.etag
        if file.last_modified is not None:
            headers["Last-Modified"] = file.last_modified
        answer = _Answer(200, headers, file.data, file.piece_bytes, file.pause_s)
        return answer if twist.ignore_range else _ranged(request, answer)

    def _hub_answer(self, request: Request) -> _Answer | None:
        """What huggingface.co says to a request for a file of a repository, or None where it is for something else.

        The statuses, and the headers by which huggingface_hub tells the errors apart, are the hub's own.
        """
        root, is_resolve, rest = request.path.partition("/resolve/")
        if not is_resolve:
            return None
        revision, _, name = rest.partition("/")
        token = _token(request)
        if token not in (None, GOOD_TOKEN, UNGRANTED_TOKEN):
            return _hub_error(401, None, "Invalid credentials in Authorization header")
        files = self._hub.get(root)
        if files is None:
            if token is None:
                return _hub_error(401, "RepoNotFound", "Invalid username or password.")
            return _hub_error(404, "RepoNotFound", "Repository not found")
        if any(file.gated for file in files.values()) and token != GOOD_TOKEN:
            told = f"Access to model {root.strip('/')} is restricted"
            if token is None:
                told += ". You must have access to it and be authenticated to access it. Please log in."
                return _hub_error(401, "GatedRepo", told)
            return _hub_error(403, "GatedRepo", f"{told} and you are not in the authorized list.")
        if revision not in ("main", COMMIT):
            return _hub_error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        file = files.get(name)
        headers = {"X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if file is None:
            missing = _hub_error(404, "EntryNotFound", "Entry not found")
            missing.headers |= headers
            return missing
        if file.lfs:
            headers["X-Linked-Size"] = str(len(file.data))
            headers["X-Linked-Etag"] = f'"{hashlib.sha256(file.data).hexdigest()}"'
            # As there: signed, so that it is a secret for as long as it is valid.
            headers["Location"] = f"{self.other_endpoint}{_cdn_path(file.data)}?Signature=secret-signature"
            headers["Content-Type"] = "text/plain; charset=utf-8"
            return _Answer(302, headers, b"Found. Redirecting to the content delivery network.")
        blob = hashlib.sha1(b"blob %d\0" % len(file.data) + file.data).hexdigest()
        headers |= {"ETag": f'"{blob}"', "Content-Type": "text/plain; charset=utf-8"}
        return _ranged(request, _Answer(200, headers, file.data))


def _cdn_path(data: bytes) -> str:
    return f"/cdn/{hashlib.sha256(data).hexdigest()}"


def _hub_error(status: int, code: str | None, message: str) -> _Answer:
    headers = {"X-Error-Message": message, "Content-Type": "application/json"}
    if code is not None:
        headers["X-Error-Code"] = code
    return _Answer(status, headers, json.dumps({"error": message}).encode())


def _token(request: Request) -> str | None:
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    return token if kind == "Bearer" else None


def _ranged(request: Request, answer: _Answer) -> _Answer:
    """The part of `answer` that the request asks for, by `bytes=N-` or `bytes=N-M` and If-Range."""
    wanted = request.headers.get("range")
    condition = request.headers.get("if-range")
    if wanted is None or condition not in (None, answer.headers.get("ETag"), answer.headers.get("Last-Modified")):
        return answer
    first_text, _, last_text = wanted.removeprefix("bytes=").partition("-")
    size = len(answer.body)
    first, last = int(first_text), min(int(last_text or size - 1), size - 1)
    if first >= size:
        return _Answer(416, answer.headers | {"Content-Range": f"bytes */{size}"}, b"")
    answer.headers["Content-Range"] = f"bytes {first}-{last}/{size}"
    answer.status, answer.body = 206, answer.body[first : last + 1]
    return answer


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, owner: FileServer, certificate: Path | None) -> None:
        self.owner = owner
        self.failures: list[BaseException] = []
        super().__init__(("127.0.0.1", 0), _Handler)
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        # Clients are killed, give up and refuse certificates on purpose; anything else is a mistake in this file.
        if error is not None and not isinstance(error, OSError):
            self.failures.append(error)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # with kept connections, as real servers have
    disable_nagle_algorithm = True  # or each answer on a kept connection takes 40 ms
    server: _Server

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr: `FileServer.requests` is the log."""

    def _serve(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, unquote(urlsplit(self.path).path), headers.get("host", ""), headers)
        owner = self.server.owner
        twist = owner._arrived(request)
        if twist.drop:
            self._hang_up()
            return
        answer = owner._answer(request, twist)
        body = answer.body
        shown: dict[str, str | None] = dict(answer.headers)
        if twist.framing == "length":
            shown["Content-Length"] = str(len(body) + twist.extra_length)
        elif twist.framing == "chunked":
            shown["Transfer-Encoding"] = "chunked"
        else:
            shown["Connection"] = "close"
        self.send_response(answer.status, HTTPStatus(answer.status).phrase)
        for name, value in {**shown, **twist.headers}.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        for piece in _pieces(body, answer.piece_bytes, twist):
            owner._sends(len(piece))
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if twist.framing == "chunked" else piece)
            if answer.pause_s:
                time.sleep(answer.pause_s)
        if twist.cut_after is not None or twist.extra_length or twist.framing == "close":
            self._hang_up()
        elif twist.framing == "chunked":
            self.wfile.write(b"0\r\n\r\n")

    def _hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


def _pieces(body: bytes, piece_bytes: int, twist: Twist) -> Iterator[bytes]:
    """The body in pieces, cut and stalled where the twist says; a stall begins once all before it has been sent."""
    end = len(body) if twist.cut_after is None else min(twist.cut_after, len(body))
    position = 0
    while True:
        if twist.stall_after is not None and position >= twist.stall_after and not twist.release.is_set():
            twist.release.wait()
        if position >= end:
            return
        stop = min(position + piece_bytes, end)
        if twist.stall_after is not None and position < twist.stall_after:
            stop = min(stop, twist.stall_after)
        yield body[position:stop]
        position = stop
