"""The description next to a dataset, `<prefix>.json`: what the dataset was made from, and the SHA-256 of its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nemo_bench.data.indexed_dataset import DatasetInfo, bin_path, idx_path, inspect
from nemo_bench.errors import BenchError
from nemo_bench.files import sha256_of

FORMAT, FORMAT_VERSION = "nemo-bench dataset", 1
_KEYS = {"inputs", "source", "documents", "tokens", "vocab_size", "bad", "products", "made_at"}


def manifest_path(prefix: Path) -> Path:
    """Return the description next to a dataset."""
    return Path(f"{prefix}.json")


def read_manifest(prefix: Path) -> dict[str, Any] | None:
    """Return the description of the dataset `prefix`, or None if there is none; raise BenchError if it is damaged."""
    path = manifest_path(prefix)
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or not manifest.keys() >= _KEYS:
        raise BenchError(f"{path} does not describe a dataset, or is damaged: overwrite=true makes both again")
    return manifest


def datasets_in(folder: Path) -> list[Path]:
    """Return the prefixes of the datasets in a folder that prepare_data.py made, including incomplete ones."""
    prefixes = {path.with_suffix("") for path in folder.glob("*.*") if path.suffix in (".bin", ".idx")}
    return sorted(prefix for prefix in prefixes if manifest_path(prefix).exists())


def verify(prefix: Path) -> tuple[DatasetInfo, dict[str, Any]]:
    """Read a whole dataset and return it with its description; raise BenchError if it is not as it was made."""
    manifest = read_manifest(prefix)
    info = inspect(prefix, vocab_size=manifest["vocab_size"] if manifest else None, read_tokens=True)
    if manifest is None:
        raise BenchError(f"{prefix} was not made by prepare_data.py")
    for path in (bin_path(prefix), idx_path(prefix)):
        if sha256_of(path) != manifest["products"][path.suffix]["sha256"]:
            raise BenchError(f"{path} has changed since it was made: overwrite=true makes it again")
    return info, manifest
