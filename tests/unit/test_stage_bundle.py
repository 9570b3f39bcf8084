"""Bundles: what goes in comes out, and what is damaged, foreign or hostile changes nothing."""

from __future__ import annotations

import io
import json
import os
import random
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_bench.data.indexed_dataset import IndexedDatasetWriter
from nemo_bench.errors import BenchError
from nemo_bench.stage.bundle import install, pack
from nemo_bench.stage.config import PartName
from nemo_bench.stage.datasets import find
from nemo_bench.stage.manifest import NAME, Entry, Stage, records_of
from tests.datasets import make_dataset

DATASET = "llama3.1-dataset/wiki.en_03_content_document"
PLACES = {PartName.image: "nemo.sqsh", PartName.tokenizer: "llama3.1-dataset/llama", PartName.code: "nemo_bench"}
DETAILS: dict[PartName, dict[str, Any]] = {
    PartName.image: {"container": "nvcr.io/nvidia/nemo:25.11"},
    PartName.tokenizer: dict.fromkeys(
        ("source", "repo", "asked_revision", "revision", "asked_vocab_size", "vocab_size"), "x"
    ),
    PartName.code: {"version": "1", "git": None, "project_sha256": "x"},
}
Entries = dict[PartName, dict[str, Entry]]


def contents(folder: Path) -> dict[str, bytes]:
    """All files, but for the manifest and the locks."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock" and path.name != NAME)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def stage(tmp_path: Path, small_tokenizer: Path) -> Stage:
    """A stage folder with an image, a tokenizer, code and two datasets, one of them made by hand."""
    stage = Stage(tmp_path / "stage")
    files = {
        "nemo.sqsh": b"hsqs" + random.Random(1).randbytes(30_000),
        "llama3.1-dataset/llama/tokenizer.json": b"{}",
        "llama3.1-dataset/llama/config.json": b'{"a": 1}',
        "nemo_bench/train.py": b"print()\n",
        "nemo_bench/vendor/hydra/grammar/.gitignore": b"",
        "nemo_bench/vendor/\N{LATIN SMALL LETTER E WITH ACUTE}.txt": b"not ASCII",
    }
    for name, data in files.items():
        (stage.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (stage.folder / name).write_bytes(data)
    for kind, place in PLACES.items():
        entry = Entry("2026-01-01T00:00:00Z", DETAILS[kind], records_of(stage.folder / place, place))
        stage.record(kind, place, entry)
    with IndexedDatasetWriter(stage.folder / "llama3.1-dataset/my-llama_00_text_document", vocab_size=300) as writer:
        writer.extend(np.arange(100, dtype=np.uint16), np.array([100]))
    make_dataset(stage.folder / DATASET, small_tokenizer)
    return stage


def entries(stage: Stage) -> Entries:
    found = {kind: {place: stage.entry(kind, place)} for kind, place in PLACES.items()}
    return found  # type: ignore[return-value]


@pytest.fixture
def packed(stage: Stage, tmp_path: Path) -> Path:
    pack(stage, entries(stage), tmp_path / "stage.tar")
    return tmp_path / "stage.tar"


@pytest.fixture
def other(tmp_path: Path) -> Stage:
    """Another stage folder, not there yet."""
    return Stage(tmp_path / "other")


@pytest.mark.parametrize("name", ["b.tar", "b.tar.zst"])
def test_round_trip(stage: Stage, other: Stage, tmp_path: Path, name: str) -> None:
    being_made = stage.folder / "llama3.1-dataset" / ".my-llama_01_text_document.building-1.bin"
    being_made.touch()
    pack(stage, entries(stage), tmp_path / name)
    being_made.unlink()
    install(other, tmp_path / name)
    assert contents(other.folder) == contents(stage.folder)
    assert [dataset.made_at is not None for dataset in find(other.folder, contents=True)] == [False, True]
    for kind, by_place in entries(other).items():
        for place, entry in by_place.items():
            assert (entry.details, entry.made_at) == (entries(stage)[kind][place].details, "2026-01-01T00:00:00Z")
            compared = other.compare(entry, contents=True)
            assert (compared.missing, compared.changed, compared.touched) == ([], [], None)
    before = {path: path.stat() for path in other.folder.rglob("*")}
    install(other, tmp_path / name)
    assert {path: path.stat() for path in other.folder.rglob("*")} == before


def test_only_what_is_lacking_is_installed(stage: Stage, packed: Path, other: Stage) -> None:
    for name in ("nemo.sqsh", "nemo_bench/train.py"):  # copied by hand: there, and not recorded
        (other.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (other.folder / name).write_bytes((stage.folder / name).read_bytes())
    (other.folder / "nemo_bench" / "mine.txt").write_text("the user's own")
    inode = (other.folder / "nemo.sqsh").stat().st_ino
    install(other, packed)
    assert contents(other.folder) == {**contents(stage.folder), "nemo_bench/mine.txt": b"the user's own"}
    assert (other.folder / "nemo.sqsh").stat().st_ino == inode
    assert other.entry(PartName.image, "nemo.sqsh") is not None


def test_other_files_are_named_and_nothing_is_changed(packed: Path, other: Stage) -> None:
    other.folder.mkdir()
    (other.folder / "nemo.sqsh").write_bytes(b"hsqs of another version")
    with pytest.raises(BenchError, match=r"nothing was changed[^\n]*\n  nemo\.sqsh$"):
        install(other, packed)
    assert contents(other.folder) == {"nemo.sqsh": b"hsqs of another version"}


@pytest.mark.parametrize("suffix", ["tar", "tar.zst"])
def test_damage_is_seen(stage: Stage, tmp_path: Path, suffix: str) -> None:
    """Cut off anywhere, or with any one byte changed: all is installed as it was packed, or nothing is."""
    good = tmp_path / f"good.{suffix}"
    pack(stage, entries(stage), good)
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
            install(other, bad)
        except BenchError as error:
            assert str(bad) in str(error)
            refused += 1
            assert contents(other.folder) == {} and not other.manifest.exists()
        else:
            assert contents(other.folder) == contents(stage.folder)
    assert refused > 80


def test_the_damaged_member_is_named(stage: Stage, packed: Path, other: Stage) -> None:
    data = packed.read_bytes()
    at = data.index((stage.folder / "nemo.sqsh").read_bytes())
    packed.write_bytes(data[: at + 100] + b"!" + data[at + 101 :])
    with pytest.raises(BenchError, match=r"cut off at nemo\.sqsh: its checksum is not .* nothing was installed"):
        install(other, packed)
    packed.write_bytes(data[: at + 100])
    with pytest.raises(BenchError, match=r"cut off at nemo\.sqsh: unexpected end of data"):
        install(other, packed)


def test_foreign_files_are_refused(tmp_path: Path, other: Stage) -> None:
    path = tmp_path / "b.tar"
    for data in (b"", b"text\n" * 300, b"\x28\xb5\x2f\xfd" + b"no zstd", b"\0" * 20_000):
        path.write_bytes(data)
        with pytest.raises(BenchError, match="is no bundle that"):
            install(other, path)
    with tarfile.open(path, "w") as tar:
        tar.add(__file__, "test.py")
    with pytest.raises(BenchError, match=r"first member is not bundle\.json"):
        install(other, path)
    path.unlink()
    with pytest.raises(BenchError, match=r"bundle=\S+b\.tar cannot be read: No such file"):
        install(other, path)
    assert not other.folder.exists()


def rewritten(packed: Path, change: Callable[[dict[str, Any], list[tuple[tarfile.TarInfo, bytes]]], None]) -> None:
    """Changes bundle.json and the other members, as somebody with a purpose would."""
    with tarfile.open(packed) as tar:
        members = [(member, (tar.extractfile(member) or io.BytesIO()).read()) for member in tar]
    content = json.loads(members.pop(0)[1])
    change(content, members)
    text = json.dumps(content).encode()
    first = tarfile.TarInfo("bundle.json")
    first.size = len(text)
    with tarfile.open(packed, "w") as tar:
        for member, data in [(first, text), *members]:
            tar.addfile(member, io.BytesIO(data))


FILE = {"size_bytes": 1, "sha256": "x", "mtime_ns": 0}


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "stage.json", ".stage.lock", "a//b", "", "."])
def test_paths_outside_are_refused(packed: Path, other: Stage, name: str) -> None:
    def as_image(content: dict[str, Any], _: object) -> None:
        (image,) = content["parts"]["image"].values()
        content["parts"]["image"] = {name: {**image, "files": {name: FILE}}}

    rewritten(packed, as_image)
    with pytest.raises(BenchError, match="no path of a stage folder"):
        install(other, packed)

    def in_code(content: dict[str, Any], _: object) -> None:
        content["parts"]["image"] = {}
        content["parts"]["code"]["nemo_bench"]["files"][name] = FILE

    rewritten(packed, in_code)
    with pytest.raises(BenchError, match="no path of a stage folder"):
        install(other, packed)
    assert sorted(path.name for path in packed.parent.iterdir()) == [".stage.tar.lock", "stage", "stage.tar"]


def test_members_that_bundle_json_does_not_promise(packed: Path, other: Stage) -> None:
    original = packed.read_bytes()

    def link(_: object, members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        members[0][0].type, members[0][0].linkname, members[0][0].size = tarfile.SYMTYPE, "/etc/passwd", 0

    def unlisted(_: object, members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        members.append((tarfile.TarInfo("../evil"), b""))

    def swapped(_: object, members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        members.reverse()

    def elsewhere(content: dict[str, Any], _: object) -> None:
        content["parts"]["code"]["nemo_bench"]["files"]["results/x"] = FILE

    def not_a_dataset(content: dict[str, Any], _: object) -> None:
        content["datasets"]["results/x"] = FILE

    def hidden_dataset(content: dict[str, Any], _: object) -> None:
        content["datasets"]["llama3.1-dataset/.x.idx"] = FILE

    def newer(content: dict[str, Any], _: object) -> None:
        content["version"] = 2

    def huge(content: dict[str, Any], _: object) -> None:
        content["parts"]["image"]["nemo.sqsh"]["files"]["nemo.sqsh"]["size_bytes"] = 9 * 10**18

    for change, message in [
        (link, "is no file"),
        (unlisted, "'../evil' follows"),
        (swapped, "damaged or cut off at"),
        (elsewhere, "holds files of other places"),
        (not_a_dataset, "lists other files as datasets"),
        (hidden_dataset, "lists other files as datasets"),
        (newer, "version 2"),
        (huge, "not enough disk space"),
    ]:
        packed.write_bytes(original)
        rewritten(packed, change)
        with pytest.raises(BenchError, match=message):
            install(other, packed)
        assert contents(other.folder) == {} and not other.manifest.exists()


def test_packing_verifies_what_it_packs(stage: Stage, tmp_path: Path) -> None:
    image = stage.folder / "nemo.sqsh"
    date = image.stat().st_mtime_ns
    image.write_bytes(image.read_bytes()[:-1] + b"!")
    os.utime(image, ns=(date, date))
    with pytest.raises(BenchError, match=r"nemo\.sqsh is not what was recorded of it; nothing was packed"):
        pack(stage, entries(stage), tmp_path / "b.tar")
    image.write_bytes(b"hsqs")
    with pytest.raises(BenchError, match=r"nemo\.sqsh is not what was recorded of it; nothing was packed"):
        pack(stage, entries(stage), tmp_path / "b.tar.zst")
    assert not list(tmp_path.glob("b.*"))


def test_what_cannot_be_packed(stage: Stage, packed: Path, tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="exists, and is left alone"):
        pack(stage, entries(stage), packed)
    with pytest.raises(BenchError, match=r"must be named \.tar or \.tar\.zst"):
        pack(stage, entries(stage), tmp_path / "b.zip")
    (stage.folder / "llama3.1-dataset" / "my-llama_00_text_document.bin").unlink()
    with pytest.raises(BenchError, match=r"a dataset cannot be packed[^\0]*00_text_document\.bin does not exist"):
        pack(stage, entries(stage), tmp_path / "b.tar")


def changed_in_place(path: Path) -> None:
    """Another last byte, with the same size and date."""
    status, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".json"])
def test_datasets_are_held_against_their_descriptions(stage: Stage, tmp_path: Path, suffix: str) -> None:
    changed_in_place(stage.folder / f"{DATASET}{suffix}")
    by_hand, described = find(stage.folder, contents=True)
    assert by_hand.problem is None and by_hand.tokens == 100
    assert described.problem is not None and f"{DATASET}{suffix}" in described.problem
    with pytest.raises(BenchError, match=rf"{re.escape(DATASET)}\{suffix}"):
        pack(stage, entries(stage), tmp_path / "b.tar")
    assert not list(tmp_path.glob("b.*"))


def test_halves_of_a_dataset_are_named(stage: Stage) -> None:
    (stage.folder / f"{DATASET}.idx").unlink()
    assert [dataset.prefix.name for dataset in find(stage.folder, contents=False) if dataset.problem] == [
        "wiki.en_03_content_document"
    ]
