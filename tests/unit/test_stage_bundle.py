"""Bundles: what goes in comes out, and a damaged, foreign or hostile bundle changes nothing."""

from __future__ import annotations

import io
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from backports.zstd import tarfile

from nemo_bench.errors import BenchError
from nemo_bench.stage.bundle import install, pack
from nemo_bench.stage.stage import NAME, Entry, Part, Stage, describe, manifest_json
from tests.datasets import make_dataset

DATASET = "llama3.1-dataset/wiki.en_03_content_document"
PARTS = [
    Part(name, place, {"a": 1}, "", lambda *_: "")
    for name, place in (
        ("image", "nemo.sqsh"),
        ("tokenizer", "llama3.1-dataset/llama"),
        ("code", "nemo_bench"),
    )
]
Members = list[tuple[tarfile.TarInfo, bytes]]


def contents(folder: Path) -> dict[str, bytes]:
    """Return all files, except the manifest and the locks."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock" and path.name != NAME)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def stage(tmp_path: Path, small_tokenizer: Path) -> Stage:
    """A stage folder with an image, a tokenizer, code and a dataset."""
    stage = Stage(tmp_path / "stage")
    files = {
        "nemo.sqsh": b"hsqs" + random.Random(1).randbytes(30_000),
        "llama3.1-dataset/llama/tokenizer.json": b"{}",
        "llama3.1-dataset/llama/config.json": b'{"a": 1}',
        "nemo_bench/train.py": b"print()\n",
        "nemo_bench/conf/.gitignore": b"",
        "nemo_bench/\N{LATIN SMALL LETTER E WITH ACUTE}.txt": b"not ASCII",
    }
    for name, data in files.items():
        (stage.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (stage.folder / name).write_bytes(data)
    entries = {
        part.place: Entry(part.name, "2026", part.settings, "1", describe(stage.folder / part.place, part.place))
        for part in PARTS
    }
    stage.manifest.write_text(json.dumps(manifest_json(entries)))
    make_dataset(stage.folder / DATASET, small_tokenizer)
    return stage


@pytest.fixture
def packed(stage: Stage, tmp_path: Path) -> Path:
    pack(stage, PARTS, tmp_path / "stage.tar")
    return tmp_path / "stage.tar"


@pytest.fixture
def other(tmp_path: Path) -> Stage:
    """Another stage folder, which does not exist yet."""
    return Stage(tmp_path / "other")


@pytest.mark.parametrize("name", ["b.tar", "b.tar.zst"])
def test_round_trip(stage: Stage, other: Stage, tmp_path: Path, name: str) -> None:
    foreign = stage.folder / "llama3.1-dataset" / "mine_document.bin"  # not made by prepare_data.py
    foreign.touch()
    pack(stage, PARTS, tmp_path / name)
    foreign.unlink()
    assert ((tmp_path / name).read_bytes()[:4] == b"\x28\xb5\x2f\xfd") == name.endswith("zst")
    install(other, tmp_path / name, dry=False)
    assert contents(other.folder) == contents(stage.folder) and other.entries() == stage.entries()
    before = {path: path.stat().st_mtime_ns for path in other.folder.rglob("*")}
    install(other, tmp_path / name, dry=False)
    assert {path: path.stat().st_mtime_ns for path in other.folder.rglob("*")} == before


@pytest.mark.parametrize("suffix", ["tar", "tar.zst"])
def test_damage_is_seen(stage: Stage, tmp_path: Path, suffix: str) -> None:
    """Cut off anywhere, or with any one byte changed: everything is installed as it was packed, or nothing is."""
    good = tmp_path / f"good.{suffix}"
    pack(stage, PARTS, good)
    data, bad = good.read_bytes(), tmp_path / f"bad.{suffix}"
    choose = random.Random(2)
    damaged = [data[: choose.randrange(len(data))] for _ in range(30)]
    for position in [*range(0, 600, 30), *(choose.randrange(len(data)) for _ in range(60))]:
        damaged.append(data[:position] + bytes([data[position] ^ 0x41]) + data[position + 1 :])
    refused = 0
    for number, changed in enumerate(damaged):
        bad.write_bytes(changed)
        other = Stage(tmp_path / f"other{number}")
        try:
            install(other, bad, dry=False)
        except BenchError as error:
            assert str(bad) in str(error)
            refused += 1
            assert contents(other.folder) == {} and not other.manifest.exists()
        else:
            assert contents(other.folder) == contents(stage.folder)
    assert refused > 80


def rewrite(packed: Path, change: Callable[[dict[str, Any], Members], object]) -> None:
    """Change stage.json and the other members, as somebody with a purpose would."""
    with tarfile.open(packed) as tar:
        members = [(member, (tar.extractfile(member) or io.BytesIO()).read()) for member in tar]
    content = json.loads(members.pop(0)[1])
    change(content, members)
    text = json.dumps(content).encode()
    first = tarfile.TarInfo(NAME)
    first.size = len(text)
    with tarfile.open(packed, "w") as tar:
        for member, data in [(first, text), *members]:
            tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "stage.json", ".stage.lock", "", "."])
@pytest.mark.parametrize("kind", ["place", "file", "link", "unlisted", "version"])
def test_hostile_bundles(packed: Path, other: Stage, name: str, kind: str) -> None:
    def change(content: dict[str, Any], members: Members) -> None:
        entry = content["entries"]["nemo.sqsh"]
        if kind == "place":
            content["entries"][name] = {**entry, "files": {}}
        elif kind == "file":
            entry["files"][name] = {"size_bytes": 1, "sha256": "x"}
        elif kind == "link":
            members[0][0].type, members[0][0].linkname, members[0][0].size = tarfile.SYMTYPE, f"/etc/{name}", 0
        elif kind == "unlisted":
            members[0][0].name = name
        else:
            content["version"] = 1

    rewrite(packed, change)
    message = {"version": "version 1", "link": "lacks nemo.sqsh", "unlisted": "lacks nemo.sqsh"}
    with pytest.raises(BenchError, match=message.get(kind, "not a path of a stage folder")):
        install(other, packed, dry=False)
    assert contents(other.folder) == {} and not other.manifest.exists()
    assert sorted(path.name for path in packed.parent.iterdir() if path.name != "other") == [
        *(".stage.tar.lock", "stage", "stage.tar")
    ]


@pytest.mark.parametrize("name", ["nemo.sqsh", f"{DATASET}.bin", f"{DATASET}.idx", f"{DATASET}.json"])
def test_packing_verifies_what_it_packs(stage: Stage, tmp_path: Path, name: str) -> None:
    path = stage.folder / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(BenchError, match=re.escape(name)):
        pack(stage, PARTS, tmp_path / "b.tar")
    assert not list(tmp_path.glob("b.*"))


def test_what_is_not_a_bundle_or_cannot_be_one(stage: Stage, packed: Path, tmp_path: Path) -> None:
    for name in ("stage.tar", "b.zip"):  # exists; another format
        with pytest.raises(BenchError, match=r"must name a new file that ends in \.tar"):
            pack(stage, PARTS, tmp_path / name)
    for data in (b"", b"text\n" * 300, b"\x28\xb5\x2f\xfd" + b"no zstd", b"\0" * 20_000):
        packed.write_bytes(data)
        with pytest.raises(BenchError, match="not a bundle"):
            install(Stage(tmp_path / "other"), packed, dry=False)
