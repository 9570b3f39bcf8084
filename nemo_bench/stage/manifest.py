"""`stage.json`: what lies in a stage folder, with sizes, SHA-256, versions and dates.

A part is recorded just before it gets its name. So what is there under a recorded name is what the record says, or was
changed later; and a kill in between leaves a record of something that is missing, which the next start makes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nemo_bench.errors import BenchError
from nemo_bench.files import locked, write_json
from nemo_bench.project import PROJECT
from nemo_bench.record.folder import timestamp
from nemo_bench.record.node import git_revision
from nemo_bench.stage.config import PartName
from nemo_bench.stage.files import FileRecord, byte_progress, leftovers, measure, remove, say, walk

NAME = "stage.json"
FORMAT = "nemo-bench stage"
VERSION = 1


def project_version() -> str:
    """This project's version, from its own file: it need not be installed."""
    match = re.search(r'^version = "(.+)"$', (PROJECT / "pyproject.toml").read_text(), re.MULTILINE)
    return match[1] if match else "unknown"


# What the parts themselves read of what they recorded.
_DETAILS = {
    PartName.image: ("container",),
    PartName.tokenizer: ("source", "repo", "asked_revision", "revision", "asked_vocab_size", "vocab_size"),
    PartName.code: ("version", "git", "project_sha256"),
}


@dataclass(frozen=True)
class Entry:
    """One part as it was recorded. `files` is by path relative to the stage folder; `details` says where it is from."""

    made_at: str
    details: dict[str, Any]
    files: dict[str, FileRecord]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files.values())

    def to_json(self) -> dict[str, Any]:
        files = {name: asdict(file) for name, file in self.files.items()}
        return {"made_at": self.made_at, **self.details, "size_bytes": self.size_bytes, "files": files}

    @staticmethod
    def from_json(content: dict[str, Any]) -> Entry:
        """Raises KeyError, TypeError or AttributeError where `content` is nothing that `to_json` made."""
        files = {name: FileRecord(**file) for name, file in content["files"].items()}
        details = {k: v for k, v in content.items() if k not in ("made_at", "size_bytes", "files")}
        return Entry(content["made_at"], details, files)


@dataclass(frozen=True)
class Comparison:
    """How files stand against their record; names are relative to the stage folder."""

    missing: list[str]
    changed: list[str]
    touched: Entry | None  # the entry with new dates, where files only got a new date


def entries_from_json(parts: dict[str, Any]) -> dict[PartName, dict[str, Entry]]:
    """The entries by part and place.

    Raises:
        KeyError, TypeError, AttributeError, ValueError: they are not what `Entry.to_json` makes.
    """
    entries: dict[PartName, dict[str, Entry]] = {}
    for kind, by_place in parts.items():
        entries[PartName(kind)] = {place: Entry.from_json(entry) for place, entry in by_place.items()}
        for entry in by_place.values():
            if lacking := [name for name in _DETAILS[PartName(kind)] if name not in entry]:
                raise KeyError(", ".join(lacking))
    return entries


class Stage:
    """A stage folder and its manifest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = folder / NAME

    def read(self) -> dict[str, Any]:
        """The manifest; an empty one where there is none.

        Raises:
            BenchError: it cannot be read as one.
        """
        try:
            content = json.loads(self.manifest.read_bytes())
            if content["format"] != FORMAT or content["version"] != VERSION:
                raise ValueError(f"format {content['format']!r}, version {content['version']}")
            entries_from_json(content["parts"])
        except FileNotFoundError:
            return {"format": FORMAT, "version": VERSION, "updated_at": None, "parts": {}}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BenchError(
                f"{self.manifest} is damaged, or of another program: {error}\n"
                f"`mv {self.manifest} {self.manifest}.old`, and run this again: what is in the folder is recorded anew"
            ) from error
        except OSError as error:
            raise BenchError(f"{self.manifest} cannot be read: {error}") from error
        assert isinstance(content, dict)
        return content

    def entry(self, kind: PartName, place: str) -> Entry | None:
        """What is recorded of the part at `place`, a path relative to the stage folder."""
        content = self.read()["parts"].get(kind.value, {}).get(place)
        return None if content is None else Entry.from_json(content)

    def record(self, kind: PartName, place: str, entry: Entry) -> None:
        """Puts an entry into the manifest; what other processes record at the same time stays."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / ".stage.lock", "writes stage.json", say):
            for stale in self.folder.glob(f".{NAME}.*.tmp"):
                remove(stale)
            content = self.read()
            content["parts"].setdefault(kind.value, {})[place] = entry.to_json()
            content |= {"updated_at": timestamp(), "project_version": project_version(), "git": git_revision()}
            write_json(self.manifest, content)

    def compare(self, entry: Entry, *, contents: bool) -> Comparison:
        """Looks at the files of `entry`: their contents too, or only where size and date do not vouch for them."""
        missing, changed, touched = [], [], dict(entry.files)
        present = [file for name, file in entry.files.items() if contents and (self.folder / name).exists()]
        with byte_progress("verifying", sum(file.size_bytes for file in present)) as advance:
            for name, recorded in entry.files.items():
                path = self.folder / name
                try:
                    status = path.stat()
                    if status.st_size != recorded.size_bytes or not path.is_file():
                        changed.append(name)
                    elif contents or status.st_mtime_ns != recorded.mtime_ns:
                        touched[name] = measure(path, advance)
                        if touched[name].sha256 != recorded.sha256:
                            changed.append(name)
                except FileNotFoundError:
                    missing.append(name)
                except OSError as error:
                    raise BenchError(f"{path} cannot be read: {error}") from error
        return Comparison(missing, changed, replace(entry, files=touched) if touched != entry.files else None)

    def lock_path(self, kind: PartName) -> Path:
        """Held by whoever makes a part of this kind."""
        return self.folder / f".stage-{kind.value}.lock"

    def remove_leftovers(self, kind: PartName, destination: Path) -> None:
        """Removes what killed processes left of `destination`, unless another one is at work."""
        if leftovers(destination):
            try:
                with locked(self.lock_path(kind), "", None):
                    for path in leftovers(destination):
                        remove(path)
            except (OSError, BenchError):  # at work, or not ours to write
                return


def records_of(made: Path, place: str, measured: Callable[[Path], FileRecord] = measure) -> dict[str, FileRecord]:
    """The records of the file or folder `made` as they will be at `place`, a path relative to the stage folder."""
    if not made.is_dir():
        return {place: measured(made)}
    return {f"{place}/{file.relative_to(made).as_posix()}": measured(file) for file in walk(made)}
