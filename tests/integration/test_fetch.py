"""Downloads that break off, are refused, are killed, or bring another file than expected."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_bench.data import fetch
from nemo_bench.errors import BenchError
from tests.conftest import PROJECT
from tests.httpserver import COMMIT, GOOD_TOKEN, UNGRANTED_TOKEN, FileServer, Twist
from tests.integration.conftest import wait_for

DATA = random.Random(1).randbytes(3_000_000)
SHA256 = hashlib.sha256(DATA).hexdigest()
REPO, NAME = "org/pile", "train/00.jsonl.zst"
CHILD = """
import pathlib, sys
from nemo_bench.data.fetch import fetch
from nemo_bench.files import sha256_of
path = pathlib.Path(sys.argv[2])
fetch(sys.argv[1], path, lambda _: None)
print(sha256_of(path))
"""


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer() as server:
        yield server


@pytest.fixture(params=["curl", "hub"])
def url(request: pytest.FixtureRequest, server: FileServer) -> str:
    """The same file on any server, and on the Hub, which sends its large files from another host."""
    if request.param == "hub":
        return server.put_hub(REPO, NAME, DATA, repo_type="dataset", lfs=True)
    server.put("/00.jsonl.zst", DATA)
    return server.url("/00.jsonl.zst")


def body_path(url: str) -> str:
    """The path whose GET sends the bytes."""
    return f"/cdn/{SHA256}" if "resolve" in url else "/00.jsonl.zst"


def start(url: str, destination: Path, server: FileServer, **environment: str) -> subprocess.Popen[str]:
    """Fetch in a process of its own, which reads HF_ENDPOINT as a user's does."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    settings = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(destination.parent), "PYTHONPATH": str(PROJECT)}
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, url, str(destination)],
        env={**clean, **settings, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(url: str, destination: Path, server: FileServer, **environment: str) -> str:
    """What it printed and, if it failed, its error."""
    out, err = start(url, destination, server, **environment).communicate(timeout=60)
    return out.strip() if not err else out + err


def is_clean(folder: Path) -> bool:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == [".file.lock"]


def test_the_file_comes_once(url: str, server: FileServer, tmp_path: Path) -> None:
    destination = tmp_path / "a" / "file"
    assert run(url, destination, server) == SHA256
    assert destination.read_bytes() == DATA and is_clean(destination.parent)
    requests = len(server.requests)
    assert run(url, destination, server) == SHA256 and len(server.requests) == requests


def test_broken_connections(url: str, server: FileServer, tmp_path: Path) -> None:
    path = body_path(url)
    server.script(path, Twist(cut_after=1_000_000), Twist(status=503), Twist(cut_after=500_000))
    server.script(path, Twist(method="HEAD", drop=True))
    out = run(url, tmp_path / "file", server)
    assert out.splitlines()[-1] == SHA256 and "Trying again in 1 s" in out, out
    assert (tmp_path / "file").read_bytes() == DATA and is_clean(tmp_path)


@pytest.mark.parametrize("whole_group", [True, False], ids=["with its curl", "alone"])
def test_a_killed_download_goes_on_where_it_was(server: FileServer, tmp_path: Path, whole_group: bool) -> None:
    """Of the Hub's client the same was measured; it keeps pieces of 10 MB. A curl that lives on ends the download."""
    server.put("/00.jsonl.zst", DATA, piece_bytes=50_000, pause_s=0.05)
    url, part = server.url("/00.jsonl.zst"), tmp_path / ".file.part"
    child = start(url, tmp_path / "file", server)
    wait_for(lambda: sum(path.stat().st_size for path in part.glob("*")) > 500_000, "half a megabyte")
    os.killpg(child.pid, signal.SIGKILL) if whole_group else child.kill()
    child.communicate()
    assert not (tmp_path / "file").exists()
    assert run(url, tmp_path / "file", server).splitlines()[-1] == SHA256
    ranges = [request.headers["range"] for request in server.seen("GET") if "range" in request.headers]
    assert is_clean(tmp_path) and len(ranges) == whole_group
    assert not ranges or int(ranges[0].removeprefix("bytes=").rstrip("-")) > 500_000


def test_a_file_damaged_on_its_way_from_the_hub(server: FileServer, tmp_path: Path) -> None:
    url = server.put_hub(REPO, NAME, DATA, repo_type="dataset", lfs=True)
    server.script(body_path(url), Twist(status=200, body=DATA[::-1]))
    assert "damaged on its way (checksum)" in run(url, tmp_path / "file", server)
    assert run(url, tmp_path / "file", server) == SHA256


@pytest.mark.parametrize("status", [401, 404, 418])
def test_refusals_of_any_server(server: FileServer, tmp_path: Path, status: int) -> None:
    server.put("/a", DATA)
    server.script("/a", Twist(method="HEAD", status=status), Twist(status=status))
    url = server.url("/a").replace("//", "//user:passw0rd@") + "?signature=s3cret"
    with pytest.raises(BenchError) as caught:
        fetch.fetch(url, tmp_path / "file", lambda _: None)
    assert str(caught.value) == f"{server.url('/a')} cannot be downloaded: The requested URL returned error: {status}"


@pytest.mark.parametrize(
    ("address", "token", "words"),
    [
        (f"datasets/{REPO}/resolve/main/{NAME}", "", "(401), and HF_TOKEN is not set.\n  1. access: log in"),
        (f"datasets/{REPO}/resolve/main/{NAME}", UNGRANTED_TOKEN, "no such repository (403), with this token"),
        (f"datasets/{REPO}/resolve/main/none", GOOD_TOKEN, "org/pile has no none in revision main"),
        (f"datasets/{REPO}/resolve/v9/{NAME}", GOOD_TOKEN, "in revision v9"),
        (f"org/none/resolve/main/{NAME}", GOOD_TOKEN, "org/none: access refused or no such repository (404)"),
    ],
)
def test_refusals_of_the_hub(server: FileServer, tmp_path: Path, address: str, token: str, words: str) -> None:
    url = server.put_hub(REPO, NAME, DATA, repo_type="dataset", lfs=True, gated=True)
    assert words in run(server.url(f"/{address}"), tmp_path / "file", server, **({"HF_TOKEN": token} if token else {}))
    assert "HF_HUB_OFFLINE" in run(url, tmp_path / "file", server, HF_HUB_OFFLINE="1")


def test_the_token_goes_to_the_hub_alone(server: FileServer, tmp_path: Path) -> None:
    url = server.put_hub(REPO, NAME, DATA, repo_type="dataset", lfs=True, gated=True)
    assert run(url, tmp_path / "file", server, HF_TOKEN=GOOD_TOKEN) == SHA256
    server.put("/other", DATA)
    assert run(server.url("/other"), tmp_path / "other", server, HF_TOKEN=GOOD_TOKEN) == SHA256
    with_token = {request.path for request in server.requests if "authorization" in request.headers}
    assert with_token == {f"/datasets/{REPO}/resolve/{revision}/{NAME}" for revision in ("main", COMMIT)}


def test_giving_up(server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "PAUSE_S", 0.0)
    server.put("/a", DATA)
    server.script("/a", Twist(cut_after=1000), *[Twist(drop=True)] * fetch.ATTEMPTS)
    with pytest.raises(BenchError, match=r"7 attempts in a row brought nothing new .*1\.0 kB are here"):
        fetch.fetch(server.url("/a"), tmp_path / "file", lambda _: None)
    assert run(server.url("/a"), tmp_path / "file", server) == SHA256
