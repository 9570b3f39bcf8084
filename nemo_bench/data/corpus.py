"""Real text that every machine has: the sources of this Python's own standard library.

A benchmark needs text whose token statistics look like text, with no download and no licence question. The
standard library's modules, with their documentation strings, are a few megabytes of it.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nemo_bench.errors import BenchError

#: Bytes below which a tokenizer and a train/validation split stop being meaningful. A caller who asks for
#: less than this on purpose (a test) gets what it asks for.
MINIMUM_BYTES = 1_000_000

# Folders whose files are installed packages, tests, caches or build settings rather than library text.
_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib-dynload"}
    # Generated tables: character maps, and the language reference as one escaped literal that would be an
    # eighth of the whole corpus in a single document.
    | {"encodings", "pydoc_data"}
)
# More generated tables (HTML entities, Unicode tables), and modules that an administrator writes.
_SKIPPED_FILES = frozenset({"html/entities.py", "stringprep.py", "sitecustomize.py", "usercustomize.py"})


@dataclass(frozen=True)
class CorpusFile:
    """One document: `name` is its path in the library with "/" between parts, `data` its UTF-8 bytes."""

    name: str
    data: bytes

    @property
    def text(self) -> str:
        """The document as text, newlines untouched."""
        return self.data.decode("utf-8")

    @property
    def sha256(self) -> str:
        """Hexadecimal SHA-256 of `data`."""
        return hashlib.sha256(self.data).hexdigest()


def library_folder() -> Path:
    """The folder of this Python's standard library (of the base installation, inside a virtual
    environment)."""
    return Path(sysconfig.get_path("stdlib"))


def _names(root: Path) -> Iterator[str]:
    """Relative names of the library's text files below `root`, in no particular order."""
    for folder, subfolders, files in os.walk(root):
        # Edited in place so that os.walk does not enter them: site-packages may hold 100,000 files.
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS and not name.startswith("config-")]
        for file in files:
            # _sysconfigdata_*.py is this build's compiler settings, with paths of the machine that built it.
            if file.endswith(".py") and not file.startswith("_sysconfigdata"):
                name = Path(folder, file).relative_to(root).as_posix()
                if name not in _SKIPPED_FILES:
                    yield name


def collect(corpus_bytes: int, *, root: Path | None = None) -> list[CorpusFile]:
    """The corpus: library files of `corpus_bytes` bytes in all, the last file in whole, or all there are.

    Files come in the order of the SHA-256 of their names. It is the same on each run, and it mixes the
    packages: Megatron splits train/validation/test by ranges of documents, so sorted names would make the
    validation split one package. Empty files and files that are not UTF-8 are left out.

    Args:
        corpus_bytes: bytes of text wanted, at least 1.
        root: the library's folder; this Python's own by default.

    Raises:
        BenchError: `corpus_bytes` is not positive, or the library holds less than both `corpus_bytes` and
            MINIMUM_BYTES.
    """
    if corpus_bytes < 1:
        raise BenchError(f"The corpus size must be at least 1 byte, not {corpus_bytes}: ask for e.g. 6000000.")
    root = library_folder() if root is None else root
    chosen: list[CorpusFile] = []
    total = 0
    for name in sorted(_names(root), key=lambda name: (hashlib.sha256(name.encode()).digest(), name)):
        try:
            data = (root / name).read_bytes()
            if not data.decode("utf-8").strip():
                continue
        except (OSError, UnicodeDecodeError):
            # A dangling link, a file for root's eyes, or a file in an old encoding: not part of the text.
            continue
        chosen.append(CorpusFile(name, data))
        total += len(data)
        if total >= corpus_bytes:
            return chosen
    if total < MINIMUM_BYTES:
        raise BenchError(
            f"This Python's standard library in {root} holds only {total:,} bytes of source text, and the "
            f"local dataset needs at least {min(corpus_bytes, MINIMUM_BYTES):,}. Install the whole library "
            "(Debian and Ubuntu: libpython3-stdlib) or use a Python from python.org, conda or pyenv."
        )
    return chosen
