"""A stage folder and its manifest, stage.json: the settings each part was made with, and its files' sizes and SHA-256.

A part is made in a hidden folder next to its place, recorded, and renamed into its place, in this order: a kill at any
moment leaves the old part, none or the new one, and never a part that its record does not describe.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nemo_bench.errors import BenchError
from nemo_bench.files import (
    explained_disk_errors,
    fsync,
    fsync_tree,
    hidden_folder,
    hidden_path,
    locked,
    sha256_of,
    size_text,
    write_json,
)
from nemo_bench.record.folder import timestamp
from nemo_bench.stage.config import PartName

NAME = "stage.json"
FORMAT, VERSION = "nemo-bench stage", 2
REMEDY = "free some space, or choose another stage folder (STAGE_PATH, or stage_path=...), and run this again"
DATASET = "dataset"  # in bundles: prepare_data.py describes a dataset in a file next to it
print_line = partial(print, flush=True)  # at once, also into a file


@dataclass(frozen=True)
class FileRecord:
    """The size and the hexadecimal SHA-256 of a file."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Entry:
    """One recorded file or folder."""

    part: str  # the name of the part, or DATASET
    made_at: str
    settings: dict[str, Any]  # those that decide its contents, by key of the configuration
    version: str  # what it is, for people
    files: dict[str, FileRecord]  # by path relative to the stage folder

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files.values())


@dataclass(frozen=True)
class Part:
    """A part as the configuration asks for it.

    `make` makes and verifies it at a path that does not exist yet, and returns its version, for people. It also gets
    the lock's descriptor: a child process that inherits it keeps the lock if this process dies.
    """

    name: PartName
    place: str  # relative to the stage folder
    settings: dict[str, Any]  # those that decide its contents, by key of the configuration
    plan: str  # what `make` does, for launch=dry
    make: Callable[[Path, int], str]


@dataclass(frozen=True)
class State:
    """What is wrong with a part ("": nothing), and whether it is not all ours, so that it is not replaced."""

    problem: str = ""
    blocked: bool = False


class Stage:
    """A stage folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = folder / NAME

    def entries(self) -> dict[str, Entry]:
        """Return what is recorded, by place; raise BenchError if stage.json is damaged."""
        if not self.manifest.exists():
            return {}
        try:
            return read_manifest(self.manifest.read_bytes())
        except ValueError as error:
            raise BenchError(
                f"{self.manifest} is damaged, or of another version: {error}\n"
                f"`mv {self.manifest} {self.manifest}.old`, and run this again"
            ) from None

    def record(self, place: str, entry: Entry) -> None:
        """Add an entry to stage.json; entries that other processes write at the same time are kept."""
        with locked(self.folder / ".stage.lock", "writes stage.json", print_line):
            for leftover in self.folder.glob(f".{NAME}.*.tmp"):  # of a process that was killed
                leftover.unlink()
            write_json(self.manifest, manifest_json({**self.entries(), place: entry}))

    def lock(self, name: PartName) -> AbstractContextManager[int]:
        """Hold the lock of whoever makes this part."""
        return locked(self.folder / f".stage-{name.value}.lock", f"fills the part {name.value}", print_line)

    def state(self, place: str, settings: dict[str, Any] | None = None, *, contents: bool) -> State:
        """Compare what lies at `place` with its record (by size, or all `contents`), and the record with `settings`."""
        path, entry = self.folder / place, self.entries().get(place)
        if not os.path.lexists(path):
            return State("does not exist")
        if entry is None:
            return State("was not made by setup_stage.py", blocked=True)
        changed, absent = differences(self.folder, entry.files, contents=contents)
        if changed:
            return State(f"has changed since it was recorded: {changed[0]}", blocked=True)
        unknown = not files_of(path, place).keys() <= entry.files.keys()
        for key, value in (settings or {}).items():
            if entry.settings.get(key) != value:
                replaced = entry.part == PartName.code.value and not unknown
                return State(f"was made with {key}={entry.settings.get(key)}, not {value}", blocked=not replaced)
        return State(f"lacks {absent[0]}", blocked=unknown) if absent else State()

    def put(self, new: Path, place: str, entry: Entry) -> None:
        """Record the file or folder `new`, which lies in a hidden folder, and move it to `place`."""
        destination = self.folder / place
        fsync_tree(new)
        if destination.exists():
            os.replace(destination, new.with_name(f"{new.name}.old"))
        if entry.part != DATASET:
            self.record(place, entry)
        destination.parent.mkdir(parents=True, exist_ok=True)
        os.replace(new, destination)
        fsync(destination.parent)


def fill(stage: Stage, part: Part) -> None:
    """Make the part unless it is complete; raise BenchError if that fails, or something else is in its place."""
    destination = stage.folder / part.place
    if _complete(stage, part) and not hidden_path(destination).exists():
        return
    with explained_disk_errors(stage.folder, REMEDY):
        destination.parent.mkdir(parents=True, exist_ok=True)
        with stage.lock(part.name) as lock, hidden_folder(destination) as folder:
            if _complete(stage, part):  # another process made it
                return
            new = folder / destination.name
            version = part.make(new, lock)
            entry = Entry(part.name.value, timestamp(), part.settings, version, describe(new, part.place))
            stage.put(new, part.place, entry)
    print_line(f"{part.name.value}: made ({destination}, {size_text(entry.size_bytes)})")


def _complete(stage: Stage, part: Part) -> bool:
    state, destination = stage.state(part.place, part.settings, contents=False), stage.folder / part.place
    if state.blocked:
        raise BenchError(
            f"{destination} {state.problem}\nIt is left alone: move it away, or choose another stage folder "
            "(stage_path=...), and run this again"
        )
    if not state.problem:
        print_line(f"{part.name.value}: complete ({destination})")
    return not state.problem


# --- stage.json ---------------------------------------------------------------------------------------------


def manifest_json(entries: dict[str, Entry]) -> dict[str, Any]:
    """Return the content of stage.json."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "updated_at": timestamp(),
        "entries": {place: asdict(entry) for place, entry in entries.items()},
    }


def read_manifest(text: bytes) -> dict[str, Entry]:
    """Parse stage.json; raise ValueError if it is damaged, or of another version."""
    try:
        content = json.loads(text)
        if (content["format"], content["version"]) != (FORMAT, VERSION):
            raise ValueError(f"format {content['format']!r}, version {content['version']}")
        entries = {}
        for place, entry in content["entries"].items():
            files = {name: FileRecord(**file) for name, file in entry["files"].items()}
            entries[place] = Entry(**{**entry, "files": files})
        return entries
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


def files_of(path: Path, place: str) -> dict[str, Path]:
    """Return the file `path`, or all files below the folder `path`, by their names as parts of `place`."""
    if not path.is_dir():
        return {place: path}
    files = sorted(file for file in path.rglob("*") if not file.is_dir() and "__pycache__" not in file.parts)
    return {f"{place}/{file.relative_to(path).as_posix()}": file for file in files}


def describe(path: Path, place: str) -> dict[str, FileRecord]:
    """Return size and SHA-256 of the files of `path` by their names as parts of `place`."""
    return {name: FileRecord(file.stat().st_size, sha256_of(file)) for name, file in files_of(path, place).items()}


def differences(folder: Path, files: dict[str, FileRecord], *, contents: bool) -> tuple[list[str], list[str]]:
    """Return which of these files in `folder` are not as recorded, and which do not exist."""
    changed, absent = [], []
    for name, recorded in files.items():
        path = folder / name
        if not path.exists():
            absent.append(name)
        elif path.stat().st_size != recorded.size_bytes or (contents and sha256_of(path) != recorded.sha256):
            changed.append(name)
    return changed, absent


def require_space(folder: Path, size_bytes: int, what: str) -> None:
    """Raise BenchError if the file system of `folder` has less free space than that."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < size_bytes:
        raise BenchError(
            f"not enough disk space in {folder}: {size_text(free_bytes)} free, {size_text(size_bytes)} needed "
            f"for {what}"
        )


def place_inside(stage_folder: Path, value: str, key: str) -> str:
    """Return the path `value` relative to the stage folder; raise BenchError if it lies elsewhere."""
    relative = os.path.relpath(stage_folder / value, stage_folder)
    if relative.startswith("."):
        raise BenchError(f"{key}={value} must lie inside the stage folder, {stage_folder}")
    return relative
