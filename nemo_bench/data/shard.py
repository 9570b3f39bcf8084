"""One shard, from its source to a verified Megatron dataset: download, tokenise, read back, move into place.

`python -m nemo_bench.data.shard FOLDER` does what FOLDER/shard.json says, as a process of its own, here or in a Slurm
job, and keeps its progress and its result there. Next to the dataset `<prefix>.bin` and `.idx` it leaves
`<prefix>.json`, which says what they were made from. The description comes first and the index last: an index with its
description means a complete dataset, at whatever moment the process was killed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urlsplit

from nemo_bench.data import fetch
from nemo_bench.data.documents import Reader
from nemo_bench.data.encoder import Backend, Encoder
from nemo_bench.data.indexed_dataset import bin_path, idx_path, inspect
from nemo_bench.data.manifest import FORMAT, FORMAT_VERSION, damage, manifest_path, read_manifest
from nemo_bench.data.tokenize import MAX_THREADS, Counts, tokenize, usable_cores
from nemo_bench.errors import BenchError
from nemo_bench.files import (
    atomic_file,
    explained_disk_errors,
    fsync,
    hidden_folder,
    hidden_path,
    locked,
    sha256_of,
    write_json,
)

RECORD, LOG = "shard.json", "log.out"
_SAVE_EVERY_S = 0.5


@dataclass
class Shard:
    """A source of documents and the dataset made from it: what to do, how it goes, what came of it."""

    # what to do
    source: str  # a URL, which may end in "#sha256=...", or the absolute path of a file
    prefix: str  # of the dataset: absolute, without suffix
    tokenizer_folder: str
    text_key: str = "text"  # JSON key or Parquet column
    append_eod: bool = True
    encoder: str = "auto"
    max_bad_share: float = 0.0
    download_folder: str = ""
    keep_download: bool = True
    threads: int | None = None  # None: as many as the machine that works on it has use for
    overwrite: bool = False  # make it again, whatever exists
    # how it goes
    folder: str = ""  # of its record and log; "" keeps none
    job_id: str = ""  # of its Slurm job
    state: str = "waiting"  # waiting, running (or Slurm's word), done, failed
    phase: str = "starting"  # downloading, tokenising, verifying
    phase_began: float = 0.0
    saved_at: float = 0.0
    done_bytes: int = 0  # of the source, as stored
    total_bytes: int | None = None
    note: str = ""  # the last thing that its user wants to know: a retry, bad documents
    # what came of it
    origin: str = ""  # made, found (made before), foreign (not made by this program)
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0  # encoded now
    seconds: dict[str, float] = field(default_factory=dict)  # by phase
    bad: dict[str, int] = field(default_factory=dict)  # documents left out, by reason
    error: str = ""
    exit_code: int = 0

    @property
    def name(self) -> str:
        return Path(self.prefix).name

    @property
    def is_url(self) -> bool:
        return is_url(self.source)

    @property
    def ended(self) -> bool:
        return self.state in ("done", "failed")

    @property
    def shown_source(self) -> str:
        """The source without what may be secret in a URL: of a query only a hash."""
        if not self.is_url:
            return self.source
        query = urlsplit(self.source).query
        return fetch.shown(self.source) + (f"?{hashlib.sha256(query.encode()).hexdigest()[:8]}" if query else "")

    @property
    def download_path(self) -> Path:
        """Where a URL's file goes, by host, path and query."""
        parts = urlsplit(self.shown_source)
        *folders, name = [part for part in unquote(parts.path).split("/") if part not in ("", ".", "..")]
        name = f"{parts.query}-{name}" if parts.query else name
        return Path(self.download_folder).joinpath(parts.netloc.replace(":", "_"), *folders, name)

    def save(self) -> None:
        """Write the record."""
        if self.folder:
            with atomic_file(Path(self.folder, RECORD)) as file:
                os.fchmod(file.fileno(), 0o600)  # a URL may hold a password
                json.dump(asdict(self), file, indent=2)

    def refresh(self) -> None:
        """Take over what the process that makes this shard has saved; the state only if it has ended."""
        saved = Shard.load(Path(self.folder))
        own = {"state": saved.state if saved.ended else self.state, "job_id": self.job_id, "folder": self.folder}
        vars(self).update({**asdict(saved), **own})
        if self.phase == "downloading" and self.is_url:
            self.done_bytes = fetch.received_bytes(self.download_path)

    def enter(self, phase: str) -> None:
        """Begin a phase, and note how long the last one took."""
        now = time.time()
        if self.phase_began:
            self.seconds[self.phase] = round(now - self.phase_began, 3)
        self.phase, self.phase_began, self.saved_at = phase, now, 0.0
        self.advance(0, None)

    def advance(self, done_bytes: int, total_bytes: int | None) -> None:
        """Note how far the phase is, and save it now and then."""
        self.done_bytes, self.total_bytes = done_bytes, total_bytes
        if (now := time.time()) - self.saved_at > _SAVE_EVERY_S:
            self.saved_at = now
            with contextlib.suppress(OSError):  # on a full disk the work itself fails
                self.save()

    @staticmethod
    def load(folder: Path) -> Shard:
        """Read a record."""
        return Shard(**json.loads((folder / RECORD).read_bytes()))

    def inputs(self, tokenizer_sha256: str) -> dict[str, Any]:
        """Return what decides the dataset's bytes; of a file only its name, since a stage folder may be moved."""
        inputs: dict[str, Any] = {"source": self.shown_source if self.is_url else Path(self.source).name}
        if not self.is_url and os.path.exists(self.source):
            status = os.stat(self.source)
            inputs |= {"source_bytes": status.st_size, "source_mtime_ns": status.st_mtime_ns}
        return inputs | {
            "text_key": self.text_key,
            "append_eod": self.append_eod,
            "tokenizer_sha256": tokenizer_sha256,
        }


def is_url(source: str) -> bool:
    """Return whether a source is downloaded; a file is used in place."""
    return urlsplit(source).scheme in ("http", "https")


def find(shard: Shard, tokenizer_sha256: str) -> str:
    """Look for the dataset and take its numbers over; return why it has to be made, or "" if it exists.

    Raises:
        BenchError: the dataset was made from other inputs, or the files are not ours and no dataset.
    """
    prefix = Path(shard.prefix)
    manifest = read_manifest(prefix)
    if manifest is None:
        if not (bin_path(prefix).exists() or idx_path(prefix).exists()):
            return "there is none yet"
        try:
            info = inspect(prefix)
        except BenchError as error:
            raise BenchError(
                f"{error}\nThis program did not make it and leaves it alone: move it away, or overwrite=true"
            ) from None
        shard.state, shard.origin, shard.documents, shard.tokens = "done", "foreign", info.documents, info.tokens
        return ""
    if not (bin_path(prefix).exists() and idx_path(prefix).exists()):
        return "an earlier attempt did not finish"
    if differences := _differences(manifest, shard, tokenizer_sha256):
        raise BenchError(
            f"{prefix} was made from something else ({'; '.join(differences)}).\n"
            "overwrite=true makes it again; output_prefix=... or stage_path=... makes another one"
        )
    if problem := damage(prefix, manifest):
        return problem
    shard.state, shard.origin, shard.bad = "done", "found", manifest["bad"]
    shard.documents, shard.tokens = manifest["documents"], manifest["tokens"]
    return ""


def _differences(manifest: dict[str, Any], shard: Shard, tokenizer_sha256: str) -> list[str]:
    """Return how the described dataset differs from what `shard` would make, as clauses."""
    then, now = manifest["inputs"], shard.inputs(tokenizer_sha256)
    # A source file that no longer exists is not another one, and has no size or date to compare.
    keys = [key for key in now if then.get(key) != now[key]]
    if keys == ["source_mtime_ns"] and sha256_of(Path(shard.source)) == manifest["source"]["sha256"]:
        return []
    return [f"{key}: {then.get(key)} then, {now[key]} now" for key in keys]


# --- making one -------------------------------------------------------------------------------------------------------


def prepare(shard: Shard, report: Callable[[str], None]) -> None:
    """Make the dataset of `shard`, or find it made. Of two processes at once, one makes it and the other waits.

    Raises:
        BenchError: nothing was put in place; downloads stay, and the next attempt continues from them.
    """
    prefix = Path(shard.prefix)
    encoder = Encoder(Path(shard.tokenizer_folder), backend=Backend[shard.encoder], report=report)
    remedy = (
        f"{shard.name} was not made, and nothing half-made is left. A shard needs about as much as its uncompressed "
        "text, besides the download: free it, and run the same command again"
    )
    with explained_disk_errors(prefix.parent, remedy):
        prefix.parent.mkdir(parents=True, exist_ok=True)
        with locked(prefix.with_name(f".{shard.name}.lock"), f"makes {shard.name}", report):
            if not shard.overwrite:
                reason = find(shard, encoder.fingerprint)
                if not reason:
                    return
                if reason != "there is none yet":
                    report(f"made again: {reason}")
            with hidden_folder(prefix) as folder:
                _make(shard, encoder, folder / shard.name, report)


def _make(shard: Shard, encoder: Encoder, building: Path, report: Callable[[str], None]) -> None:
    """Make the dataset `building`, verify it and move it into place."""
    shard.enter("downloading")
    source, source_sha256 = _download(shard, report)
    shard.enter("tokenising")
    reader = Reader(source, shard.text_key)

    def progress(counts: Counts) -> None:
        shard.documents, shard.tokens, shard.text_bytes = counts.documents, counts.tokens, counts.text_bytes
        shard.advance(reader.bytes_read, reader.size_bytes)

    counts = tokenize(
        reader,
        encoder,
        building,
        threads=shard.threads or min(MAX_THREADS, usable_cores()),
        append_eod=shard.append_eod,
        max_bad_share=shard.max_bad_share,
        progress=progress,
    )
    shard.enter("verifying")
    products = _read_back(building, encoder, counts)
    origin = {"size_bytes": reader.size_bytes, "sha256": source_sha256 or sha256_of(source)}
    shard.enter("finishing")
    if counts.bad:
        report(f"{source}: {counts.bad.total():,} bad documents were left out:{counts.listed()}")
    manifest = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "inputs": shard.inputs(encoder.fingerprint),
        "source": origin,
        "documents": counts.documents,
        "tokens": counts.tokens,
        "vocab_size": encoder.vocab_size,
        "bad": dict(counts.bad),
        "bad_examples": counts.examples,
        "products": products,
        "seconds": shard.seconds,
        "made_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "encoder": encoder.backend.value,
    }
    _move_into_place(building, Path(shard.prefix), manifest)
    if shard.is_url and not shard.keep_download:
        source.unlink(missing_ok=True)
    shard.origin, shard.bad = "made", dict(counts.bad)


def _download(shard: Shard, report: Callable[[str], None]) -> tuple[Path, str]:
    """Return the file to read, and its SHA-256 if it was downloaded."""
    if not shard.is_url:
        return Path(shard.source), ""
    url, fragment = urldefrag(shard.source)
    expected = fragment.removeprefix("sha256=") if fragment.startswith("sha256=") else None

    def announce(size_bytes: int | None) -> None:
        shard.advance(0, size_bytes)

    return shard.download_path, fetch.fetch(url, shard.download_path, sha256=expected, announce=announce, report=report)


def _read_back(building: Path, encoder: Encoder, counts: Counts) -> dict[str, Any]:
    """Read everything that was written from the files again; return their sizes and SHA-256."""
    info = inspect(building, vocab_size=encoder.vocab_size, read_tokens=True)
    if (info.documents, info.tokens) != (counts.documents, counts.tokens):
        raise BenchError(
            f"{building} reads back as {info.documents:,} documents and {info.tokens:,} tokens, but "
            f"{counts.documents:,} and {counts.tokens:,} were written: the disk or its driver loses data"
        )
    paths = (bin_path(building), idx_path(building))
    return {path.suffix: {"size_bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in paths}


def _move_into_place(building: Path, prefix: Path, manifest: dict[str, Any]) -> None:
    """Give the verified files their names: the description first, the index last."""
    idx_path(prefix).unlink(missing_ok=True)
    write_json(manifest_path(prefix), manifest)
    os.replace(bin_path(building), bin_path(prefix))
    os.replace(idx_path(building), idx_path(prefix))
    fsync(prefix.parent)


def main(folder: Path) -> int:
    """Make the shard whose record is in `folder`; return the exit code of a command."""
    from nemo_bench.cluster import lifeline
    from nemo_bench.cluster.processes import Terminated, termination_raises

    # Threads that release the interpreter lock thousands of times a second wait less for it.
    sys.setswitchinterval(0.0005)
    shard = Shard.load(folder)

    def report(line: str) -> None:
        print(line, flush=True)
        shard.note, shard.saved_at = line, 0.0
        shard.advance(shard.done_bytes, shard.total_bytes)

    def remove_half_made() -> None:
        if shard.phase_began:  # else the folder is another process's, for which this one waits
            shutil.rmtree(hidden_path(Path(shard.prefix)), ignore_errors=True)

    lifeline.watch(remove_half_made)
    try:
        with termination_raises():
            prepare(shard, report)
        shard.state = "done"
        shard.save()
    except Terminated as ended:
        return 128 + ended.signum
    except (BenchError, OSError) as error:
        shard.state, shard.error = "failed", str(error)
        shard.exit_code = error.exit_code if isinstance(error, BenchError) else 2
        with contextlib.suppress(OSError):
            shard.save()
        print(error, file=sys.stderr, flush=True)
        return shard.exit_code
    print(f"{shard.origin}: {shard.prefix}: {shard.documents:,} documents, {shard.tokens:,} tokens", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
