"""One shard from its source to a verified Megatron dataset: download, tokenise, read back, put in place.

`python -m nemo_bench.data.shard FOLDER` does what FOLDER/task.json says. It is a process of its own, on this machine or
in a Slurm job, and leaves its progress and its result in the folder. Beside the dataset `<prefix>.bin` and `.idx` it
leaves `<prefix>.json`, which says what they were made from. That comes first, the index last: an index with its
description means a complete dataset, at whatever moment the process was killed.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urlsplit

from nemo_bench.data.documents import FORMATS, Reader, format_of
from nemo_bench.data.encoder import Backend, Encoder
from nemo_bench.data.indexed_dataset import DatasetInfo, bin_path, idx_path, inspect, optimal_dtype
from nemo_bench.data.tokenization import MAX_THREADS, Counts, tokenize, usable_cores
from nemo_bench.errors import BenchError
from nemo_bench.files import fsync_folder, locked, sha256_of, write_json, write_text

TASK, PROGRESS, RESULT, ERROR = "task.json", "progress.json", "result.json", "error.json"
FORMAT, FORMAT_VERSION = "nemo-bench dataset", 1
_KEYS = {"inputs", "source", "documents", "tokens", "vocab_size", "bad", "truncated", "products", "made_at"}
_PROGRESS_S = 0.5
NONE_YET = "there is none yet"


@dataclass(frozen=True)
class ShardTask:
    """What is to be made.

    Attributes:
        source: URL, or absolute path of a file; a URL may end in "#sha256=..." of the file.
        prefix: absolute path of the dataset, without suffix.
        tokenizer_folder: Hugging Face folder.
        text_key: JSON key or Parquet column of the text.
        download_folder: where a URL's file goes; kept afterwards with `keep_download`.
        threads: that decode and encode; None: as many as the machine that does it has use for.
        overwrite: make it anew, whatever is there.
    """

    source: str
    prefix: str
    tokenizer_folder: str
    text_key: str
    append_eod: bool
    encoder: str
    max_bad_share: float
    download_folder: str
    keep_download: bool
    threads: int | None
    overwrite: bool

    @property
    def name(self) -> str:
        return Path(self.prefix).name

    @property
    def is_url(self) -> bool:
        return is_url(self.source)

    @property
    def shown(self) -> str:
        """The source without what may be a secret in a URL: user name, password and query."""
        if not self.is_url:
            return self.source
        parts = urlsplit(self.source)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"

    @property
    def download_path(self) -> Path:
        """Where a URL's file goes: a place of its own for each URL, by host and path."""
        parts = urlsplit(self.source)
        folders = [part for part in unquote(parts.path).split("/") if part not in ("", ".", "..")]
        name = folders.pop()
        if parts.query:
            name = f"{hashlib.sha256(parts.query.encode()).hexdigest()[:8]}-{name}"
        return Path(self.download_folder).joinpath(parts.netloc.rpartition("@")[2].replace(":", "_"), *folders, name)


@dataclass(frozen=True)
class ShardResult:
    """A dataset that is there and was verified.

    Attributes:
        state: made, found (made before), or foreign (there before, and not made by this program).
        documents, tokens: of the dataset.
        text_bytes: UTF-8 bytes that were encoded; None where it was not made now.
        seconds: taken, by phase.
        bad: documents left out, by reason.
    """

    prefix: str
    state: str
    documents: int
    tokens: int
    text_bytes: int | None
    seconds: dict[str, float]
    bad: dict[str, int]


def is_url(source: str) -> bool:
    """Whether a source is downloaded; a path of a file is used in place."""
    return urlsplit(source).scheme in ("http", "https")


def manifest_path(prefix: Path) -> Path:
    """The description beside a dataset."""
    return Path(f"{prefix}.json")


def read_manifest(prefix: Path) -> dict[str, Any] | None:
    """The description of the dataset `prefix`, or None where there is none.

    Raises:
        BenchError: it cannot be read, or is not one.
    """
    path = manifest_path(prefix)
    try:
        manifest = json.loads(path.read_bytes())
        if (manifest["format"], manifest["version"]) == (FORMAT, FORMAT_VERSION) and manifest.keys() >= _KEYS:
            assert isinstance(manifest, dict)
            return manifest
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise BenchError(f"{path} is not a description of a dataset, or is damaged: overwrite=true makes both anew")


def found(task: ShardTask, tokenizer_sha256: str) -> ShardResult | str:
    """The complete dataset of `task`, or why there is none.

    Looks at the index and at sizes, in milliseconds; `verify` reads everything.

    Raises:
        BenchError: there is one made from other inputs, or files that are not ours and no dataset.
    """
    prefix = Path(task.prefix)
    manifest = read_manifest(prefix)
    there = [path for path in (bin_path(prefix), idx_path(prefix)) if path.exists()]
    if manifest is None:
        if not there:
            return NONE_YET
        try:
            info = inspect(prefix)
        except BenchError as error:
            raise BenchError(
                f"{error}\nIt was not made by this program, and is left alone: move it away, or overwrite=true"
            ) from None
        return ShardResult(task.prefix, "foreign", info.documents, info.tokens, None, {}, {})
    if len(there) < 2:
        return "an earlier attempt was not finished"
    if told := _differences(manifest, task, tokenizer_sha256):
        raise BenchError(
            f"{prefix} was made from something else ({'; '.join(told)}).\n"
            "overwrite=true makes it anew; output_prefix=... or stage_path=... makes another beside it"
        )
    for path in there:
        expected = manifest["products"][path.suffix]["size_bytes"]
        if path.stat().st_size != expected:
            return f"{path.name} has {path.stat().st_size:,} bytes instead of {expected:,}"
    return ShardResult(task.prefix, "found", manifest["documents"], manifest["tokens"], None, {}, manifest["bad"])


def task_inputs(task: ShardTask, tokenizer_sha256: str) -> dict[str, Any]:
    """What decides the dataset's bytes; a local file without its folder, since a stage folder may be moved."""
    if task.is_url:
        query = urlsplit(task.source).query
        source: dict[str, Any] = {"source": task.shown}
        if query:
            source["query_sha256"] = hashlib.sha256(query.encode()).hexdigest()
    else:
        path = Path(task.source)
        source = {"source": path.name}
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            status = path.stat()
            source |= {"source_bytes": status.st_size, "source_mtime_ns": status.st_mtime_ns}
    return {**source, "text_key": task.text_key, "append_eod": task.append_eod, "tokenizer_sha256": tokenizer_sha256}


def _differences(manifest: dict[str, Any], task: ShardTask, tokenizer_sha256: str) -> list[str]:
    """In what the dataset's description differs from what `task` would make, as clauses."""
    made, wanted = manifest["inputs"], task_inputs(task, tokenizer_sha256)
    # A source that is no longer there is no other one: it was deleted once the dataset was made.
    keys = [key for key in wanted if made.get(key) != wanted[key]]
    if keys == ["source_mtime_ns"] and sha256_of(Path(task.source)) == manifest["source"].get("sha256"):
        keys = []
    told = [f"{key}: {made.get(key)} then, {wanted[key]} now" for key in keys]
    bad = sum(manifest["bad"].values())
    if bad / max(bad + manifest["documents"], 1) > task.max_bad_share:
        told.append(f"{bad:,} bad documents were left out, more than max_bad_share={task.max_bad_share:g}")
    if manifest["truncated"] and task.max_bad_share < 1:
        told.append("its source was truncated")
    return told


def verify(prefix: Path, vocab_size: int | None) -> DatasetInfo:
    """Reads the whole dataset back and holds it against its description, or a foreign one against the vocabulary.

    Raises:
        BenchError: missing, damaged or changed.
    """
    manifest = read_manifest(prefix)
    info = inspect(prefix, vocab_size=manifest["vocab_size"] if manifest else vocab_size, read_tokens=True)
    if manifest is not None:
        for path in (bin_path(prefix), idx_path(prefix)):
            if sha256_of(path) != manifest["products"][path.suffix]["sha256"]:
                raise BenchError(f"{path} has changed since it was made: overwrite=true makes it anew.")
    return info


class Progress:
    """Leaves the shard's progress in a file, now and then."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.phase = "starting"
        self.written = 0.0

    def __call__(self, phase: str, done_bytes: int = 0, total_bytes: int | None = None, **more: Any) -> None:
        """Bytes are those of the source, stored: a compressed file's."""
        now = time.time()
        if self.folder is None or (phase == self.phase and now - self.written < _PROGRESS_S):
            return
        self.phase, self.written = phase, now
        row = {"phase": phase, "done_bytes": done_bytes, "total_bytes": total_bytes, "time": now, **more}
        with contextlib.suppress(OSError):  # on a full disk the work itself says so
            temporary = self.folder / f".{PROGRESS}"
            temporary.write_text(json.dumps(row))
            os.replace(temporary, self.folder / PROGRESS)


def prepare(task: ShardTask, progress: Progress, report: Callable[[str], None]) -> ShardResult:
    """Makes the dataset of `task`, or finds it made. Two at once on the same: one makes it, the other waits.

    Raises:
        BenchError: nothing was put in place; what is downloaded stays, and the next attempt goes on from it.
    """
    prefix = Path(task.prefix)
    encoder = Encoder(Path(task.tokenizer_folder), backend=Backend[task.encoder], report=report)
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        with locked(prefix.parent / f".{prefix.name}.lock", f"makes {prefix.name}", report):
            _remove_leftovers(prefix)
            if not task.overwrite:
                result = found(task, encoder.fingerprint)
                if isinstance(result, ShardResult):
                    return result
                if result != NONE_YET:
                    report(f"made anew: {result}")
            return _make(task, encoder, progress, report)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BenchError(
                f"No space left in {prefix.parent} for {prefix.name} ({error.strerror}); nothing half-made was left. A "
                "shard needs about as much as its uncompressed text, besides the download: free it, and run this again"
            ) from None
        raise BenchError(f"Cannot make {prefix}: {error}. Check that the folder can be written.") from None


def _make(task: ShardTask, encoder: Encoder, progress: Progress, report: Callable[[str], None]) -> ShardResult:
    prefix = Path(task.prefix)
    threads = task.threads or min(MAX_THREADS, usable_cores())
    seconds: dict[str, float] = {}
    started = time.monotonic()

    def lap(phase: str) -> None:
        nonlocal started
        seconds[phase] = round(time.monotonic() - started, 3)
        started = time.monotonic()

    source, origin = _fetch(task, progress, report)
    lap("download")
    building = prefix.parent / f".{prefix.name}.building-{os.getpid()}-{secrets.token_hex(4)}"
    reader = Reader(source, task.text_key)

    def tokenized(counts: Counts) -> None:
        more = {"documents": counts.documents, "tokens": counts.tokens, "text_bytes": counts.text_bytes}
        progress("tokenising", reader.bytes_read, reader.size_bytes, **more)

    progress("tokenising", 0, reader.size_bytes)
    try:
        counts = tokenize(
            reader,
            encoder,
            building,
            threads=threads,
            append_eod=task.append_eod,
            max_bad_share=task.max_bad_share,
            progress=tokenized,
        )
        lap("tokenise")
        progress("verifying", 0, None, documents=counts.documents, tokens=counts.tokens)
        inputs = task_inputs(task, encoder.fingerprint)
        info, products = _read_back(building, encoder, counts)
        if "sha256" not in origin:
            origin["sha256"] = sha256_of(source)
        lap("verify")
        if counts.bad_documents:
            reasons = ", ".join(f"{number:,} x {reason}" for reason, number in counts.bad.most_common())
            report(f"{source}: {counts.bad_documents:,} bad documents left out: {reasons}; the first:")
            for example in counts.examples:
                report(f"  {example}")
        manifest = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "inputs": inputs,
            "source": origin,
            "documents": info.documents,
            "tokens": info.tokens,
            "max_token_id": info.max_token_id,
            "vocab_size": encoder.vocab_size,
            "dtype": info.dtype,
            "eod": encoder.eod if task.append_eod else None,
            "text_bytes": counts.text_bytes,
            "bad": dict(counts.bad),
            "bad_examples": counts.examples,
            "truncated": counts.truncated,
            "products": products,
            "seconds": seconds,
            "threads": threads,
            "made_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "made_with": {"encoder": encoder.backend.value, **_versions()},
        }
        _publish(building, prefix, manifest)
    finally:
        for path in (bin_path(building), idx_path(building)):
            path.unlink(missing_ok=True)
    if task.is_url and not task.keep_download:
        # Only now: all that was made from it is verified and in place.
        source.unlink(missing_ok=True)
    return ShardResult(str(prefix), "made", info.documents, info.tokens, counts.text_bytes, seconds, dict(counts.bad))


def _fetch(task: ShardTask, progress: Progress, report: Callable[[str], None]) -> tuple[Path, dict[str, Any]]:
    """The file to read, and where it comes from."""
    if not task.is_url:
        path = Path(task.source)
        if not path.is_file():
            raise BenchError(f"{path} is not there: correct sources=[...], files or URLs of {', '.join(FORMATS)}")
        return path, {"path": task.source, "size_bytes": path.stat().st_size}
    from nemo_bench.data.fetch import fetch

    url, fragment = urldefrag(task.source)
    progress("downloading")
    sha256 = fetch(
        url,
        task.download_path,
        sha256=fragment.removeprefix("sha256=") if fragment.startswith("sha256=") else None,
        progress=lambda done_bytes, total_bytes: progress("downloading", done_bytes, total_bytes),
        report=report,
    )
    path = task.download_path
    return path, {"url": task.shown, "size_bytes": path.stat().st_size, "sha256": sha256}


def download_name(url: str) -> str:
    """The file name of a URL, which says its format.

    Raises:
        BenchError: it names no known format.
    """
    name = os.path.basename(urlsplit(url).path)
    format_of(name)
    return name


def _read_back(building: Path, encoder: Encoder, counts: Counts) -> tuple[DatasetInfo, dict[str, Any]]:
    """Everything that was written, read again from the files; sizes and SHA-256 for the description."""
    paths = (bin_path(building), idx_path(building))
    with ThreadPoolExecutor(2) as pool:
        digests = [pool.submit(sha256_of, path) for path in paths]
        info = inspect(building, vocab_size=encoder.vocab_size, read_tokens=True)
        products = {
            path.suffix: {"size_bytes": path.stat().st_size, "sha256": digest.result()}
            for path, digest in zip(paths, digests)
        }
    written = (counts.documents, counts.tokens, optimal_dtype(encoder.vocab_size))
    if (info.documents, info.tokens, info.dtype) != written:
        raise BenchError(
            f"read back, {building} has {info.documents:,} documents and {info.tokens:,} {info.dtype} tokens, and "
            f"{written} were written: the disk or its driver loses data. Choose another disk."
        )
    return info, products


def _publish(building: Path, prefix: Path, manifest: dict[str, Any]) -> None:
    """Gives the verified files their names: the description first and the index last."""
    idx_path(prefix).unlink(missing_ok=True)
    write_text(manifest_path(prefix), json.dumps(manifest, indent=2) + "\n")
    os.replace(bin_path(building), bin_path(prefix))
    os.replace(idx_path(building), idx_path(prefix))
    fsync_folder(prefix.parent)


def _remove_leftovers(prefix: Path, process: str = "*") -> None:
    """Removes what killed attempts left; of all processes only with the lock held."""
    for dots in (".", ".."):  # the writer puts a dot of its own before a file that it is writing
        for path in prefix.parent.glob(f"{dots}{glob.escape(prefix.name)}.building-{process}-*"):
            path.unlink(missing_ok=True)


def _versions() -> dict[str, str]:
    names = ("nemo-bench", "tokenizers", "gigatoken", "orjson", "backports.zstd")
    versions = {"python": sys.version.split()[0]}
    for name in names:
        with contextlib.suppress(ImportError):
            versions[name] = version(name)
    return versions


class _Ended(BaseException):
    """SIGTERM: what is half-made is removed on the way out."""


def _end(signum: int, frame: object) -> None:
    raise _Ended(signum)


def main(folder: Path) -> int:
    """Does the task in `folder`; the exit code is that of a command."""
    from nemo_bench.cluster import lifeline

    # Threads that release the interpreter lock thousands of times a second wait less for it.
    sys.setswitchinterval(0.0005)
    (folder / ERROR).unlink(missing_ok=True)
    progress = Progress(folder)
    progress("starting")
    task = ShardTask(**json.loads((folder / TASK).read_bytes()))
    signal.signal(signal.SIGTERM, _end)
    lifeline.watch(lambda: _remove_leftovers(Path(task.prefix), str(os.getpid())))
    try:
        result = prepare(task, progress, lambda line: print(line, flush=True))
        write_json(folder / RESULT, asdict(result))
    except _Ended:
        return 128 + signal.SIGTERM
    except (BenchError, OSError) as error:
        code = error.exit_code if isinstance(error, BenchError) else 2
        with contextlib.suppress(OSError):
            write_json(folder / ERROR, {"message": str(error), "exit_code": code})
        print(error, file=sys.stderr, flush=True)
        return code
    progress("done")
    print(f"{result.state}: {result.prefix}: {result.documents:,} documents, {result.tokens:,} tokens", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
