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
import json
import os
import secrets
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from nemo_bench.data.documents import FORMATS, Reader, format_of
from nemo_bench.data.encoder import Backend, Encoder
from nemo_bench.data.indexed_dataset import DatasetInfo, bin_path, idx_path, inspect, optimal_dtype
from nemo_bench.data.tokenization import Counts, tokenize
from nemo_bench.errors import BenchError
from nemo_bench.files import fsync_folder, locked, sha256_of
from nemo_bench.results.record import write_atomically, write_json

TASK, PROGRESS, RESULT, ERROR = "task.json", "progress.json", "result.json", "error.json"
FORMAT, FORMAT_VERSION = "nemo-bench dataset", 1
_PROGRESS_S = 0.5
NONE_YET = "there is none yet"


@dataclass(frozen=True)
class ShardTask:
    """What is to be made.

    Attributes:
        source: URL, or absolute path of a file.
        prefix: absolute path of the dataset, without suffix.
        tokenizer_folder: Hugging Face folder.
        text_key: JSON key or Parquet column of the text.
        download_folder: where a URL's file goes; kept afterwards with `keep_download`.
        threads: that decode and encode.
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
    threads: int
    overwrite: bool

    @property
    def name(self) -> str:
        return Path(self.prefix).name

    @property
    def is_url(self) -> bool:
        return is_url(self.source)


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
    """The description of the dataset `prefix`, or None where there is none of ours."""
    try:
        manifest = json.loads(manifest_path(prefix).read_bytes())
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and manifest.get("format") == FORMAT else None


def found(prefix: Path, inputs: dict[str, Any] | None) -> ShardResult | str:
    """The complete dataset at `prefix`, or why there is none.

    Looks at the index and at sizes, in milliseconds; `verify` reads everything.

    Args:
        inputs: what it must have been made from; None: whatever it was made from.

    Raises:
        BenchError: there is one made from other inputs, or files that are not ours and no dataset.
    """
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
        return ShardResult(str(prefix), "foreign", info.documents, info.tokens, None, {}, {})
    if len(there) < 2:
        return "an earlier attempt was not finished"
    if inputs is not None and manifest["inputs"] != inputs:
        differing = [key for key in inputs if manifest["inputs"].get(key) != inputs[key]]
        told = "; ".join(f"{key}: {manifest['inputs'].get(key)} then, {inputs[key]} now" for key in differing)
        raise BenchError(
            f"{prefix} was made from something else ({told or 'by another version of this program'}).\n"
            "overwrite=true makes it anew; output_prefix=... or stage_path=... makes another beside it"
        )
    for path in there:
        expected = manifest["products"][path.suffix]["size_bytes"]
        if path.stat().st_size != expected:
            return f"{path.name} has {path.stat().st_size:,} bytes instead of {expected:,}"
    return ShardResult(str(prefix), "found", manifest["documents"], manifest["tokens"], None, {}, manifest["bad"])


def verify(prefix: Path) -> DatasetInfo:
    """Reads the whole dataset back and holds it against its description.

    Raises:
        BenchError: missing, damaged or changed.
    """
    manifest = read_manifest(prefix)
    if manifest is None:
        return inspect(prefix, read_tokens=True)
    info = inspect(prefix, vocab_size=manifest["vocab_size"], read_tokens=True)
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
    inputs = task_inputs(task, encoder.fingerprint)
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        with locked(prefix.parent / f".{prefix.name}.lock", f"makes {prefix.name}", report):
            _remove_leftovers(prefix)
            if not task.overwrite:
                result = found(prefix, inputs)
                if isinstance(result, ShardResult):
                    return result
                if result != NONE_YET:
                    report(f"made anew: {result}")
            return _make(task, encoder, inputs, progress, report)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BenchError(
                f"No space left in {prefix.parent} for {prefix.name} ({error.strerror}); nothing half-made was left. A "
                "shard needs about as much as its uncompressed text, besides the download: free it, and run this again"
            ) from None
        raise BenchError(f"Cannot make {prefix}: {error}. Check that the folder can be written.") from None


def task_inputs(task: ShardTask, tokenizer_sha256: str) -> dict[str, Any]:
    """What decides the dataset's bytes; a local file by its name and size, since a stage folder may be moved."""
    source: dict[str, Any] = {"source": task.source}
    if not task.is_url:
        path = Path(task.source)
        source = {"source": path.name, "source_bytes": path.stat().st_size if path.exists() else None}
    return {**source, "text_key": task.text_key, "append_eod": task.append_eod, "tokenizer_sha256": tokenizer_sha256}


def _make(
    task: ShardTask, encoder: Encoder, inputs: dict[str, Any], progress: Progress, report: Callable[[str], None]
) -> ShardResult:
    prefix = Path(task.prefix)
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
            threads=task.threads,
            append_eod=task.append_eod,
            max_bad_share=task.max_bad_share,
            progress=tokenized,
        )
        lap("tokenise")
        progress("verifying", 0, None, documents=counts.documents, tokens=counts.tokens)
        info, products = _read_back(building, encoder, counts)
        lap("verify")
        if counts.bad_documents:
            report(f"{source}: {counts.bad_documents:,} bad documents left out, {dict(counts.bad)}; the first:")
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
            "products": products,
            "seconds": seconds,
            "threads": task.threads,
            "made_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "made_with": {"encoder": encoder.backend.value, **_versions()},
        }
        _publish(building, prefix, manifest)
    finally:
        for path in (bin_path(building), idx_path(building)):
            path.unlink(missing_ok=True)
    if task.is_url and not task.keep_download:
        # Only now: all that was made from it is verified and in place.
        _forget_download(source)
    return ShardResult(str(prefix), "made", info.documents, info.tokens, counts.text_bytes, seconds, dict(counts.bad))


def _fetch(task: ShardTask, progress: Progress, report: Callable[[str], None]) -> tuple[Path, dict[str, Any]]:
    """The file to read, and where it comes from."""
    if not task.is_url:
        path = Path(task.source)
        if not path.is_file():
            raise BenchError(f"{path} is not there: correct sources=[...], files or URLs of {', '.join(FORMATS)}")
        return path, {"path": task.source, "size_bytes": path.stat().st_size}
    from nemo_bench.data.download import download

    folder = Path(task.download_folder)
    folder.mkdir(parents=True, exist_ok=True)
    done = download(
        task.source,
        folder / download_name(task.source),
        token=_token_for(task.source),
        progress=lambda done_bytes, total_bytes: progress("downloading", done_bytes, total_bytes),
        report=report,
    )
    return done.path, {"url": task.source, "size_bytes": done.size_bytes, "sha256": done.sha256}


def _token_for(url: str) -> str | None:
    """The Hugging Face token for that host's URLs; nobody else's business."""
    from nemo_bench.data.download import default_token

    hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    return default_token() if urlsplit(url)[:2] == urlsplit(hub)[:2] else None


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
    write_atomically(manifest_path(prefix), json.dumps(manifest, indent=2) + "\n")
    os.replace(bin_path(building), bin_path(prefix))
    os.replace(idx_path(building), idx_path(prefix))
    fsync_folder(prefix.parent)


def _remove_leftovers(prefix: Path) -> None:
    """Removes what killed attempts left. The lock must be held."""
    for dots in (".", ".."):  # the writer puts a dot of its own before a file that it is writing
        for path in prefix.parent.glob(f"{dots}{glob.escape(prefix.name)}.building-*"):
            path.unlink(missing_ok=True)


def _forget_download(path: Path) -> None:
    path.unlink(missing_ok=True)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*"):
        if not leftover.name.endswith(".lock"):
            leftover.unlink(missing_ok=True)


def _versions() -> dict[str, str]:
    names = ("nemo-bench", "tokenizers", "gigatoken", "orjson", "zstandard")
    versions = {"python": sys.version.split()[0]}
    for name in names:
        with contextlib.suppress(ImportError):
            versions[name] = version(name)
    return versions


def main(folder: Path) -> int:
    """Does the task in `folder`; the exit code is that of a command."""
    from nemo_bench.launch import lifeline

    lifeline.watch(lambda: None)
    # Threads that release the interpreter lock thousands of times a second wait less for it.
    sys.setswitchinterval(0.0005)
    (folder / ERROR).unlink(missing_ok=True)
    progress = Progress(folder)
    progress("starting")
    try:
        task = ShardTask(**json.loads((folder / TASK).read_bytes()))
        result = prepare(task, progress, lambda line: print(line, flush=True))
    except BenchError as error:
        with contextlib.suppress(OSError):
            write_json(folder / ERROR, {"message": str(error), "exit_code": error.exit_code})
        print(error, file=sys.stderr, flush=True)
        return error.exit_code
    write_json(folder / RESULT, asdict(result))
    progress("done")
    print(f"{result.state}: {result.prefix}: {result.documents:,} documents, {result.tokens:,} tokens", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
