"""One shard, from its source to a verified Megatron dataset: download, tokenise, read back, move into place.

Next to the dataset `<prefix>.bin` and `.idx` lies `<prefix>.json`, which says what they were made from. The description
comes first and the index last: an index with its description means a complete dataset, whenever the process is killed.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urlsplit

from nemo_bench.data import fetch
from nemo_bench.data.display import shown
from nemo_bench.data.documents import Reader
from nemo_bench.data.encoder import Encoder
from nemo_bench.data.indexed_dataset import bin_path, idx_path, inspect
from nemo_bench.data.manifest import FORMAT, FORMAT_VERSION, manifest_path, read_manifest
from nemo_bench.data.tokenize import Counts, tokenize
from nemo_bench.errors import BenchError
from nemo_bench.files import explained_disk_errors, fsync, hidden_folder, locked, sha256_of, write_json


@dataclass(frozen=True)
class Shard:
    """A source of documents and the dataset to make from it."""

    source: str  # a URL, which may end in "#sha256=...", or the absolute path of a file
    prefix: str  # of the dataset: absolute, without suffix
    tokenizer_folder: str
    text_key: str = "text"  # JSON key or Parquet column
    encoder: str = "auto"
    max_bad_share: float = 0.0
    threads: int | None = None  # None: as many as serve
    overwrite: bool = False  # make it again, whatever exists

    @property
    def name(self) -> str:
        return Path(self.prefix).name

    @property
    def shown_source(self) -> str:
        """The source without what may be secret in a URL: of a query only a hash."""
        if not is_url(self.source):
            return self.source
        query = urlsplit(self.source).query
        return fetch.shown(self.source) + (f"?{_hash(query)}" if query else "")

    @property
    def download_path(self) -> Path:
        """Where a URL's file goes: its name, after a hash of the URL."""
        name = unquote(urlsplit(self.source).path).rpartition("/")[2]
        return Path(self.prefix).parent / "downloads" / f"{_hash(self.shown_source)}-{name}"

    def inputs(self, tokenizer_sha256: str) -> dict[str, Any]:
        """Return what decides the dataset's bytes; of a file only its name, since a stage folder may be moved."""
        inputs: dict[str, Any] = {"source": self.shown_source if is_url(self.source) else Path(self.source).name}
        if not is_url(self.source) and os.path.exists(self.source):
            status = os.stat(self.source)
            inputs |= {"source_bytes": status.st_size, "source_mtime_ns": status.st_mtime_ns}
        return inputs | {"text_key": self.text_key, "tokenizer_sha256": tokenizer_sha256}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def is_url(source: str) -> bool:
    """Return whether a source is downloaded; a file is used in place."""
    return urlsplit(source).scheme in ("http", "https")


def why_missing(shard: Shard, tokenizer_sha256: str) -> str:
    """Return why the dataset has to be made ("": it exists); raise BenchError if another one is in its place."""
    prefix = Path(shard.prefix)
    manifest = read_manifest(prefix)
    if manifest is None:
        if bin_path(prefix).exists() or idx_path(prefix).exists():
            raise BenchError(f"{prefix} was not made by prepare_data.py: move it away, or overwrite=true")
        return "there is none yet"
    try:
        inspect(prefix)
    except BenchError as error:  # an attempt that did not finish, or damage
        return str(error)
    then, now = manifest["inputs"], shard.inputs(tokenizer_sha256)
    # A source file that no longer exists is not another one, and has no size or date to compare.
    differing = {key: f"{key}: {then.get(key)} then, {now[key]} now" for key in now if then.get(key) != now[key]}
    if list(differing) == ["source_mtime_ns"] and sha256_of(Path(shard.source)) == manifest["source"]["sha256"]:
        return ""
    if differing:
        raise BenchError(
            f"{prefix} was made from something else ({'; '.join(differing.values())}).\n"
            "overwrite=true makes it again; output_prefix=... or stage_path=... makes another one"
        )
    return ""


def prepare(shard: Shard, report: Callable[[str], None]) -> None:
    """Make the dataset of `shard`, or find it made. Of two processes at once, one makes it and the other waits.

    Raises BenchError if nothing was put in place; downloads stay, and the next attempt continues from them.
    """
    prefix = Path(shard.prefix)
    encoder = Encoder(Path(shard.tokenizer_folder), shard.encoder, report)
    remedy = f"{shard.name} needs about as much as its uncompressed text: free it, and run the same command again"
    with explained_disk_errors(prefix.parent, remedy):
        prefix.parent.mkdir(parents=True, exist_ok=True)
        with locked(prefix.with_name(f".{shard.name}.lock"), f"makes {shard.name}", report):
            if not shard.overwrite and not (reason := why_missing(shard, encoder.fingerprint)):
                return
            if not shard.overwrite and manifest_path(prefix).exists():
                report(f"made again: {reason}")
            with hidden_folder(prefix) as folder:
                _make(shard, encoder, folder / shard.name, report)


def _make(shard: Shard, encoder: Encoder, building: Path, report: Callable[[str], None]) -> None:
    """Make the dataset `building`, verify it and move it into place."""
    source, source_sha256 = _download(shard, report) if is_url(shard.source) else (Path(shard.source), "")
    reader = Reader(source, shard.text_key)
    began = time.time()
    with shown(f"{shard.name}: tokenising", lambda: reader.bytes_read, lambda: reader.size_bytes):
        counts = tokenize(reader, encoder, building, threads=shard.threads, max_bad_share=shard.max_bad_share)
    tokenised = time.time()
    if counts.bad:
        report(f"{source}: {counts.bad.total():,} bad documents were left out:{counts.listed()}")
    products = _read_back(building, encoder, counts)
    manifest = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "inputs": shard.inputs(encoder.fingerprint),
        "source": {"size_bytes": reader.size_bytes, "sha256": source_sha256 or sha256_of(source)},
        "documents": counts.documents,
        "tokens": counts.tokens,
        "text_bytes": counts.text_bytes,
        "vocab_size": encoder.vocab_size,
        "bad": dict(counts.bad),
        "bad_examples": counts.examples,
        "products": products,
        "seconds": {"tokenising": tokenised - began, "verifying": time.time() - tokenised},
        "made_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "encoder": encoder.library,
    }
    _move_into_place(building, Path(shard.prefix), manifest)


def _download(shard: Shard, report: Callable[[str], None]) -> tuple[Path, str]:
    """Return the downloaded file and its SHA-256."""
    path, (url, fragment) = shard.download_path, urldefrag(shard.source)
    sha256 = fragment.removeprefix("sha256=") if fragment.startswith("sha256=") else ""
    sizes: list[int | None] = [None]
    with shown(f"{shard.name}: downloading", lambda: fetch.bytes_in(fetch.part_of(path)), lambda: sizes[-1]):
        return path, fetch.fetch(url, path, sha256, report, sizes.append)


def _read_back(building: Path, encoder: Encoder, counts: Counts) -> dict[str, Any]:
    """Read everything that was written from the files again; return their sizes and SHA-256."""
    info = inspect(building, vocab_size=encoder.vocab_size, read_tokens=True)
    if (info.documents, info.tokens) != (counts.documents, counts.tokens):
        raise BenchError(f"{building} does not read back as it was written: the disk or its driver loses data")
    paths = (bin_path(building), idx_path(building))
    return {path.suffix: {"size_bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in paths}


def _move_into_place(building: Path, prefix: Path, manifest: dict[str, Any]) -> None:
    """Give the verified files their names: the description first, the index last."""
    idx_path(prefix).unlink(missing_ok=True)
    write_json(manifest_path(prefix), manifest)
    os.replace(bin_path(building), bin_path(prefix))
    os.replace(idx_path(building), idx_path(prefix))
    fsync(prefix.parent)
