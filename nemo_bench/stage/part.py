"""What is common to the parts of a stage folder: how one stands, and how it is filled."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_bench.errors import BenchError
from nemo_bench.files import locked, size_text
from nemo_bench.record.folder import timestamp
from nemo_bench.stage.config import PartName
from nemo_bench.stage.files import (
    FileRecord,
    Room,
    aside,
    byte_progress,
    leftovers,
    make_durable,
    measure,
    publish,
    remove,
    say,
    walk,
    writing_error,
)
from nemo_bench.stage.manifest import Comparison, Entry, Stage, records_of


@dataclass(frozen=True)
class State:
    """How a part stands.

    Attributes:
        name: ok, missing, incomplete, unrecorded, changed, or other (it is not what the configuration asks for).
        detail: a clause about it.
        in_the_way: filling refuses to touch what lies there.
        entry: what is recorded.
        touched: the record with new dates, where files only got a new date.
    """

    name: str
    detail: str = ""
    in_the_way: bool = False
    entry: Entry | None = field(default=None, repr=False)
    touched: Entry | None = field(default=None, repr=False)

    @property
    def ok(self) -> bool:
        return self.name == "ok"


class Part(ABC):
    """One part of a stage folder.

    Attributes:
        kind: its name.
        place: its path relative to the stage folder.
        place_key: the key that chooses it.
        replaces: what `setup_stage.py` put there is replaced once the configuration asks for another.
    """

    kind: PartName
    place: str
    place_key: str
    replaces = False

    @abstractmethod
    def difference(self, entry: Entry) -> str | None:
        """In what a recorded part is not what the configuration asks for, as a clause."""

    @abstractmethod
    def plan(self, destination: Path) -> str:
        """What `make` would do, for launch=dry."""

    @abstractmethod
    def room(self, destination: Path) -> list[Room]:
        """The disk space that `make` needs."""

    @abstractmethod
    def make(self, made: Path, lock: int) -> dict[str, Any]:
        """Makes the part as the new file or folder `made`, verifies it, and returns the details to record.

        `lock` is a descriptor that a process started for it inherits, so that the lock outlives this process with it.

        Raises:
            BenchError: it cannot be made; what there is of `made` is removed by the caller.
        """

    @property
    def adopt(self) -> Callable[[Path], dict[str, Any]] | None:
        """What takes over something that lies there without a record; None: such a thing is left alone.

        It verifies a path and returns the details to record, or raises BenchError.
        """
        return None

    @abstractmethod
    def version(self, entry: Entry) -> str:
        """What the table of `check` says about a recorded part."""

    # --- the same for all parts ---

    def state(self, stage: Stage, *, contents: bool) -> State:
        """How the part stands; with `contents` every byte of it is read."""
        path, entry = stage.folder / self.place, stage.entry(self.kind, self.place)
        if not os.path.lexists(path):
            return State("missing", "is not there")
        if entry is None:
            return State("unrecorded", "was not put there by setup_stage.py", in_the_way=self.adopt is None)
        compared = stage.compare(entry, contents=contents)
        changed = compared.changed + self._added(stage, entry)
        if changed:
            return State("changed", f"has changed since it was recorded: {_names(changed)}", True, entry)
        if compared.missing:
            return State("incomplete", f"lacks {_names(compared.missing)}", entry=entry)
        if clause := self.difference(entry):
            return State("other", clause, not self.replaces, entry)
        return State("ok", entry=entry, touched=compared.touched)

    def _added(self, stage: Stage, entry: Entry) -> list[str]:
        """Files of the user's in a folder that would be replaced with all that is in it."""
        if not self.replaces:
            return []
        names = (file.relative_to(stage.folder).as_posix() for file in walk(stage.folder / self.place))
        return [name for name in names if name not in entry.files]

    def fill(self, stage: Stage) -> None:
        """Makes the part unless it is there, and says what was done.

        Raises:
            BenchError: it cannot be made, or something else is in its place.
        """
        destination = stage.folder / self.place
        state = self.state(stage, contents=False)
        if state.ok and state.touched is None:
            stage.remove_leftovers(self.kind, destination)
            say(f"{self.kind.value}: there already ({destination})")
            return
        try:
            destination.parent.mkdir(parents=True, exist_ok=True)
            with locked(stage.lock_path(self.kind), f"fills the part {self.kind.value}", say) as lock:
                for path in leftovers(destination):
                    remove(path)
                self._fill_locked(stage, destination, lock)
        except OSError as error:
            raise writing_error(stage.folder, error) from error
        except ModuleNotFoundError as error:
            raise BenchError(f"this needs the package {error.name}: `pip install {error.name}`") from error

    def _fill_locked(self, stage: Stage, destination: Path, lock: int) -> None:
        state = self.state(stage, contents=False)  # again: another process may have made it
        if state.in_the_way:
            raise self._left_alone(destination, state.detail)
        if state.ok:
            if state.touched is not None:
                stage.record(self.kind, self.place, state.touched)
            say(f"{self.kind.value}: there already ({destination})")
        elif state.name == "unrecorded" and self.adopt is not None:
            try:
                details = self.adopt(destination)
            except BenchError as error:
                raise self._left_alone(destination, f"{state.detail}, and is not what it should be: {error}") from error
            entry = Entry(timestamp(), details, self._measured(destination))
            stage.record(self.kind, self.place, entry)
            say(f"{self.kind.value}: found and recorded ({destination}, {size_text(entry.size_bytes)})")
        else:
            made = aside(destination)
            try:
                details = self.make(made, lock)
                entry = Entry(timestamp(), details, self._measured(made))
                make_durable(made)
                self._place(stage, made, destination, entry)
            finally:
                remove(made)
            say(f"{self.kind.value}: made ({destination}, {size_text(entry.size_bytes)})")

    def _measured(self, path: Path) -> dict[str, FileRecord]:
        total_bytes = sum(file.stat().st_size for file in walk(path))
        with byte_progress(f"checksums of {self.kind.value}", total_bytes) as advance:
            return records_of(path, self.place, lambda file: measure(file, advance))

    def _place(self, stage: Stage, made: Path, destination: Path, entry: Entry) -> None:
        if self.replaces and os.path.lexists(destination):
            # Two renames, since one cannot replace a folder that is not empty. A kill between them leaves none, and the
            # next start makes it.
            replaced = aside(destination, "replaced")
            os.rename(destination, replaced)
            stage.record(self.kind, self.place, entry)
            publish(made, destination)
            remove(replaced)
            return
        compared: Comparison = stage.compare(entry, contents=True)
        if compared.changed:
            raise self._left_alone(destination, f"lacks files, and of its others differ {_names(compared.changed)}")
        stage.record(self.kind, self.place, compared.touched or entry)
        publish(made, destination)

    def _left_alone(self, destination: Path, detail: str) -> BenchError:
        return BenchError(
            f"{destination} {detail}\nIt is left alone: move it away, or choose another place ({self.place_key}=...), "
            "and run this again"
        )


def _names(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def inside(stage: Path, value: str, key: str) -> str:
    """`value`, a path, relative to the stage folder.

    Raises:
        BenchError: it lies elsewhere.
    """
    relative = os.path.relpath(stage / value, stage)
    if relative.split(os.sep)[0] in (os.curdir, os.pardir):
        raise BenchError(f"{key}={value} must lie inside the stage folder, {stage}")
    return relative
