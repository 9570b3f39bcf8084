"""Downloads against a real server that breaks, lies and refuses; killed, crowded, on full disks; and the server."""

from __future__ import annotations

import gzip
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from nemo_bench.data import remote
from nemo_bench.data.download import Downloaded, download
from nemo_bench.data.remote import default_token
from nemo_bench.errors import BenchError
from tests.httpserver import COMMIT, GOOD_TOKEN, UNGRANTED_TOKEN, FileServer, Twist

ROOT = Path(__file__).resolve().parents[2]
DATA = random.Random(1).randbytes(300_000)
OTHER = random.Random(2).randbytes(len(DATA))
SHA256 = hashlib.sha256(DATA).hexdigest()

# Waits as short as can be, and never the last word of a broken connection.
QUICK: dict[str, Any] = {"backoff_s": 0.001, "max_backoff_s": 0.002, "timeout_s": 20.0}

# Downloads argv[1] to argv[2] and says what happens, line by line.
SCRIPT = """
import sys
import threading
from pathlib import Path
from nemo_bench.data.download import download
say = lambda line: print(line, flush=True)
done = download(sys.argv[1], Path(sys.argv[2]), report=say, backoff_s=0.001, max_backoff_s=0.002)
say(f"done: cached={done.cached} {done.sha256}")
"""


class Lines(list[str]):
    """A `report` that keeps its lines."""

    def __call__(self, line: str) -> None:
        self.append(line)

    def __contains__(self, part: object) -> bool:
        return any(str(part) in line for line in self)


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer() as running:
        yield running


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "shards" / "00.jsonl.zst"


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of this user's proxies, certificates and tokens."""
    for name in (
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
        "NO_PROXY",
        "REQUESTS_CA_BUNDLE",
        "CURL_CA_BUNDLE",
        "HF_TOKEN",
    ):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that would have been waited between attempts."""
    waited: list[float] = []
    monkeypatch.setattr(remote, "_sleep", waited.append)
    return waited


def refusal(*args: Any, **options: Any) -> str:
    """What `download` refuses with."""
    with pytest.raises(BenchError) as caught:
        download(*args, **QUICK | options)
    assert caught.value.exit_code == 2
    return str(caught.value)


def ranges(server: FileServer, path: str = "/a.bin") -> list[str | None]:
    return [request.headers.get("range") for request in server.seen("GET", path)]


def beside(target: Path, role: str) -> Path:
    return target.with_name(f".{target.name}.{role}")


def names(target: Path) -> list[str]:
    """What lies beside `target`, without the name that all share."""
    return sorted(path.name.replace(target.name, "") for path in target.parent.iterdir())


def break_off(server: FileServer, target: Path, after: int, path: str = "/a.bin", **options: Any) -> None:
    """A call that ends with `after` bytes there."""
    server.script(path, Twist(cut_after=after), Twist(drop=True))
    refusal(server.url(path), target, attempts=1, **options)
    assert beside(target, "part").stat().st_size == after
    server.requests.clear()


# --- the ordinary ways ---


def test_plain(server: FileServer, target: Path) -> None:
    server.put("/a.bin", DATA)
    shown: list[tuple[int, int | None]] = []
    done = download(server.url("/a.bin"), target, progress=lambda *at: shown.append(at), **QUICK)
    assert done == Downloaded(target, server.url("/a.bin"), len(DATA), SHA256, cached=False)
    assert target.read_bytes() == DATA
    assert names(target) == ["", "..done.json", "..lock"]
    assert shown[0] == (0, len(DATA)) and shown[-1] == (len(DATA), len(DATA)) and shown == sorted(shown)
    (request,) = server.requests
    assert request.headers["accept-encoding"] == "identity" and "authorization" not in request.headers

    before = target.stat()
    again = download(server.url("/a.bin"), target, sha256=SHA256.upper())
    assert again == Downloaded(target, server.url("/a.bin"), len(DATA), SHA256, cached=True)
    assert target.stat() == before and len(server.requests) == 1


def test_stored_compressed_stays_compressed(server: FileServer, target: Path) -> None:
    data = gzip.compress(DATA[:1000])
    server.put("/a.bin", data)
    server.script("/a.bin", Twist(headers={"Content-Encoding": "gzip"}))
    download(server.url("/a.bin"), target, **QUICK)
    assert target.read_bytes() == data


def test_durable_before_it_has_its_name(server: FileServer, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.put("/a.bin", DATA)
    steps: list[str] = []
    fsync, rename = os.fsync, os.rename

    def note_fsync(descriptor: int) -> None:
        steps.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def note_rename(source: Path, destination: Path) -> None:
        steps.append(f"rename {source.name}")
        rename(source, destination)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "rename", note_rename)
    download(server.url("/a.bin"), target, **QUICK)
    part = f".{target.name}.part"
    assert steps.index(f"fsync {part}") < steps.index(f"rename {part}") < steps.index(f"fsync {target.parent.name}")


def test_empty_file(server: FileServer, target: Path) -> None:
    server.put("/a.bin", b"")
    assert download(server.url("/a.bin"), target, **QUICK).size_bytes == 0
    assert target.read_bytes() == b"" and names(target) == ["", "..done.json", "..lock"]


# --- broken connections ---


def test_resumes_after_a_cut(server: FileServer, target: Path) -> None:
    server.put("/a.bin", DATA, etag='"v1"')
    server.script("/a.bin", Twist(cut_after=100_000), Twist(cut_after=50_000))
    lines = Lines()
    download(server.url("/a.bin"), target, report=lines, **QUICK)
    assert target.read_bytes() == DATA
    assert ranges(server) == [None, "bytes=100000-", "bytes=150000-"]
    assert [request.headers.get("if-range") for request in server.requests] == [None, '"v1"', '"v1"']
    assert server.body_bytes == len(DATA)
    assert "the connection was closed, after 100.0 kB of 300.0 kB" in lines


def test_the_next_call_resumes(server: FileServer, target: Path) -> None:
    server.put("/a.bin", DATA)
    break_off(server, target, 123_456)
    lines = Lines()
    shown: list[int] = []
    done = download(server.url("/a.bin"), target, report=lines, progress=lambda at, _: shown.append(at), **QUICK)
    assert target.read_bytes() == DATA and done.sha256 == SHA256 and not done.cached
    assert ranges(server) == ["bytes=123456-"] and shown[0] == 123_456
    assert "continuing after 123.5 kB" in lines
    assert names(target) == ["", "..done.json", "..lock"]


def test_only_attempts_without_progress_count(server: FileServer, target: Path) -> None:
    server.put("/a.bin", DATA)
    server.script("/a.bin", *[Twist(cut_after=20_000), Twist(status=503)] * 10)
    download(server.url("/a.bin"), target, **QUICK | {"attempts": 2})
    assert target.read_bytes() == DATA and len(server.requests) == 21


def test_gives_up_and_keeps_what_is_there(server: FileServer, target: Path) -> None:
    server.put("/a.bin", DATA)
    server.script("/a.bin", Twist(cut_after=100_000), *[Twist(status=502)] * 3)
    message = refusal(server.url("/a.bin"), target, attempts=3)
    assert len(server.requests) == 4
    assert "3 attempts in a row brought nothing new. Last cause: the server answers 502 Bad Gateway" in message
    assert "100000 bytes), and the next start continues from there" in message and "HTTPS_PROXY" in message
    download(server.url("/a.bin"), target, **QUICK)
    assert target.read_bytes() == DATA and ranges(server)[-1] == "bytes=100000-"


def test_nobody_there(target: Path) -> None:
    with FileServer() as gone:
        url = gone.url("/a.bin")
    message = refusal(url, target, attempts=2)
    assert "2 attempts" in message and "Connection refused" in message and "Nothing of it is there yet" in message
    assert names(target) == ["..lock"]


PASSING = {
    "408": Twist(status=408),
    "429": Twist(status=429),
    "500": Twist(status=500),
    "502": Twist(status=502),
    "503": Twist(status=503),
    "504": Twist(status=504),
    "no answer": Twist(drop=True),
    "short body": Twist(cut_after=0),
}


@pytest.mark.parametrize("twist", PASSING.values(), ids=PASSING.keys())
def test_passing_trouble(server: FileServer, target: Path, twist: Twist) -> None:
    server.put("/a.bin", DATA)
    server.script("/a.bin", twist, twist)
    download(server.url("/a.bin"), target, **QUICK)
    assert target.read_bytes() == DATA and len(server.requests) == 3


def test_promises_more_than_it_has(server: FileServer, target: Path) -> None:
    server.put("/a.bin", DATA)
    server.script("/a.bin", Twist(extra_length=1000))
    lines = Lines()
    download(server.url("/a.bin"), target, report=lines, **QUICK)
    # Asked for the rest of what was promised, the server turns out to have changed its mind.
    assert target.read_bytes() == DATA and "after 300.0 kB of 301.0 kB" in lines


def test_stalled(server: FileServer, target: Path) -> None:
    server.put("/a.bin", DATA)
    server.script("/a.bin", Twist(stall_after=0), Twist(stall_after=131_072))
    lines = Lines()
    download(server.url("/a.bin"), target, report=lines, **QUICK | {"timeout_s": 0.5})
    assert target.read_bytes() == DATA and "Read timed out" in lines
    assert ranges(server) == [None, None, "bytes=131072-"]


def test_retry_after(server: FileServer, target: Path, waits: list[float]) -> None:
    server.put("/a.bin", DATA)
    date = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=2000), usegmt=True)
    past = format_datetime(datetime.now(timezone.utc) - timedelta(seconds=2000), usegmt=True)
    values = ["7", date, past, "100000", "soon"]
    server.script("/a.bin", *[Twist(status=429, headers={"Retry-After": value}) for value in values])
    with pytest.raises(BenchError):
        download(server.url("/a.bin"), target, attempts=1)
    assert waits == []
    download(server.url("/a.bin"), target, max_backoff_s=4000, backoff_s=0.5)
    assert waits[1:3] == [0, 4000] and 1000 < waits[0] <= 2000
    assert 0 <= waits[3] <= 4  # not a time: the usual wait, of the fourth failure
    assert len(waits) == 4


def test_backoff_doubles_with_jitter_up_to_its_bound(
    server: FileServer, target: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    bounds: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        bounds.append((low, high))
        return high / 2

    monkeypatch.setattr(random, "uniform", uniform)
    server.put("/a.bin", DATA)
    server.script("/a.bin", *[Twist(status=500)] * 5, Twist(cut_after=1000), Twist(status=500))
    download(server.url("/a.bin"), target, backoff_s=1.0, max_backoff_s=6.0)
    assert [low for low, _ in bounds] == [0] * 7
    assert [high for _, high in bounds] == [1, 2, 4, 6, 6, 1, 1]
    assert waits == [high / 2 for _, high in bounds]


# --- what the server may do to a range ---


def test_range_ignored(server: FileServer, target: Path) -> None:
    server.put("/a.bin", DATA)
    server.script("/a.bin", Twist(cut_after=100_000), Twist(ignore_range=True))
    lines = Lines()
    download(server.url("/a.bin"), target, report=lines, **QUICK)
    assert target.read_bytes() == DATA and "starting over, the server sends the whole again" in lines
    assert ranges(server) == [None, "bytes=100000-"]


def test_range_ignored_and_always_cut_ends(server: FileServer, target: Path) -> None:
    server.put("/a.bin", DATA)
    server.script("/a.bin", *[Twist(cut_after=100_000, ignore_range=True)] * 50)
    refusal(server.url("/a.bin"), target, attempts=4)
    assert len(server.requests) == 5  # one that brought something, and four that brought the same again


def test_changed_midway(server: FileServer, target: Path) -> None:
    server.put("/a.bin", OTHER)
    break_off(server, target, 100_000)
    server.put("/a.bin", DATA)
    lines = Lines()
    done = download(server.url("/a.bin"), target, report=lines, **QUICK)
    assert target.read_bytes() == DATA and done.sha256 == SHA256
    assert "starting over, it has changed" in lines and ranges(server) == ["bytes=100000-"]


WRONG_RANGES: dict[str, dict[str, str | None]] = {
    "other etag": {"ETag": '"other"'},
    "other size": {"Content-Range": f"bytes 100000-299999/{len(DATA) + 1}"},
    "other start": {"Content-Range": f"bytes 99999-299999/{len(DATA)}"},
    "none said": {"Content-Range": None},
    "not bytes": {"Content-Range": "pages 1-2/3"},
}


@pytest.mark.parametrize("headers", WRONG_RANGES.values(), ids=WRONG_RANGES.keys())
def test_wrong_range_is_not_appended(server: FileServer, target: Path, headers: dict[str, str | None]) -> None:
    server.put("/a.bin", DATA)
    server.script("/a.bin", Twist(cut_after=100_000), Twist(headers=headers))
    download(server.url("/a.bin"), target, **QUICK)
    assert target.read_bytes() == DATA and ranges(server) == [None, "bytes=100000-", None]


def test_complete_says_416(server: FileServer, target: Path) -> None:
    server.put("/a.bin", DATA)
    # Chunked, so of unknown size, and cut just before it says that this was all.
    server.script("/a.bin", Twist(framing="chunked", cut_after=len(DATA)))
    download(server.url("/a.bin"), target, **QUICK)
    assert target.read_bytes() == DATA and ranges(server) == [None, f"bytes={len(DATA)}-"]
    assert server.body_bytes == len(DATA)


def test_shorter_now_says_416(server: FileServer, target: Path) -> None:
    date = "Sun, 01 Nov 2026 00:00:00 GMT"
    server.put("/a.bin", OTHER, etag=None, last_modified=date)
    break_off(server, target, 200_000)
    server.put("/a.bin", DATA[:1000], etag=None, last_modified=date)
    download(server.url("/a.bin"), target, **QUICK)
    assert target.read_bytes() == DATA[:1000] and ranges(server) == ["bytes=200000-", None]


def test_weak_etag_is_no_validator(server: FileServer, target: Path) -> None:
    date = "Sun, 01 Nov 2026 00:00:00 GMT"
    server.put("/a.bin", DATA, etag='W/"v1"', last_modified=date)
    server.script("/a.bin", Twist(cut_after=100_000))
    download(server.url("/a.bin"), target, **QUICK)
    assert server.requests[1].headers["if-range"] == date and ranges(server) == [None, "bytes=100000-"]


def test_nothing_to_continue_by(server: FileServer, target: Path) -> None:
    server.put("/a.bin", DATA, etag=None)
    server.script("/a.bin", Twist(cut_after=200_000), Twist(cut_after=100_000), Twist(status=503))
    message = refusal(server.url("/a.bin"), target, attempts=2)
    assert "continues" not in message and ranges(server) == [None, None, None]

    def stop(there: int, _: int | None) -> None:
        if there:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(server.url("/a.bin"), target, progress=stop, **QUICK)
    assert DATA.startswith(beside(target, "part").read_bytes())
    lines = Lines()
    download(server.url("/a.bin"), target, report=lines, **QUICK)
    assert target.read_bytes() == DATA and "there cannot be continued" in lines and "continuing" not in lines


def test_a_checksum_is_enough_to_continue_by(server: FileServer, target: Path) -> None:
    server.put("/a.bin", DATA, etag=None)
    break_off(server, target, 200_000, sha256=SHA256)
    download(server.url("/a.bin"), target, sha256=SHA256, **QUICK)
    assert target.read_bytes() == DATA and ranges(server) == ["bytes=200000-"]


def test_part_of_another_url_or_expectation_is_dropped(server: FileServer, target: Path, hub_url: str) -> None:
    server.put("/a.bin", DATA)
    server.put("/b.bin", OTHER)
    break_off(server, target, 100_000, "/b.bin")
    download(server.url("/a.bin"), target, **QUICK)
    assert target.read_bytes() == DATA and ranges(server) == [None]

    second = target.with_name("second")
    server.script(f"/cdn/{SHA256}", Twist(cut_after=100_000), Twist(drop=True))
    refusal(hub_url, second, token=GOOD_TOKEN, attempts=1)
    other = hashlib.sha256(OTHER).hexdigest()
    server.put_hub("org/data", "train/00.jsonl.zst", OTHER, repo_type="dataset", lfs=True, gated=True)
    download(hub_url, second, token=GOOD_TOKEN, sha256=other, **QUICK)
    assert second.read_bytes() == OTHER and ranges(server, f"/cdn/{other}") == [None]


def test_damaged_sidecar(server: FileServer, target: Path) -> None:
    server.put("/a.bin", DATA)
    break_off(server, target, 100_000)
    beside(target, "part.json").write_text('{"url": ')
    download(server.url("/a.bin"), target, **QUICK)
    assert target.read_bytes() == DATA and ranges(server) == [None]


# --- a body whose size nobody tells ---


def test_chunked(server: FileServer, target: Path) -> None:
    server.put("/a.bin", DATA)
    server.script("/a.bin", Twist(framing="chunked", cut_after=131_072), Twist(framing="chunked"))
    shown: list[tuple[int, int | None]] = []
    download(server.url("/a.bin"), target, progress=lambda *at: shown.append(at), **QUICK)
    assert target.read_bytes() == DATA and shown[0] == (0, None)
    assert ranges(server) == [None, "bytes=131072-"]


def test_neither_size_nor_end(server: FileServer, target: Path) -> None:
    server.put("/a.bin", DATA)
    server.script("/a.bin", Twist(framing="close"))
    message = refusal(server.url("/a.bin"), target)
    assert "neither its size nor its end" in message and str(target) in message
    assert names(target) == ["..lock"]
    server.script("/a.bin", Twist(framing="close", cut_after=100_000), Twist(framing="close"))
    download(server.url("/a.bin"), target, sha256=SHA256, **QUICK)
    # A broken one looks like a whole one of another content.
    assert target.read_bytes() == DATA and ranges(server)[1:] == [None, None]


# --- not the file expected ---


def test_wrong_checksum(server: FileServer, target: Path) -> None:
    server.put("/a.bin", OTHER)
    message = refusal(server.url("/a.bin"), target, sha256=SHA256)
    assert SHA256 in message and hashlib.sha256(OTHER).hexdigest() in message
    assert server.body_bytes == 2 * len(OTHER) and names(target) == ["..lock"]


def test_damaged_once(server: FileServer, target: Path) -> None:
    server.put("/a.bin", DATA)
    server.script("/a.bin", Twist(status=200, body=OTHER))
    lines = Lines()
    download(server.url("/a.bin"), target, sha256=SHA256, report=lines, **QUICK)
    assert target.read_bytes() == DATA and "Downloading it once more from the start" in lines


def test_part_damaged_on_disk(server: FileServer, target: Path) -> None:
    server.put("/a.bin", DATA)
    break_off(server, target, 100_000, sha256=SHA256)
    beside(target, "part").write_bytes(bytes(100_000))
    download(server.url("/a.bin"), target, sha256=SHA256, **QUICK)
    assert target.read_bytes() == DATA and ranges(server) == ["bytes=100000-", None]


def test_bad_expectation(server: FileServer, target: Path) -> None:
    assert "64 hexadecimal digits" in refusal(server.url("/a.bin"), target, sha256="abc")
    assert server.requests == []


# --- refused ---


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 418])
def test_refused_at_once(server: FileServer, target: Path, status: int) -> None:
    server.script("/a.bin", Twist(status=status))
    message = refusal(server.url("/a.bin"), target, token="my-secret")
    assert server.url("/a.bin") in message and str(status) in message and "my-secret" not in message
    assert len(server.requests) == 1 and names(target) == ["..lock"]


def test_token_opens(server: FileServer, target: Path, tmp_path: Path) -> None:
    server.put("/a.bin", DATA, token=GOOD_TOKEN)
    assert "401" in refusal(server.url("/a.bin"), target)
    assert "403" in refusal(server.url("/a.bin"), target, token="bad")
    # requests would let an entry for the host take the place of a plain Authorization header.
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login somebody password else\n")
    download(server.url("/a.bin"), target, token=f"{GOOD_TOKEN}\n", **QUICK)
    assert target.read_bytes() == DATA


@pytest.mark.parametrize("token", ["se cret", "se\ncret", "secrét"])
def test_impossible_token(server: FileServer, target: Path, token: str) -> None:
    message = refusal(server.url("/a.bin"), target, token=token)
    assert "HF_TOKEN" in message and token not in message and server.requests == []


def test_token_and_other_secrets_stay_here(server: FileServer, target: Path) -> None:
    server.put("/a.bin", DATA)
    server.script("/a.bin", Twist(redirect=f"{server.endpoint}/b.bin"))
    server.script("/b.bin", Twist(redirect=f"{server.other_endpoint}/c.bin?Signature=my-signature"))
    server.script("/c.bin", Twist(drop=True))
    lines = Lines()
    url = f"http://user:my-password@127.0.0.1:{server.port}/a.bin?key=my-key"
    message = refusal(url, target, token="my-secret", attempts=1, report=lines)
    sent = {request.path: request.headers.get("authorization") for request in server.requests}
    assert sent == {"/a.bin": "Bearer my-secret", "/b.bin": "Bearer my-secret", "/c.bin": None}
    with FileServer() as gone:
        nobody = f"{gone.other_endpoint}/c.bin?Signature=my-signature"
    server.script("/a.bin", Twist(redirect=nobody), Twist(cut_after=1000))
    message += refusal(url, target, token="my-secret", attempts=1, report=lines)
    assert "Connection refused" in message
    download(url, target, token="my-secret", report=lines, **QUICK)
    written = beside(target, "done.json").read_text()
    for secret in ("my-secret", "my-password", "my-key", "my-signature"):
        assert secret not in message and secret not in lines and secret not in written


@pytest.mark.parametrize(
    "url", ["ftp://host/a", "file:///etc/hosts", "/etc/hosts", "host/a", "http://", "http://[::1/a"]
)
def test_not_a_url(target: Path, url: str) -> None:
    assert "is not a URL" in refusal(url, target)
    assert not target.parent.exists()


def test_redirected_in_circles_or_elsewhere(server: FileServer, target: Path) -> None:
    server.script("/a.bin", *[Twist(redirect=server.url("/a.bin"))] * 40)
    assert "redirects" in refusal(server.url("/a.bin"), target)
    server.script("/b.bin", Twist(redirect="ftp://host/b.bin"))
    assert "cannot be asked for" in refusal(server.url("/b.bin"), target)


# --- Hugging Face ---


@pytest.fixture
def hub_url(server: FileServer) -> str:
    return server.put_hub("org/data", "train/00.jsonl.zst", DATA, repo_type="dataset", lfs=True, gated=True)


def test_hub_download(server: FileServer, target: Path, hub_url: str) -> None:
    assert hub_url == f"{server.endpoint}/datasets/org/data/resolve/main/train/00.jsonl.zst"
    cdn = f"/cdn/{SHA256}"
    server.script(cdn, Twist(cut_after=100_000), Twist(status=503))
    lines = Lines()
    done = download(hub_url, target, token=GOOD_TOKEN, report=lines, **QUICK)
    assert target.read_bytes() == DATA and done.sha256 == SHA256
    # The delivery network tells no validator: the checksum on the redirect is what allows to continue.
    assert ranges(server, cdn) == [None, "bytes=100000-", "bytes=100000-"]
    assert all("authorization" not in request.headers for request in server.seen(path=cdn))
    assert "secret-signature" not in lines and "secret-signature" not in beside(target, "done.json").read_text()


def test_hub_file_changes_midway(server: FileServer, target: Path, hub_url: str) -> None:
    server.script(f"/cdn/{SHA256}", Twist(cut_after=100_000), Twist(drop=True))
    refusal(hub_url, target, token=GOOD_TOKEN, attempts=1)
    server.put_hub("org/data", "train/00.jsonl.zst", OTHER, repo_type="dataset", lfs=True, gated=True)
    lines = Lines()
    download(hub_url, target, token=GOOD_TOKEN, report=lines, **QUICK)
    assert target.read_bytes() == OTHER and "it has changed" in lines
    # Found out before a byte of it was put behind those of the old file.
    assert ranges(server, f"/cdn/{hashlib.sha256(OTHER).hexdigest()}") == ["bytes=100000-", None]


def test_hub_file_arrives_damaged(server: FileServer, target: Path, hub_url: str) -> None:
    cdn = f"/cdn/{SHA256}"
    server.script(cdn, Twist(status=200, body=OTHER))
    download(hub_url, target, token=GOOD_TOKEN, **QUICK)
    assert target.read_bytes() == DATA and ranges(server, cdn) == [None, None]


def test_hub_file_is_longer_than_announced(server: FileServer, target: Path, hub_url: str) -> None:
    server.script(f"/cdn/{SHA256}", *[Twist(status=200, body=DATA + b"more", framing="chunked")] * 2)
    assert "has at least 300004 bytes instead of 300000" in refusal(hub_url, target, token=GOOD_TOKEN)
    assert names(target) == ["..lock"]


def test_hub_announces_another_checksum(server: FileServer, target: Path, hub_url: str) -> None:
    wrong = hashlib.sha256(OTHER).hexdigest()
    received: list[int] = []
    message = refusal(hub_url, target, token=GOOD_TOKEN, sha256=wrong, progress=lambda at, _: received.append(at))
    assert wrong in message and SHA256 in message and names(target) == ["..lock"]
    assert received == []  # known from the redirect


def test_hub_refuses(server: FileServer, target: Path, hub_url: str) -> None:
    page = f"{server.endpoint}/datasets/org/data"
    message = refusal(hub_url, target)
    assert "401" in message and f"accept the terms at {page} (" in message and "export HF_TOKEN=" in message
    for token, status in ((UNGRANTED_TOKEN, "403"), ("hf_secret", "401")):
        message = refusal(hub_url, target, token=token)
        assert status in message and page in message and "HF_TOKEN" in message and token not in message
    server.script(f"/cdn/{SHA256}", Twist(status=403))
    message = refusal(hub_url, target, token=GOOD_TOKEN)
    assert "the answer of localhost" in message and "HF_TOKEN" not in message
    assert "404" in refusal(hub_url.replace("00", "77"), target, token=GOOD_TOKEN)


def test_default_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert default_token() is None
    (tmp_path / "token").write_text("stored\n")
    assert default_token() == "stored"
    monkeypatch.setenv("HF_TOKEN", " from-environment\n")
    assert default_token() == "from-environment"


def test_server_is_a_hub_to_huggingface_hub(server: FileServer, tmp_path: Path) -> None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

    server.put_hub("org/model", "config.json", b'{"a": 1}', gated=True)
    server.put_hub("org/model", "tokenizer.json", DATA, lfs=True, gated=True)

    def get(name: str, repo: str = "org/model", token: str | bool = GOOD_TOKEN) -> bytes:
        path = hf_hub_download(
            repo, name, endpoint=server.endpoint, token=token, cache_dir=tmp_path / str(token), etag_timeout=20
        )
        assert token != GOOD_TOKEN or COMMIT in path
        return Path(path).read_bytes()

    assert get("config.json") == b'{"a": 1}' and get("tokenizer.json") == DATA
    (at_cdn,) = server.seen("GET", f"/cdn/{SHA256}")
    assert at_cdn.host.startswith("localhost") and "authorization" not in at_cdn.headers
    sizes = {}
    for name in ("config.json", "tokenizer.json"):
        url = hf_hub_url("org/model", name, endpoint=server.endpoint)
        sizes[name] = get_hf_file_metadata(url, token=GOOD_TOKEN).size
    assert sizes == {"config.json": 8, "tokenizer.json": len(DATA)}

    with pytest.raises(EntryNotFoundError):
        get("missing.json")
    for token in (False, UNGRANTED_TOKEN):
        with pytest.raises(GatedRepoError):
            get_hf_file_metadata(hf_hub_url("org/model", "config.json", endpoint=server.endpoint), token=token)
    with pytest.raises(RepositoryNotFoundError):
        get("config.json", "org/none")


# --- a file that is there already ---


def put_by_hand(target: Path, data: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)


def test_adopts_the_right_file(server: FileServer, target: Path, hub_url: str) -> None:
    put_by_hand(target, DATA)
    done = download(hub_url, target, token=GOOD_TOKEN, **QUICK)
    assert done == Downloaded(target, hub_url, len(DATA), SHA256, cached=True)
    assert server.seen("GET") == [] and names(target) == ["", "..done.json", "..lock"]
    server.requests.clear()
    assert download(hub_url, target, **QUICK) == done and server.requests == []


def test_refuses_a_file_that_differs(server: FileServer, target: Path, hub_url: str) -> None:
    put_by_hand(target, DATA[:-1])
    message = refusal(hub_url, target, token=GOOD_TOKEN)
    assert str(target) in message and "has 299999 bytes instead of 300000" in message and "Move it away" in message
    put_by_hand(target, OTHER)
    assert f"instead of {SHA256}" in refusal(hub_url, target, token=GOOD_TOKEN)
    assert f"instead of {SHA256}" in refusal(hub_url, target, sha256=SHA256)  # without a token: nobody has to be asked
    assert target.read_bytes() == OTHER and names(target) == ["", "..lock"]


@pytest.mark.parametrize("status", [403, 405, 501])
def test_compares_also_where_head_is_not_answered(server: FileServer, target: Path, status: int) -> None:
    server.put("/a.bin", DATA)
    put_by_hand(target, DATA)
    server.script("/a.bin", Twist("HEAD", status=status))
    assert download(server.url("/a.bin"), target, **QUICK).cached
    assert ranges(server) == ["bytes=0-0"]
    server.wait_for(lambda s: s.body_bytes == 1)

    server.put("/empty", b"")
    server.script("/empty", Twist("HEAD", status=status))
    assert "instead of 0" in refusal(server.url("/empty"), target)


def test_adopts_what_it_cannot_compare(target: Path) -> None:
    with FileServer() as gone:
        url = gone.url("/a.bin")
    put_by_hand(target, DATA)
    lines = Lines()
    assert download(url, target, report=lines, **QUICK).cached
    assert "cannot be learnt what it should be" in lines
    assert download(url, target, report=Lines(), **QUICK).sha256 == SHA256


def test_touched_or_changed_since(server: FileServer, target: Path) -> None:
    server.put("/a.bin", DATA)
    download(server.url("/a.bin"), target, **QUICK)
    os.utime(target, ns=(1, 1))
    assert download(server.url("/a.bin"), target, **QUICK).cached and len(server.seen("GET")) == 1
    target.write_bytes(OTHER)
    os.utime(target, ns=(2, 2))
    message = refusal(server.url("/a.bin"), target)
    assert SHA256 in message and hashlib.sha256(OTHER).hexdigest() in message


def test_finished_file_of_another_expectation_or_url(server: FileServer, target: Path) -> None:
    server.put("/a.bin", DATA)
    server.put("/b.bin", OTHER[:-1])
    download(server.url("/a.bin"), target, **QUICK)
    wrong = hashlib.sha256(OTHER).hexdigest()
    assert f"instead of {wrong}" in refusal(server.url("/a.bin"), target, sha256=wrong)
    assert "instead of 299999" in refusal(server.url("/b.bin"), target)
    # The query belongs to the address, too, though it is written nowhere.
    server.requests.clear()
    assert download(server.url("/a.bin") + "?part=2", target, **QUICK).cached
    assert [request.method for request in server.requests] == ["HEAD"]


@pytest.mark.parametrize("kind", ["folder", "dangling link"])
def test_not_a_file(server: FileServer, target: Path, kind: str) -> None:
    if kind == "folder":
        target.mkdir(parents=True)
    else:
        target.parent.mkdir()
        target.symlink_to("nowhere")
    assert f"{target} is not a file" in refusal(server.url("/a.bin"), target)


def test_deleted_file_is_downloaded_again(server: FileServer, target: Path) -> None:
    server.put("/a.bin", DATA)
    download(server.url("/a.bin"), target, **QUICK)
    target.unlink()
    assert not download(server.url("/a.bin"), target, **QUICK).cached and target.read_bytes() == DATA


# --- the ways there ---


def test_proxy_of_the_environment(server: FileServer, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.put("/a.bin", DATA)
    monkeypatch.setenv("http_proxy", server.endpoint)
    download("http://data.invalid/a.bin", target, **QUICK)
    assert target.read_bytes() == DATA and server.requests[0].host == "data.invalid"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl on this machine to make a certificate with")
def test_certificates(target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pem = tmp_path / "server.pem"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test"
    command = [*make.split(), "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    pem.write_bytes((tmp_path / "key.pem").read_bytes() + (tmp_path / "cert.pem").read_bytes())
    with FileServer(certificate=pem) as server:
        server.put("/a.bin", DATA)
        message = refusal(server.url("/a.bin"), target)
        assert "not trusted" in message and "REQUESTS_CA_BUNDLE" in message and server.requests == []
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "nowhere.pem"))
        message = refusal(server.url("/a.bin"), target)
        assert "nowhere.pem" in message and "Choose a folder" not in message
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "cert.pem"))
        download(server.url("/a.bin"), target, **QUICK)
    assert target.read_bytes() == DATA


def test_costs_nothing_to_import() -> None:
    code = "import sys, nemo_bench.data.download; print({'requests', 'urllib3', 'huggingface_hub'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


# --- company, kills and interruptions ---


def start(url: str, target: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, url, str(target)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


def test_two_processes_at_once(server: FileServer, target: Path) -> None:
    server.put("/a.bin", DATA)
    stall = Twist(stall_after=100_000)
    server.script("/a.bin", stall)
    first = start(server.url("/a.bin"), target)
    server.wait_for(lambda s: s.body_bytes == 100_000)
    second = start(server.url("/a.bin"), target)
    assert second.stdout is not None
    assert "Waiting for another process" in second.stdout.readline()
    stall.release.set()
    outputs = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0]
    assert f"done: cached=False {SHA256}" in outputs[0] and f"done: cached=True {SHA256}" in outputs[1]
    assert len(server.requests) == 1 and server.body_bytes == len(DATA)


def test_many_threads_at_once(server: FileServer, tmp_path: Path) -> None:
    paths = [f"/{number}.bin" for number in range(3)]
    for number, path in enumerate(paths):
        server.put(path, random.Random(number).randbytes(200_000))
        server.script(path, Twist(cut_after=50_000))
    with ThreadPoolExecutor(9) as pool:
        done = list(pool.map(lambda path: download(server.url(path), tmp_path / path[1:], **QUICK), paths * 3))
    assert sorted(one.cached for one in done) == [False] * 3 + [True] * 6
    assert len(server.requests) == 6
    assert [(tmp_path / path[1:]).read_bytes() for path in paths] == [
        random.Random(n).randbytes(200_000) for n in range(3)
    ]


def test_a_killed_process_holds_no_lock(server: FileServer, target: Path) -> None:
    server.put("/a.bin", DATA)
    server.script("/a.bin", Twist(stall_after=2 * 65_536))
    process = start(server.url("/a.bin"), target)
    part = beside(target, "part")
    server.wait_for(lambda s: s.body_bytes == 2 * 65_536)
    process.kill()
    process.communicate(timeout=60)
    lines = Lines()
    download(server.url("/a.bin"), target, report=lines, **QUICK)
    assert target.read_bytes() == DATA and "Waiting" not in lines and not part.exists()


def test_killed_at_random_moments(server: FileServer, target: Path) -> None:
    chance = random.Random(3)
    data = chance.randbytes(4 << 20)
    server.put("/a.bin", data, piece_bytes=16 << 10, pause_s=0.002)
    for _ in range(15):
        before, enough = server.body_bytes, chance.randrange(1, len(data) // 16)
        # The kill comes as the last of these bytes goes out; held up there, the server is done before it on no machine.
        server.script("/a.bin", Twist(stall_after=enough))
        process = start(server.url("/a.bin"), target)
        server.wait_for(lambda s, enough=before + enough: s.body_bytes >= enough)  # type: ignore[misc]
        process.kill()
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL and not target.exists()
        assert data.startswith(beside(target, "part").read_bytes())
    positions = [int(text[6:-1]) for text in ranges(server) if text is not None]
    assert positions == sorted(positions) and positions[0] < positions[-1]
    server.put("/a.bin", data)
    download(server.url("/a.bin"), target, **QUICK)
    assert target.read_bytes() == data and names(target) == ["", "..done.json", "..lock"]
    assert positions[-1] <= int((ranges(server)[-1] or "")[6:-1]) < len(data)


# Kills itself just before step argv[3] of those that change the file system; prints their number without it.
STEPS = """
import os, pathlib, signal, sys
count = 0
def counted(function):
    def step(*args, **kwargs):
        global count
        count += 1
        if count == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return step
for owner, name in ((os, "replace"), (os, "rename"), (os, "fsync"), (pathlib.Path, "unlink"), (pathlib.Path, "touch")):
    setattr(owner, name, counted(getattr(owner, name)))
"""


def test_killed_at_each_step(server: FileServer, tmp_path: Path) -> None:
    server.put("/a.bin", DATA)

    def run(step: int) -> tuple[Path, subprocess.CompletedProcess[str]]:
        target = tmp_path / str(step) / "a.bin"
        command = [sys.executable, "-c", STEPS + SCRIPT + "say(count)", server.url("/a.bin"), str(target), str(step)]
        return target, subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)

    steps = int(run(0)[1].stdout.split()[-1])
    assert steps >= 8
    with ThreadPoolExecutor(2) as pool:
        for target, process in pool.map(run, range(1, steps + 1)):
            assert process.returncode == -signal.SIGKILL
            assert not target.exists() or target.read_bytes() == DATA
            requests = len(server.requests)
            was_complete = target.exists()
            assert download(server.url("/a.bin"), target, **QUICK).cached == was_complete
            if was_complete:  # then it has its record as well, and nobody has to be asked
                assert len(server.requests) == requests
            assert target.read_bytes() == DATA


def test_somebody_puts_a_file_there_meanwhile(server: FileServer, target: Path) -> None:
    server.put("/a.bin", DATA)
    stall = Twist(stall_after=100_000)
    server.script("/a.bin", stall)
    with ThreadPoolExecutor(1) as pool:
        refused = pool.submit(refusal, server.url("/a.bin"), target)
        server.wait_for(lambda s: s.body_bytes == 100_000)
        target.write_bytes(b"mine")
        stall.release.set()
        assert "move it away" in refused.result(timeout=60)
    assert target.read_bytes() == b"mine"
    assert "instead of 300000" in refusal(server.url("/a.bin"), target)
    target.unlink()
    server.requests.clear()
    # All was there and is used without asking anybody.
    assert download(server.url("/a.bin"), target, **QUICK).sha256 == SHA256 and server.requests == []
    assert target.read_bytes() == DATA


def test_ended_by_its_caller(server: FileServer, target: Path) -> None:
    server.put("/a.bin", DATA)

    def stop(there: int, _: int | None) -> None:
        if there > 100_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(server.url("/a.bin"), target, progress=stop, **QUICK)
    there = beside(target, "part").stat().st_size
    download(server.url("/a.bin"), target, **QUICK)
    assert there > 100_000 and ranges(server) == [None, f"bytes={there}-"] and target.read_bytes() == DATA


def test_interrupted_before_it_takes_up_what_is_there(server: FileServer, target: Path) -> None:
    server.put("/b.bin", DATA)
    break_off(server, target, 100_000, "/b.bin")

    def stop(line: str) -> None:
        raise KeyboardInterrupt(line)

    with pytest.raises(KeyboardInterrupt, match="cannot be continued"):
        download(server.url("/a.bin"), target, report=stop, **QUICK)
    download(server.url("/b.bin"), target, **QUICK)
    assert target.read_bytes() == DATA and ranges(server, "/b.bin") == ["bytes=100000-"]


# --- disks ---


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"this user may not mount: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_too_large_for_the_disk(server: FileServer, small_disk: Path) -> None:
    data = bytes(3 << 20)
    server.put("/a.bin", data)
    message = refusal(server.url("/a.bin"), small_disk / "a.bin")
    assert "3.1 MB are needed, 2.1 MB are free" in message and str(small_disk) in message
    assert names(small_disk / "a.bin") == ["..lock"]


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_disk_fills_up(server: FileServer, small_disk: Path, framing: str) -> None:
    target = small_disk / "a.bin"
    data = random.Random(4).randbytes(3 << 19)
    server.put("/a.bin", data)
    stall = Twist(stall_after=1 << 19, framing=framing)
    server.script("/a.bin", stall)
    with ThreadPoolExecutor(1) as pool:
        arrived = threading.Event()
        refused = pool.submit(
            refusal, server.url("/a.bin"), target, progress=lambda at, _: arrived.set() if at == 1 << 19 else None
        )
        assert arrived.wait(timeout=60)
        (small_disk / "somebody-elses").write_bytes(bytes(1 << 20))
        stall.release.set()
        message = refused.result(timeout=60)
    there = beside(target, "part").read_bytes()
    assert len(there) > 1 << 19 and data.startswith(there)
    assert "No space for" in message and "0 bytes are free" in message and "the next start continues" in message
    if framing == "length":
        assert f"{(len(data) - len(there)) / 1e3:.1f} kB are needed" in message

    os.truncate(small_disk / "somebody-elses", (1 << 20) - 100_000)
    again = refusal(server.url("/a.bin"), target)  # still not enough, as the answer's size tells beforehand
    assert "are needed" in again and beside(target, "part").read_bytes() == there
    (small_disk / "somebody-elses").unlink()
    download(server.url("/a.bin"), target, **QUICK)
    assert target.read_bytes() == data
    assert ranges(server) == [None, f"bytes={len(there)}-", f"bytes={len(there)}-"]


def test_no_folder_to_be_had(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = refusal(server.url("/a.bin"), tmp_path / "file" / "a.bin")
    assert "Cannot download to" in message and "Choose a folder" in message and server.requests == []
