"""Real text that every machine has, without a download or a licence question: the sources of Python's own library."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from nemo_bench.errors import BenchError

MINIMUM_BYTES = 1_000_000  # less stops being meaningful; a caller may ask for less

# Installed packages, tests and caches; then generated tables, one of which would be an eighth of the corpus.
LIBRARY = Path(sysconfig.get_path("stdlib"))
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
_SKIPPED_FOLDERS |= {"encodings", "pydoc_data"}
_SKIPPED_FILES = {"html/entities.py", "stringprep.py"}


def _names(root: Path) -> Iterator[str]:
    for folder, subfolders, files in os.walk(root):
        # Edited in place, so that os.walk does not enter them: site-packages may hold 100,000 files.
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS and not name.startswith("config-")]
        for name in [Path(folder, file).relative_to(root).as_posix() for file in files if file.endswith(".py")]:
            # _sysconfigdata_*.py holds this build's compiler settings, with paths of the machine that built it.
            if name not in _SKIPPED_FILES and not name.startswith("_sysconfigdata"):
                yield name


def collect(corpus_bytes: int) -> dict[str, str]:
    """Return library files, text by name, of `corpus_bytes` bytes in all, or all there are; BenchError if too few.

    They come in the order of the SHA-256 of their names: Megatron splits by ranges of documents, and sorted names would
    make the validation split one package.
    """
    root, texts, total = LIBRARY, dict[str, str](), 0
    for name in sorted(_names(root), key=lambda name: (hashlib.sha256(name.encode()).digest(), name)):
        try:
            text = (root / name).read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError):  # a dangling link, or an old encoding
            continue
        if text.strip():
            texts[name] = text
            total += len(text.encode())
        if total >= corpus_bytes:
            return texts
    if total < MINIMUM_BYTES:
        raise BenchError(
            f"This Python's standard library in {root} holds only {total:,} bytes of source text, too little for the "
            "local dataset. Install the whole library (Debian and Ubuntu: libpython3-stdlib)."
        )
    return texts
