"""A stage folder as one file, for a cluster without internet: a tar archive, plain or compressed by Zstandard.

Its first member, bundle.json, lists all others with sizes and SHA-256; they have their paths in the stage folder as
names, so that `tar xf stage.tar nemo_bench` brings the program that installs the rest.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from nemo_bench.errors import BenchError
from nemo_bench.files import locked, size_text
from nemo_bench.record.folder import timestamp
from nemo_bench.stage import datasets
from nemo_bench.stage.config import PartName
from nemo_bench.stage.files import (
    CHUNK_BYTES,
    Advance,
    FileRecord,
    Room,
    aside,
    byte_progress,
    leftovers,
    make_durable,
    measure,
    publish,
    remove,
    require_room,
    say,
    writing_error,
)
from nemo_bench.stage.manifest import NAME as MANIFEST_NAME
from nemo_bench.stage.manifest import Entry, Stage, entries_from_json, project_version

CONTENTS = "bundle.json"
FORMAT = "nemo-bench bundle"
VERSION = 1
_CONTENTS_LIMIT_BYTES = 64 << 20
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_ZSTD_LEVEL = 3  # images are compressed already
_DATASET_NAME = re.compile(rf"{re.escape(datasets.FOLDER)}/[^/.][^/]*({'|'.join(map(re.escape, datasets.SUFFIXES))})")


@dataclass(frozen=True)
class Contents:
    """What bundle.json says."""

    made_at: str
    parts: dict[PartName, dict[str, Entry]]
    datasets: dict[str, FileRecord]

    @property
    def files(self) -> dict[str, FileRecord]:
        """All members by name, small ones first: the program that installs the rest is found at once."""
        every = dict(self.datasets)
        for by_place in self.parts.values():
            for entry in by_place.values():
                every |= entry.files
        return dict(sorted(every.items(), key=lambda item: (item[1].size_bytes > 10**9, item[0])))

    @property
    def places(self) -> list[str]:
        """What is put into the stage folder as a whole, in this order: files, and the folders of parts."""
        last = sorted(self.datasets, key=lambda name: datasets.SUFFIXES.index(os.path.splitext(name)[1]))
        return [place for by_place in self.parts.values() for place in by_place] + last

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files.values())

    def to_json(self) -> str:
        parts = {
            kind.value: {place: entry.to_json() for place, entry in by_place.items()}
            for kind, by_place in self.parts.items()
        }
        content = {
            "format": FORMAT,
            "version": VERSION,
            "made_at": self.made_at,
            "project_version": project_version(),
            "parts": parts,
            "datasets": {name: asdict(file) for name, file in self.datasets.items()},
        }
        return json.dumps(content, indent=1) + "\n"

    @staticmethod
    def from_json(text: bytes) -> Contents:
        """The contents that `to_json` wrote.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: it is no bundle.json, or names a path outside.
        """
        content = json.loads(text)
        if content["format"] != FORMAT or content["version"] != VERSION:
            raise ValueError(f"format {content['format']!r}, version {content['version']}")
        found = {name: FileRecord(**file) for name, file in content["datasets"].items()}
        if not all(_DATASET_NAME.fullmatch(name) for name in found):
            raise ValueError("it lists other files as datasets")
        contents = Contents(content["made_at"], entries_from_json(content["parts"]), found)
        for name in [*contents.places, *contents.files]:
            components = name.split("/")
            # The folder's own files begin with a dot, but for the manifest.
            own = components[0].startswith(".") or components[0] == MANIFEST_NAME
            if own or any(component in ("", ".", "..") for component in components):
                raise ValueError(f"{name!r} is no path of a stage folder")
        for by_place in contents.parts.values():
            for place, entry in by_place.items():
                if any(name != place and not name.startswith(f"{place}/") for name in entry.files):
                    raise ValueError(f"{place!r} holds files of other places")
        return contents


# --- packing ------------------------------------------------------------------------------------------------


def pack(stage: Stage, entries: dict[PartName, dict[str, Entry]], bundle: Path) -> None:
    """Packs these parts, which are recorded, and the datasets of the stage folder into the new file `bundle`.

    Raises:
        BenchError: a file is not what is recorded of it, `bundle` exists or cannot be written.
    """
    compress = _is_compressed(bundle)
    if os.path.lexists(bundle):
        raise BenchError(f"{bundle} exists, and is left alone: remove it, or give the bundle another name")
    found = datasets.find(stage.folder, contents=False)
    if broken := [dataset.problem for dataset in found if dataset.problem]:
        raise BenchError("a dataset cannot be packed:\n" + "\n".join(f"  {problem}" for problem in broken))
    needed = sum(e.size_bytes for by in entries.values() for e in by.values()) + sum(d.size_bytes for d in found)
    require_room([Room(bundle.parent, needed + 64 * CHUNK_BYTES, "the bundle")])
    packing = aside(bundle)
    try:
        bundle.parent.mkdir(parents=True, exist_ok=True)
        with locked(bundle.with_name(f".{bundle.name}.lock"), f"packs {bundle}", say):
            for path in leftovers(bundle):
                remove(path)
            contents = Contents(timestamp(), entries, _measured(stage, found))
            try:
                _write(stage, contents, packing, compress)
                publish(packing, bundle)
            finally:
                remove(packing)
    except OSError as error:
        raise writing_error(bundle.parent, error, "bundle=FILE") from error
    say(f"packed {len(contents.files):,} files, {size_text(contents.size_bytes)}, into {bundle}")


def _is_compressed(bundle: Path) -> bool:
    if bundle.name.endswith(".tar"):
        return False
    if not bundle.name.endswith(".tar.zst"):
        raise BenchError(f"bundle={bundle} must be named .tar or .tar.zst (compressed)")
    _zstandard()
    return True


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError:
        raise BenchError(
            "a .tar.zst bundle needs the package zstandard: `pip install zstandard`, or use a plain .tar (`zstd -d` "
            "makes one of it)"
        ) from None
    return zstandard


def _measured(stage: Stage, found: list[datasets.StageDataset]) -> dict[str, FileRecord]:
    from nemo_bench.data.shard import read_manifest

    measured = {}
    with byte_progress("checksums of the datasets", sum(dataset.size_bytes for dataset in found)) as advance:
        for dataset in found:
            description = read_manifest(dataset.prefix)
            for path in dataset.files:
                file = measured[path.relative_to(stage.folder).as_posix()] = measure(path, advance)
                recorded = description["products"].get(path.suffix) if description else None
                if recorded is not None and recorded["sha256"] != file.sha256:
                    raise BenchError(f"{path} has changed since it was made; nothing was packed")
    return measured


def _write(stage: Stage, contents: Contents, packing: Path, compress: bool) -> None:
    with contextlib.ExitStack() as stack:
        raw = stack.enter_context(open(packing, "xb"))
        stream: Any = raw
        if compress:
            compressor = _zstandard().ZstdCompressor(level=_ZSTD_LEVEL, threads=-1)
            stream = stack.enter_context(compressor.stream_writer(raw, closefd=False))
        advance = stack.enter_context(byte_progress(f"packing {len(contents.files)} files", contents.size_bytes))
        with tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as tar:
            text = contents.to_json().encode()
            tar.addfile(_member(CONTENTS, len(text), 0), io.BytesIO(text))
            for name, recorded in contents.files.items():
                with open(stage.folder / name, "rb") as file:
                    hashing = _Hashing(file, advance)
                    member = _member(name, recorded.size_bytes, recorded.mtime_ns // 10**9)
                    if os.fstat(file.fileno()).st_size == recorded.size_bytes:
                        tar.addfile(member, hashing)  # type: ignore[arg-type]
                if hashing.sha256() != recorded.sha256:
                    raise BenchError(
                        f"{stage.folder / name} is not what was recorded of it; nothing was packed. "
                        "`python setup_stage.py check` names all such files"
                    )
        if compress:
            stream.close()
        raw.flush()
        os.fsync(raw.fileno())


def _member(name: str, size_bytes: int, mtime_s: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mtime, member.mode = size_bytes, mtime_s, 0o644
    return member


class _Hashing:
    """A file that is hashed as it is read."""

    def __init__(self, file: IO[bytes], advance: Advance) -> None:
        self._file, self._advance, self._digest = file, advance, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        block = self._file.read(size)
        self._digest.update(block)
        self._advance(len(block))
        return block

    def sha256(self) -> str:
        return self._digest.hexdigest()


# --- installing ---------------------------------------------------------------------------------------------


def install(stage: Stage, bundle: Path, *, dry: bool = False) -> None:
    """Puts into the stage folder what it lacks of the bundle: all of it, or nothing.

    Raises:
        BenchError: the bundle is damaged, cut off or none; a file of the folder is another one; no room.
    """
    with _members(bundle) as members:
        contents = _read_contents(bundle, members)
        try:
            lacking = _lacking(stage, contents)
            if dry:
                say(f"install {len(lacking):,} of {len(contents.files):,} files from {bundle} in {stage.folder}:")
                for place in contents.places:
                    say(f"  {place}")
            elif not lacking and _all_recorded(stage, contents):
                say(f"all that is in {bundle} is there already ({stage.folder})")
                _remove_leftovers(stage, contents)
            else:
                needed = sum(contents.files[name].size_bytes for name in lacking)
                require_room([Room(stage.folder, needed, "the bundle")])
                stage.folder.mkdir(parents=True, exist_ok=True)
                with contextlib.ExitStack() as locks:
                    for kind in PartName:
                        locks.enter_context(locked(stage.lock_path(kind), f"fills the part {kind.value}", say))
                    _install_locked(stage, bundle, contents, members)
        except OSError as error:
            raise writing_error(stage.folder, error) from error


def _install_locked(stage: Stage, bundle: Path, contents: Contents, members: Iterator[Member]) -> None:
    lacking = _lacking(stage, contents)  # again: another process may have been at work
    made = {}
    for place in contents.places:
        destination = stage.folder / place
        for path in leftovers(destination):
            remove(path)
        made[place] = aside(destination)
    try:
        _extract(bundle, contents, members, lacking, made)
        for path in made.values():
            if path.exists():
                make_durable(path)
        for kind, by_place in contents.parts.items():
            for place, entry in by_place.items():
                stage.record(kind, place, _dated(stage, entry, place, made[place]))
        for place, path in made.items():
            if path.exists():
                publish(path, stage.folder / place)
    finally:
        for path in made.values():
            remove(path)
    say(f"installed {len(lacking):,} of {len(contents.files):,} files from {bundle} in {stage.folder}")


def _lacking(stage: Stage, contents: Contents) -> list[str]:
    """The files that the stage folder has to get.

    Raises:
        BenchError: some are there, and are others.
    """
    lacking, others = [], []
    recorded = {
        name: file
        for kind, by_place in contents.parts.items()
        for place in by_place
        if (entry := stage.entry(kind, place))
        for name, file in entry.files.items()
    }
    for name, wanted in contents.files.items():
        path = stage.folder / name
        if not os.path.lexists(path):
            lacking.append(name)
            continue
        known = recorded.get(name)
        status = path.stat()
        if known is None or (known.size_bytes, known.mtime_ns) != (status.st_size, status.st_mtime_ns):
            known = measure(path) if path.is_file() and status.st_size == wanted.size_bytes else None
        if known is None or known.sha256 != wanted.sha256:
            others.append(name)
    if others:
        more = f"\n  and {len(others) - 10} more" if len(others) > 10 else ""
        raise BenchError(
            f"{stage.folder} holds other files than the bundle; nothing was changed. Move them away, or install into "
            "another stage folder (stage_path=...):\n" + "\n".join(f"  {name}" for name in others[:10]) + more
        )
    return lacking


def _all_recorded(stage: Stage, contents: Contents) -> bool:
    return all(
        (entry := stage.entry(kind, place)) is not None and entry.files.keys() >= wanted.files.keys()
        for kind, by_place in contents.parts.items()
        for place, wanted in by_place.items()
    )


def _remove_leftovers(stage: Stage, contents: Contents) -> None:
    for place in contents.places:
        stage.remove_leftovers(PartName.image, stage.folder / place)


def _dated(stage: Stage, entry: Entry, place: str, made: Path) -> Entry:
    """`entry` with the dates that its files have here."""
    files = {}
    for name, file in entry.files.items():
        extracted = made / name[len(place) + 1 :] if name != place else made
        here = extracted if extracted.is_file() else stage.folder / name
        files[name] = FileRecord(file.size_bytes, file.sha256, here.stat().st_mtime_ns)
    return Entry(entry.made_at, entry.details, files)


@dataclass(frozen=True)
class Member:
    """One file of a bundle; its data can be read until the next one is asked for."""

    name: str
    size_bytes: int
    file: IO[bytes]


class _Damaged(Exception):
    """The archive itself cannot be read on."""


@contextlib.contextmanager
def _members(bundle: Path) -> Iterator[Iterator[Member]]:
    with contextlib.ExitStack() as stack:
        try:
            raw = stack.enter_context(open(bundle, "rb"))
        except OSError as error:
            raise BenchError(f"bundle={bundle} cannot be read: {error.strerror}") from error
        stream: Any = raw
        if raw.read(4) == _ZSTD_MAGIC:
            raw.seek(0)
            stream = stack.enter_context(_zstandard().ZstdDecompressor().stream_reader(raw, read_across_frames=True))
        raw.seek(0)
        yield _iterate(stream)


def _iterate(stream: IO[bytes]) -> Iterator[Member]:
    with _reading(), tarfile.open(fileobj=stream, mode="r|") as tar:
        for member in tar:
            file = tar.extractfile(member) if member.isreg() else None
            if file is None:
                raise BenchError(f"the bundle's member {member.name!r} is no file: it is not one of setup_stage.py's")
            yield Member(member.name, member.size, file)


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """What tarfile and zstandard raise on damage, as one kind."""
    try:
        yield
    except (tarfile.TarError, EOFError, UnicodeDecodeError) as error:
        raise _Damaged(str(error)) from error
    except Exception as error:
        if type(error).__name__ == "ZstdError":
            raise _Damaged(str(error)) from error
        raise


def _read_contents(bundle: Path, members: Iterator[Member]) -> Contents:
    try:
        first = next(members, None)
        if first is None or first.name != CONTENTS or first.size_bytes > _CONTENTS_LIMIT_BYTES:
            raise ValueError(f"its first member is not {CONTENTS}")
        with _reading():
            text = first.file.read()
        return Contents.from_json(text)
    except (_Damaged, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BenchError(
            f"{bundle} is no bundle that `setup_stage.py pack` made, or is damaged at its beginning ({error}): copy it "
            "again. Nothing was installed"
        ) from error


def _extract(
    bundle: Path, contents: Contents, members: Iterator[Member], lacking: list[str], made: dict[str, Path]
) -> None:
    """Writes the files that are lacking to their places' paths in `made`; reads the bundle to its end."""
    expected = iter(contents.files.items())
    wanted = set(lacking)
    place_of = {name: place for place in made for name in contents.files if _belongs(name, place)}
    name = CONTENTS
    with byte_progress(f"installing {len(lacking)} files", contents.size_bytes) as advance:
        try:
            for name, recorded in expected:
                member = next(members, None)
                if member is None:
                    raise _Damaged("it ends before that")
                if (member.name, member.size_bytes) != (name, recorded.size_bytes):
                    raise _Damaged(f"it has {member.name!r} of {member.size_bytes:,} bytes there")
                path = None
                if name in wanted:
                    place = place_of[name]
                    path = made[place] / name[len(place) + 1 :] if name != place else made[place]
                    path.parent.mkdir(parents=True, exist_ok=True)
                if _copy(member, path, advance) != recorded.sha256:
                    raise _Damaged("its checksum is not the one in bundle.json")
            name = "the end"
            if (extra := next(members, None)) is not None:
                raise _Damaged(f"{extra.name!r} follows, which bundle.json does not list")
        except _Damaged as error:
            raise BenchError(
                f"{bundle} is damaged or cut off at {name}: {error}. Copy it again; nothing was installed"
            ) from error


def _belongs(name: str, place: str) -> bool:
    return name == place or name.startswith(f"{place}/")


def _copy(member: Member, path: Path | None, advance: Advance) -> str:
    """Reads a member, into the new file `path` where one is given; returns its SHA-256."""
    hashing = _Hashing(member.file, advance)
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(open(path, "xb")) if path else None
        while True:
            with _reading():
                block = hashing.read(CHUNK_BYTES)
            if not block:
                return hashing.sha256()
            if output is not None:
                output.write(block)
