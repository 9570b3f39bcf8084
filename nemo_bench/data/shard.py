"""One shard, from its source to a verified Megatron dataset: download, tokenise, read back, move into place.

Next to the dataset `<prefix>.bin` and `.idx` lies `<prefix>.json`, which says what they were made from. The description
comes first and the index last: an index with its description means a complete dataset, whenever the process is killed.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from rich import filesize
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from nemo_bench.data import fetch
from nemo_bench.data.documents import Reader
from nemo_bench.data.encoder import Encoder
from nemo_bench.data.indexed_dataset import DatasetInfo, bin_path, idx_path, inspect
from nemo_bench.data.tokenize import tokenize
from nemo_bench.errors import BenchError
from nemo_bench.files import explained_disk_errors, fsync, hidden_folder, locked, sha256_of, write_json
from nemo_bench.report.terminal import make_console

FORMAT = "nemo-bench dataset"
_KEYS = {"inputs", "source", "documents", "tokens", "vocab_size", "bad", "products", "made_at"}


@dataclass(frozen=True)
class Shard:
    """A source of documents and the dataset to make from it."""

    source: str  # a URL, or the absolute path of a file
    prefix: str  # of the dataset: absolute, without suffix
    tokenizer_folder: str
    number: int = 0  # of the shards of one command
    text_key: str = "text"  # JSON key or Parquet column
    encoder: str = "auto"
    max_bad_share: float = 0.0
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
    def path(self) -> Path:
        """The file of documents; of a URL where it is downloaded to."""
        if not is_url(self.source):
            return Path(self.source)
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


def is_made(shard: Shard, tokenizer_sha256: str) -> bool:
    """Return whether the dataset exists; raise BenchError if another one is in its place."""
    prefix = Path(shard.prefix)
    manifest = read_manifest(prefix)
    if manifest is None:
        if bin_path(prefix).exists() or idx_path(prefix).exists():
            raise BenchError(f"{prefix} was not made by prepare_data.py: move it away, or overwrite=true")
        return False
    try:
        inspect(prefix)
    except BenchError:  # an attempt that did not finish, or damage
        return False
    then, now = manifest["inputs"], shard.inputs(tokenizer_sha256)
    # A source file that no longer exists is not another one, and has no size or date to compare.
    differing = {key: f"{key}: {then.get(key)} then, {now[key]} now" for key in now if then.get(key) != now[key]}
    touched = list(differing) == ["source_mtime_ns"] and sha256_of(shard.path) == manifest["source"]["sha256"]
    if differing and not touched:
        raise BenchError(
            f"{prefix} was made from something else ({'; '.join(differing.values())}).\n"
            "overwrite=true makes it again; output_prefix=... or stage_path=... makes another one"
        )
    return True


def prepare(shard: Shard) -> None:
    """Make the dataset of `shard`, or find it made. Of two processes at once, one makes it and the other waits.

    Raises BenchError if nothing was put in place; downloads stay, and the next attempt continues from them.
    """
    prefix = Path(shard.prefix)
    encoder = Encoder(Path(shard.tokenizer_folder), shard.encoder)
    remedy = f"{shard.name} needs about as much as its uncompressed text: free it, and run the same command again"
    with explained_disk_errors(prefix.parent, remedy):
        prefix.parent.mkdir(parents=True, exist_ok=True)
        with locked(prefix.with_name(f".{shard.name}.lock"), f"makes {shard.name}"):
            if not shard.overwrite and is_made(shard, encoder.fingerprint):
                return
            with hidden_folder(prefix) as folder:
                _make(shard, encoder, folder / shard.name)


def _make(shard: Shard, encoder: Encoder, building: Path) -> None:
    """Make the dataset `building`, read it back from the disk, and move it into place: the index last."""
    if is_url(shard.source):
        part, sizes = fetch.part_of(shard.path), list[int | None]([None])
        with _shown(f"{shard.name}: downloading", lambda: fetch.bytes_in(part), lambda: sizes[-1]):
            fetch.fetch(shard.source, shard.path, sizes.append)
    reader, began = Reader(shard.path, shard.text_key), time.time()
    with _shown(f"{shard.name}: tokenising", lambda: reader.bytes_read, lambda: reader.size_bytes):
        counts = tokenize(reader, encoder, building, shard.max_bad_share)
    tokenising_s = time.time() - began
    if counts.bad:
        print(f"{shard.path}: {counts.bad.total():,} bad documents were left out:{counts.listed()}", flush=True)
    info = inspect(building)
    products = {path.suffix: sha256_of(path) for path in (bin_path(building), idx_path(building))}
    if (info.documents, info.tokens, products[".bin"]) != (counts.documents, counts.tokens, counts.sha256):
        raise BenchError(f"{building} does not read back as it was written: the disk or its driver loses data")
    manifest = {
        "format": FORMAT,
        "inputs": shard.inputs(encoder.fingerprint),
        "source": {"size_bytes": reader.size_bytes, "sha256": sha256_of(shard.path)},
        "documents": counts.documents,
        "tokens": counts.tokens,
        "vocab_size": encoder.vocab_size,
        "bad": dict(counts.bad),
        "products": {suffix: {"sha256": sha256} for suffix, sha256 in products.items()},
        "tokenising_s": tokenising_s,
        "made_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "encoder": encoder.library,
    }
    prefix = Path(shard.prefix)
    idx_path(prefix).unlink(missing_ok=True)
    write_json(manifest_path(prefix), manifest)
    os.replace(bin_path(building), bin_path(prefix))
    os.replace(idx_path(building), idx_path(prefix))
    fsync(prefix.parent)


@contextmanager
def _shown(title: str, done_bytes: Callable[[], int], total_bytes: Callable[[], int | None]) -> Iterator[None]:
    """Show, until the block ends, how many bytes are done, of how many if that is known."""
    console = make_console()
    columns = [TextColumn("{task.description}"), BarColumn(bar_width=20), DownloadColumn(), TransferSpeedColumn()]
    bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal)
    row, ended = bar.add_task(title, total=None), threading.Event()

    def show() -> None:
        print(time.strftime("%H:%M:%S"), title, flush=True)
        while not ended.wait(10.0 if bar.disable else 0.2):
            done, total = done_bytes(), total_bytes()
            bar.update(row, completed=done, total=total)
            if bar.disable:
                of = f" of {filesize.decimal(total)}" if total else ""
                print(time.strftime("%H:%M:%S"), f"{title}: {filesize.decimal(done)}{of}", flush=True)

    thread = threading.Thread(target=show, daemon=True)
    with bar:
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


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
    info, manifest = inspect(prefix), read_manifest(prefix)
    if manifest is None:
        raise BenchError(f"{prefix} was not made by prepare_data.py")
    for path in (bin_path(prefix), idx_path(prefix)):
        if sha256_of(path) != manifest["products"][path.suffix]["sha256"]:
            raise BenchError(f"{path} has changed since it was made: overwrite=true makes it again")
    return info, manifest
