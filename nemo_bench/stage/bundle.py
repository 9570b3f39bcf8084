"""A stage folder as one file, for a cluster without internet: a tar archive, plain or compressed by Zstandard.

Its first member is a stage.json that lists all others, which are named by their paths in the stage folder.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath

from backports.zstd import tarfile
from rich import filesize

from nemo_bench.data.shard import datasets_in, verify
from nemo_bench.errors import BenchError
from nemo_bench.files import explained_disk_errors, hidden_folder, locked, replace_durably
from nemo_bench.record.folder import timestamp
from nemo_bench.stage.config import PARTS
from nemo_bench.stage.stage import NAME, Entry, Part, Stage, describe, difference, manifest_json, read_manifest

DATASET = "dataset"  # prepare_data.py describes a dataset in a file next to it


def pack(stage: Stage, parts: list[Part], bundle: Path) -> None:
    """Pack the parts, and the datasets that prepare_data.py made, into the new file `bundle`, or raise BenchError."""
    if not bundle.name.endswith((".tar", ".tar.zst")) or bundle.exists():
        raise BenchError(f"bundle={bundle} must name a new file that ends in .tar, or .tar.zst (compressed)")
    for part in parts:
        if problem := stage.problem(part.place, part.settings, contents=True):
            remedy = "nothing was packed. `python setup_stage.py check` names the command that repairs it"
            raise BenchError(f"{part.name}: {stage.folder / part.place} {problem}; {remedy}")
    recorded = stage.entries()
    entries = {part.place: recorded[part.place] for part in parts} | _datasets(stage)
    print(f"packing {filesize.decimal(sum(entry.size_bytes for entry in entries.values()))} into {bundle}")
    with explained_disk_errors(bundle.parent, "free some space, or choose another folder (bundle=FILE)"):
        bundle.parent.mkdir(parents=True, exist_ok=True)
        packing = bundle.with_name(f".packing.{bundle.name}")
        with locked(bundle.with_name(f".{bundle.name}.lock"), f"packs {bundle}"):
            try:
                _write(stage, entries, packing)
                replace_durably(packing, bundle)
            finally:
                packing.unlink(missing_ok=True)
    print(f"packed {', '.join(entries)}")


def _datasets(stage: Stage) -> dict[str, Entry]:
    """Verify the datasets of the stage folder and return an entry for each."""
    entries = {}
    for prefix in datasets_in(stage.folder / "llama3.1-dataset"):
        verify(prefix)
        place = prefix.relative_to(stage.folder).as_posix()
        entry = entries[place] = Entry(DATASET, timestamp(), {}, "", {})
        for end in (".json", ".bin", ".idx"):  # as they are installed: an index means a complete dataset
            entry.files.update(describe(Path(f"{prefix}{end}"), f"{place}{end}"))
    return entries


def _write(stage: Stage, entries: dict[str, Entry], path: Path) -> None:
    with tarfile.open(
        path, "w:zst" if path.suffix == ".zst" else "w", format=tarfile.PAX_FORMAT, dereference=True
    ) as tar:
        text = json.dumps(manifest_json(entries), indent=1).encode()
        member = tarfile.TarInfo(NAME)
        member.size = len(text)
        tar.addfile(member, io.BytesIO(text))
        for name in (name for entry in entries.values() for name in entry.files):
            tar.add(stage.folder / name, name)


def install(stage: Stage, bundle: Path, *, dry: bool) -> None:
    """Install what the stage folder lacks of the bundle; if the bundle is damaged, nothing (BenchError)."""
    with stage.disk_errors(), ExitStack() as stack:
        tar, entries = stack.enter_context(_opened(bundle))
        if not dry:
            stage.folder.mkdir(parents=True, exist_ok=True)
            for name in PARTS:
                stack.enter_context(stage.lock(name))
            folder = stack.enter_context(hidden_folder(stage.folder / "bundle"))
        lacking: dict[str, Entry] = {}
        for place, entry in entries.items():
            exists = os.path.lexists(stage.folder / (f"{place}.idx" if entry.part == DATASET else place))
            print(f"{stage.folder / place}: {'there already, and kept' if exists else 'to be installed'}")
            lacking |= {} if exists else {place: entry}
        if lacking and not dry:
            files = {name: file for entry in lacking.values() for name, file in entry.files.items()}
            while member := tar.next():
                if member.name in files and member.isreg():
                    tar.extract(member, folder, filter="data")
            if damage := difference(folder, files, contents=True):
                raise ValueError(f"it {damage}")
            for place, entry in lacking.items():
                if entry.part != DATASET:
                    stage.put(folder / place, place, entry)
                    continue
                for name in entry.files:  # the index last, as prepare_data.py does
                    replace_durably(folder / name, stage.folder / name)
            print(f"installed {', '.join(lacking)}")


@contextmanager
def _opened(bundle: Path) -> Iterator[tuple[tarfile.TarFile, dict[str, Entry]]]:
    """Open a bundle, which is read from its beginning to its end, and give it with what its stage.json lists."""
    if not bundle.is_file():
        raise BenchError(f"bundle={bundle} does not exist")
    try:
        with tarfile.open(bundle, "r|*") as tar:
            first = tar.next()
            if first is None or first.name != NAME or (file := tar.extractfile(first)) is None:
                raise ValueError(f"its first member is not {NAME}")
            entries = read_manifest(file.read())
            for place, entry in entries.items():
                for name in (place, *entry.files):
                    path = PurePosixPath(name)
                    outside = not place or place.startswith((".", "/", NAME)) or ".." in path.parts
                    if outside or not str(path).startswith(place):
                        raise ValueError(f"{name!r} is not a path of a stage folder")
            yield tar, entries
    except (tarfile.TarError, ValueError) as error:
        damage = f"is damaged, cut off, or not a bundle made by `setup_stage.py pack` ({error})"
        raise BenchError(f"{bundle} {damage}: copy it again. Nothing was installed") from None
