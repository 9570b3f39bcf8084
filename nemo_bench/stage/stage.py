"""A stage folder and its manifest, stage.json: the settings each part was made with, and its files' sizes and SHA-256.

A part is made in a hidden folder, recorded, and renamed into its place, in this order: a kill leaves no part or a whole
one, which its record describes. What exists is never replaced.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich import filesize

from nemo_bench import files as disk
from nemo_bench.errors import BenchError
from nemo_bench.record.folder import timestamp

NAME = "stage.json"
FORMAT, VERSION = "nemo-bench stage", 2
print_line = partial(print, flush=True)  # at once, also into a file


@dataclass(frozen=True)
class FileRecord:
    size_bytes: int
    sha256: str  # hexadecimal


@dataclass(frozen=True)
class Entry:
    """One recorded file or folder."""

    part: str  # the name of the part
    made_at: str
    settings: dict[str, Any]  # those that decide its contents, by key of the configuration
    version: str  # what it is, for people
    files: dict[str, FileRecord]  # by path relative to the stage folder

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files.values())


@dataclass(frozen=True)
class Part:
    """A part as the configuration asks for it."""

    name: str
    place: str  # relative to the stage folder
    settings: dict[str, Any]
    plan: str  # what `make` does, for launch=dry
    make: Callable[[Path, int], str]  # makes it at a new path, under the lock of that descriptor; returns its version


class Stage:
    """A stage folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.manifest = folder, folder / NAME

    def entries(self) -> dict[str, Entry]:
        """Return what is recorded, by place; raise BenchError if stage.json is damaged."""
        if not self.manifest.exists():
            return {}
        try:
            return read_manifest(self.manifest.read_bytes())
        except ValueError as error:
            remedy = f"`mv {self.manifest} {self.manifest}.old`, and run this again"
            raise BenchError(f"{self.manifest} is damaged, or of another version: {error}\n{remedy}") from None

    def disk_errors(self) -> AbstractContextManager[None]:
        remedy = "free some space, or choose another stage folder (STAGE_PATH, or stage_path=...), and run this again"
        return disk.explained_disk_errors(self.folder, remedy)

    def lock(self, name: str) -> AbstractContextManager[int]:
        return disk.locked(self.folder / f".stage-{name}.lock", f"fills the part {name}")

    def problem(self, place: str, settings: dict[str, Any], *, contents: bool) -> str:
        """Return what is wrong with a place, as a predicate ("": nothing): its files, by size or all `contents`."""
        entry = self.entries().get(place)
        if not os.path.lexists(self.folder / place):
            return "does not exist"
        if entry is None:
            return "was not made by setup_stage.py"
        for key, value in settings.items():
            if entry.settings.get(key) != value:
                return f"was made with {key}={entry.settings.get(key)}, not {value}"
        return difference(self.folder, entry.files, contents=contents)

    def put(self, new: Path, place: str, entry: Entry) -> None:
        """Record the file or folder `new`, which lies in a hidden folder, and move it to `place`."""
        with disk.locked(self.folder / ".stage.lock", "writes stage.json"):
            for leftover in self.folder.glob(f".{NAME}.*.tmp"):  # of a process that was killed
                leftover.unlink()
            disk.write_json(self.manifest, manifest_json({**self.entries(), place: entry}))
        disk.replace_durably(new, self.folder / place)


def fill(stage: Stage, part: Part) -> None:
    """Make the part unless it is there; raise BenchError if that fails, or something else is there."""
    destination = stage.folder / part.place
    if _is_complete(stage, part) and not disk.hidden_path(destination).exists():
        return
    with stage.disk_errors():
        destination.parent.mkdir(parents=True, exist_ok=True)
        with stage.lock(part.name) as lock, disk.hidden_folder(destination) as folder:
            if _is_complete(stage, part):  # another process made it
                return
            new = folder / destination.name
            version = part.make(new, lock)
            entry = Entry(part.name, timestamp(), part.settings, version, describe(new, part.place))
            stage.put(new, part.place, entry)
    print_line(f"{part.name}: made ({destination}, {filesize.decimal(entry.size_bytes)})")


def _is_complete(stage: Stage, part: Part) -> bool:
    destination = stage.folder / part.place
    problem = stage.problem(part.place, part.settings, contents=False)
    if not problem:
        print_line(f"{part.name}: complete ({destination})")
    elif os.path.lexists(destination):
        remedy = f"It is left alone: move it away (`mv {destination} {destination}.old`)"
        raise BenchError(f"{destination} {problem}\n{remedy}, or choose another stage folder, and run this again")
    return not problem


def manifest_json(entries: dict[str, Entry]) -> dict[str, Any]:
    """Return the content of stage.json."""
    places = {place: asdict(entry) for place, entry in entries.items()}
    return {"format": FORMAT, "version": VERSION, "updated_at": timestamp(), "entries": places}


def read_manifest(text: bytes) -> dict[str, Entry]:
    """Parse stage.json; raise ValueError if it is damaged, or of another version."""
    try:
        content = json.loads(text)
        if (content["format"], content["version"]) != (FORMAT, VERSION):
            raise ValueError(f"format {content['format']!r}, version {content['version']}")
        for entry in content["entries"].values():
            entry["files"] = {name: FileRecord(**file) for name, file in entry["files"].items()}
        return {place: Entry(**entry) for place, entry in content["entries"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


def describe(path: Path, place: str) -> dict[str, FileRecord]:
    """Return size and SHA-256 of the file `path`, or of all files below it, by their names as parts of `place`."""
    files = {place: path}
    if path.is_dir():
        paths = sorted(file for file in path.rglob("*") if not file.is_dir())
        files = {f"{place}/{file.relative_to(path).as_posix()}": file for file in paths}
    return {name: FileRecord(file.stat().st_size, disk.sha256_of(file)) for name, file in files.items()}


def difference(folder: Path, files: dict[str, FileRecord], *, contents: bool) -> str:
    """Return what is wrong with these files in `folder`, as a predicate ("lacks a.txt"); "" if nothing is."""
    for name, recorded in files.items():
        path = folder / name
        if not path.exists():
            return f"lacks {name}"
        if path.stat().st_size != recorded.size_bytes or (contents and disk.sha256_of(path) != recorded.sha256):
            return f"has changed since it was recorded: {name}"
    return ""


def place_inside(stage_folder: Path, value: str, key: str) -> str:
    """Return the path `value` relative to the stage folder; raise BenchError if it lies elsewhere."""
    relative = os.path.relpath(stage_folder / value, stage_folder)
    if relative.startswith("."):
        raise BenchError(f"{key}={value} must lie inside the stage folder, {stage_folder}")
    return relative
