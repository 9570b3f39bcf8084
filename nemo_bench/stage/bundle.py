"""A stage folder as one file, for a cluster without internet: a tar archive, plain or compressed by Zstandard.

Its first member is a stage.json that lists all others with sizes and SHA-256. They are named by their paths in the
stage folder, so that `tar xf stage.tar nemo_bench` extracts the program that installs the rest.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import Literal

from backports.zstd import tarfile

from nemo_bench.data.manifest import datasets_in, verify
from nemo_bench.errors import BenchError
from nemo_bench.files import explained_disk_errors, fsync, hidden_folder, locked, size_text
from nemo_bench.record.folder import timestamp
from nemo_bench.stage.config import PartName
from nemo_bench.stage.stage import (
    DATASET,
    NAME,
    REMEDY,
    Entry,
    Part,
    Stage,
    describe,
    differences,
    manifest_json,
    print_line,
    read_manifest,
    require_space,
)

_DATASETS = "llama3.1-dataset"
# In the order in which they are installed: an index means a complete dataset.
_SUFFIXES = (".json", ".bin", ".idx")


def pack(stage: Stage, parts: list[Part], bundle: Path) -> None:
    """Pack the parts, and all datasets of the stage folder, into the new file `bundle`.

    Raises BenchError if a part or dataset is not complete, or `bundle` exists or cannot be written.
    """
    if not bundle.name.endswith((".tar", ".tar.zst")):
        raise BenchError(f"bundle={bundle} must end in .tar, or .tar.zst (compressed)")
    if bundle.exists():
        raise BenchError(f"{bundle} exists: remove it, or give the bundle another name")
    for part in parts:
        if problem := stage.state(part.place, part.settings, contents=True).problem:
            raise BenchError(
                f"{part.name.value}: {stage.folder / part.place} {problem}; nothing was packed. "
                "`python setup_stage.py check` names the command that repairs it"
            )
    recorded = stage.entries()
    entries = {part.place: recorded[part.place] for part in parts} | _datasets(stage)
    size_bytes = sum(entry.size_bytes for entry in entries.values())
    print_line(f"packing {size_text(size_bytes)} into {bundle}")
    with explained_disk_errors(bundle.parent, "free some space, or choose another folder (bundle=FILE)"):
        bundle.parent.mkdir(parents=True, exist_ok=True)
        require_space(bundle.parent, size_bytes, "the bundle")
        with locked(bundle.with_name(f".{bundle.name}.lock"), f"packs {bundle}", print_line):
            packing = bundle.with_name(f".{bundle.name}.packing")
            try:
                _write(stage, entries, packing, "w:zst" if bundle.suffix == ".zst" else "w")
                fsync(packing)
                os.replace(packing, bundle)
            finally:
                packing.unlink(missing_ok=True)
    print_line(f"packed {', '.join(entries)}")


def _datasets(stage: Stage) -> dict[str, Entry]:
    """Verify the datasets of the stage folder and return an entry for each of their files."""
    entries = {}
    for prefix in datasets_in(stage.folder / _DATASETS):
        verify(prefix)
        for suffix in _SUFFIXES:
            if (path := Path(f"{prefix}{suffix}")).exists():
                place = path.relative_to(stage.folder).as_posix()
                entries[place] = Entry(DATASET, timestamp(), {}, "", describe(path, place))
    return entries


def _write(stage: Stage, entries: dict[str, Entry], path: Path, mode: Literal["w", "w:zst"]) -> None:
    with tarfile.open(path, mode, format=tarfile.PAX_FORMAT) as tar:
        text = json.dumps(manifest_json(entries), indent=1).encode()
        member = tarfile.TarInfo(NAME)
        member.size = len(text)
        tar.addfile(member, io.BytesIO(text))
        for name in (name for entry in entries.values() for name in entry.files):
            with open(stage.folder / name, "rb") as file:
                member = tarfile.TarInfo(name)
                member.size = os.fstat(file.fileno()).st_size
                member.mtime = int(os.fstat(file.fileno()).st_mtime)
                tar.addfile(member, file)


def install(stage: Stage, bundle: Path, *, dry: bool) -> None:
    """Install what the stage folder lacks of the bundle: all of it, or nothing.

    Raises BenchError if the bundle is damaged, or the folder holds something else in a place of the bundle.
    """
    with explained_disk_errors(stage.folder, REMEDY), ExitStack() as stack:
        tar = stack.enter_context(_open(bundle))
        entries = _read_entries(bundle, tar)
        if not dry:
            stage.folder.mkdir(parents=True, exist_ok=True)
            for name in PartName:
                stack.enter_context(stage.lock(name))
            folder = stack.enter_context(hidden_folder(stage.folder / "bundle"))
        lacking = {place: entry for place, entry in entries.items() if _is_lacking(stage, place, entry)}
        if dry:
            print_line(f"install from {bundle} in {stage.folder}:")
            for place in entries:
                print_line(f"  {place}{'' if place in lacking else ' (already there)'}")
        elif not lacking:
            print_line(f"everything in {bundle} is already in {stage.folder}")
        else:
            size_bytes = sum(entry.size_bytes for entry in lacking.values())
            require_space(stage.folder, size_bytes, "the bundle's files")
            print_line(f"installing {size_text(size_bytes)} from {bundle}")
            _extract(bundle, tar, lacking, folder)
            for place, entry in lacking.items():
                stage.put(folder / place, place, entry)
            print_line(f"installed {', '.join(lacking)}")


def _is_lacking(stage: Stage, place: str, entry: Entry) -> bool:
    """Return whether `place` has to be installed; raise BenchError if something else lies there."""
    if entry.part == DATASET:  # not recorded: prepare_data.py may make it anew
        changed, absent = differences(stage.folder, entry.files, contents=True)
        lacking, in_the_way = bool(absent), "differs from the bundle's" if changed else ""
    else:
        state = stage.state(place, contents=False)
        differs = not state.problem and stage.entries()[place].files != entry.files
        lacking = bool(state.problem) or (differs and entry.part == PartName.code.value)
        in_the_way = state.problem if state.blocked else "differs from the bundle's" if differs and not lacking else ""
    if in_the_way:
        raise BenchError(
            f"{stage.folder / place} {in_the_way}; nothing was installed. Move it away, or install into another stage "
            "folder (stage_path=...)"
        )
    return lacking


@contextmanager
def _open(bundle: Path) -> Iterator[tarfile.TarFile]:
    """Open a bundle, to be read from its beginning to its end."""
    if not bundle.is_file():
        raise BenchError(f"bundle={bundle} does not exist")
    try:
        with tarfile.open(bundle, "r|*") as tar:
            yield tar
    except tarfile.TarError as error:
        raise BenchError(
            f"{bundle} is damaged, cut off, or not a bundle ({error}): copy it again. Nothing was installed"
        ) from None


def _read_entries(bundle: Path, tar: tarfile.TarFile) -> dict[str, Entry]:
    """Read the bundle's stage.json."""
    first = tar.next()
    try:
        if first is None or first.name != NAME or (file := tar.extractfile(first)) is None:
            raise ValueError(f"its first member is not {NAME}")
        entries = read_manifest(file.read())
        for place, entry in entries.items():
            for name in (place, *entry.files):
                path = PurePosixPath(name)
                outside = not place or place.startswith((".", "/", NAME)) or ".." in path.parts
                if outside or not path.is_relative_to(place):
                    raise ValueError(f"{name!r} is not a path of a stage folder")
        return entries
    except ValueError as error:
        raise BenchError(f"{bundle} is not a bundle made by `setup_stage.py pack`, or is damaged: {error}") from None


def _extract(bundle: Path, tar: tarfile.TarFile, entries: dict[str, Entry], folder: Path) -> None:
    """Extract the files of these entries into `folder`, and compare them with the entries."""
    files = {name: file for entry in entries.values() for name, file in entry.files.items()}
    while member := tar.next():
        if member.name in files and member.isreg():
            tar.extract(member, folder, filter="data")
    changed, absent = differences(folder, files, contents=True)
    if changed or absent:
        raise BenchError(
            f"{bundle} is damaged or cut off: {(changed + absent)[0]} is not as its {NAME} says. Copy it again; "
            "nothing was installed"
        )
