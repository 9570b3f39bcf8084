"""A real HTTP server on 127.0.0.1 that breaks off on demand and answers like huggingface.co where asked to.

`127.0.0.1` and `localhost` reach it as two hosts: the second stands for the content delivery network.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import quote, unquote, urlsplit

GOOD_TOKEN = "good"  # may read gated repositories
UNGRANTED_TOKEN = "ungranted"  # of a user who may not
COMMIT = "0123456789abcdef0123456789abcdef01234567"  # of every repository's branch `main`


@dataclass(frozen=True)
class Request:
    """One request; header names in lower case, `path` without query and percent signs."""

    method: str
    path: str
    headers: dict[str, str]


@dataclass(frozen=True)
class Twist:
    """How the next answer to a `method` request differs from the right one."""

    method: str = "GET"
    status: int | None = None  # answer with this, and with headers and body, instead of the file
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    drop: bool = False  # close the connection without an answer
    cut_after: int | None = None  # close the connection after so many bytes of the body


@dataclass(frozen=True)
class _File:
    data: bytes
    headers: dict[str, str]
    gated: bool = False
    elsewhere: str = ""  # the content delivery network's URL
    piece_bytes: int = 65536
    pause_s: float = 0.0


class FileServer:
    """The server, while its `with` block runs. `requests` is what it was asked, in order."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.files: dict[str, _File] = {}
        self.twists: dict[tuple[str, str], deque[Twist]] = {}
        self.server = _Server(("127.0.0.1", 0), _Handler)
        self.server.owner = self
        self.port = int(self.server.server_address[1])
        self.endpoint, self.other_endpoint = f"http://127.0.0.1:{self.port}", f"http://localhost:{self.port}"

    def __enter__(self) -> FileServer:
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def url(self, path: str) -> str:
        return self.endpoint + quote(path)

    def put(self, path: str, data: bytes, piece_bytes: int = 65536, pause_s: float = 0.0) -> None:
        """Serve `data` at `path`, so many bytes at once and so many seconds apart."""
        headers = {"ETag": f'"{hashlib.md5(data).hexdigest()}"'}
        self.files[path] = _File(data, headers, piece_bytes=piece_bytes, pause_s=pause_s)

    def put_hub(
        self, repo: str, name: str, data: bytes, *, repo_type: str = "model", lfs: bool = False, gated: bool = False
    ) -> str:
        """Serve `data` as a file of a Hub repository, and return its URL.

        With `lfs` it is redirected to the other host. With `gated` the repository asks for GOOD_TOKEN.
        """
        root = f"/datasets/{repo}" if repo_type == "dataset" else f"/{repo}"
        sha256 = hashlib.sha256(data).hexdigest()
        headers, elsewhere = {"X-Repo-Commit": COMMIT}, ""
        if lfs:
            headers |= {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{sha256}"'}
            elsewhere = f"{self.other_endpoint}/cdn/{sha256}?Signature=secret-signature"
            self.files[f"/cdn/{sha256}"] = _File(data, {})
        else:
            headers["ETag"] = f'"{hashlib.sha1(b"blob %d" % len(data) + bytes(1) + data).hexdigest()}"'
        for revision in ("main", COMMIT):
            self.files[f"{root}/resolve/{revision}/{name}"] = _File(data, headers, gated, elsewhere)
        return self.url(f"{root}/resolve/main/{name}")

    def script(self, path: str, *twists: Twist) -> None:
        """Twist the next answers for `path`, one each, in this order."""
        for twist in twists:
            self.twists.setdefault((twist.method, path), deque()).append(twist)

    def seen(self, method: str | None = None, path: str | None = None) -> list[Request]:
        return [r for r in list(self.requests) if method in (None, r.method) and path in (None, r.path)]

    def take_twist(self, request: Request) -> Twist:
        self.requests.append(request)
        queue = self.twists.get((request.method, request.path))
        return queue.popleft() if queue else Twist()

    def refusal(self, request: Request) -> tuple[int, str, str] | None:
        """Return status, X-Error-Code and message with which the Hub refuses a request."""
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        file = self.files.get(request.path)
        root, is_hub, rest = request.path.partition("/resolve/")
        if not is_hub:
            return None if file else (404, "", "Not Found")
        if token not in ("", GOOD_TOKEN, UNGRANTED_TOKEN):
            return 401, "", "Invalid credentials in Authorization header"
        repository = [known for path, known in self.files.items() if path.startswith(f"{root}/resolve/")]
        if not repository:
            return 404 if token else 401, "RepoNotFound", "Repository not found"
        if any(known.gated for known in repository) and token != GOOD_TOKEN:
            return 403 if token else 401, "GatedRepo", "Access to this repository is restricted"
        if rest.partition("/")[0] not in ("main", COMMIT):
            return 404, "RevisionNotFound", "Invalid rev id"
        return None if file else (404, "EntryNotFound", "Entry not found")


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    owner: FileServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing: clients are killed and give up on purpose."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # with kept connections, as real servers have
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def do_HEAD(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, unquote(urlsplit(self.path).path), headers)
        twist = self.server.owner.take_twist(request)
        if twist.drop:
            return self._hang_up()
        if twist.status is not None:
            return self._answer(twist.status, twist.headers, twist.body)
        if refused := self.server.owner.refusal(request):
            status, code, message = refused
            extra = {"X-Error-Code": code, "X-Error-Message": message} if code else {"X-Error-Message": message}
            return self._answer(status, extra, json.dumps({"error": message}).encode())
        file = self.server.owner.files[request.path]
        if file.elsewhere:
            return self._answer(302, {**file.headers, "Location": file.elsewhere}, b"Found. Redirecting.")
        if "range" not in headers:
            return self._answer(200, file.headers, file.data, file, twist)
        first, size = int(headers["range"].removeprefix("bytes=").partition("-")[0]), len(file.data)
        if first >= size:
            return self._answer(416, {**file.headers, "Content-Range": f"bytes */{size}"}, b"")
        ranged = {**file.headers, "Content-Range": f"bytes {first}-{size - 1}/{size}"}
        return self._answer(206, ranged, file.data[first:], file, twist)

    do_GET = do_HEAD

    def _answer(
        self, status: int, headers: dict[str, str], body: bytes, file: _File | None = None, twist: Twist | None = None
    ) -> None:
        file, twist = file or _File(b"", {}), twist or Twist()
        self.send_response(status)
        for name, value in {"Accept-Ranges": "bytes", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        sent = body[: twist.cut_after]
        for start in range(0, len(sent), file.piece_bytes):
            self.wfile.write(sent[start : start + file.piece_bytes])
            time.sleep(file.pause_s)
        if twist.cut_after is not None:
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
