"""This project's code in the stage folder, with the pure-Python packages that a container may lack."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_bench.errors import BenchError
from nemo_bench.project import PROJECT
from nemo_bench.record.node import git_revision
from nemo_bench.stage.config import PartName
from nemo_bench.stage.files import Room, say
from nemo_bench.stage.manifest import Entry, project_version
from nemo_bench.stage.part import Part

PLACE = "nemo_bench"
VENDOR = "vendor"

_FOLDERS = {"nemo_bench": (".py", ".yaml", ".css"), "hydra_plugins": (".py",), "conf": (".yaml",)}
_TOP_LEVEL = ("*.py", "pyproject.toml", "constraints.txt", "README.md", "LICENSE")

# What composing, launching and reporting import, with all that those need. Not numpy, tokenizers, torch and NeMo, which
# are compiled, and which a NeMo container has.
_PACKAGES = (
    "hydra-core",
    "omegaconf",
    "antlr4-python3-runtime",
    "PyYAML",
    "packaging",
    "submitit",
    "cloudpickle",
    "typing_extensions",
    "rich",
    "markdown-it-py",
    "mdurl",
    "Pygments",
)
# Works without its compiled half.
_PURE_FALLBACK = ("PyYAML",)
_COMPILED = (".so", ".pyd", ".dylib")
# Of one installation: when and from where it was made.
_INSTALLERS_NOTES = ("INSTALLER", "REQUESTED", "direct_url.json")
_ROOM_BYTES = 40 * 10**6


class CodePart(Part):
    """`<stage>/nemo_bench`."""

    kind = PartName.code
    place = PLACE
    place_key = "stage_path"
    replaces = True

    def difference(self, entry: Entry) -> str | None:
        if entry.details["project_sha256"] == _fingerprint(PROJECT):
            return None
        return f"is another state of this project ({self.version(entry)})"

    def version(self, entry: Entry) -> str:
        git = entry.details["git"]
        if git is None:
            return str(entry.details["version"])
        return f"{entry.details['version']}, {git['revision'][:12]}{' with changes' if git['modified'] else ''}"

    def plan(self, destination: Path) -> str:
        files = len(list(_project_files(PROJECT)))
        return f"copy {files} files of this project and {len(_PACKAGES)} packages to {destination}"

    def room(self, destination: Path) -> list[Room]:
        return [Room(destination.parent, _ROOM_BYTES, "the code")]

    def make(self, made: Path, lock: int) -> dict[str, Any]:
        say("code: copying this project and its pure-Python needs")
        for source in _project_files(PROJECT):
            _copy(source, made / source.relative_to(PROJECT))
        vendored = {name: _vendor(name, made / VENDOR) for name in _PACKAGES}
        return {
            "version": project_version(),
            "git": git_revision(),
            # Of the copies: a file may be edited while this goes on.
            "project_sha256": _fingerprint(made),
            "vendored": vendored,
        }


def _project_files(root: Path) -> Iterator[Path]:
    for pattern in _TOP_LEVEL:
        yield from sorted(root.glob(pattern))
    for folder, suffixes in _FOLDERS.items():
        yield from sorted(path for path in (root / folder).rglob("*") if path.suffix in suffixes)


def _fingerprint(root: Path) -> str:
    """SHA-256 over names and contents of the project's files below `root`."""
    digest = hashlib.sha256()
    for path in _project_files(root):
        data = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()


def _copy(source: Path, destination: Path) -> None:
    destination.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, destination)


def _vendor(name: str, folder: Path) -> str:
    """Copies an installed distribution into `folder` and returns its version.

    Raises:
        BenchError: it is not installed, is compiled, or its installation is damaged.
    """
    from importlib.metadata import PackageNotFoundError, distribution

    reinstall = f"`pip install --force-reinstall --no-deps {name}` mends that"
    try:
        found = distribution(name)
    except PackageNotFoundError:
        raise BenchError(f"the package {name} is not installed here: {reinstall}") from None
    if found.files is None:
        raise BenchError(f"the installed package {name} has no list of its files: {reinstall}")
    for file in found.files:
        # Scripts lie above the packages' folder, for example ../../../bin/pygmentize.
        if ".." in file.parts or "__pycache__" in file.parts or file.name in _INSTALLERS_NOTES:
            continue
        if file.suffix in _COMPILED:
            if name in _PURE_FALLBACK:
                continue
            raise BenchError(
                f"{file} of the package {name} is compiled, which another Python cannot use: "
                f"`pip install --force-reinstall --no-deps --no-binary {name} {name}`"
            )
        source = Path(str(found.locate_file(file)))
        if not source.is_file():
            raise BenchError(f"{source} of the package {name} is missing: {reinstall}")
        _copy(source, folder / file)
    return found.version
