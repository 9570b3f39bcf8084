"""The local dataset: a tokenizer and a Megatron dataset made from text that this machine already has.

`prepare_local` makes this folder, or finds it made:

    <folder>/dataset.json                        what it was made from; sizes and SHA-256 of the rest
    <folder>/my-llama_00_text_document.bin/.idx  Megatron's indexed dataset, one document per source file
    <folder>/tokenizer/                          a Hugging Face tokenizer folder

A folder is built beside its place and renamed into it, so one that exists is complete. Beside it stay a lock
file, `.<folder>.lock`, and after a kill a hidden folder which the next call removes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import platform
import secrets
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_bench.data import corpus, tokenizer
from nemo_bench.data.corpus import CorpusFile
from nemo_bench.data.documents import Reader
from nemo_bench.data.encoder import Encoder
from nemo_bench.data.indexed_dataset import optimal_dtype
from nemo_bench.data.tokenization import tokenize, usable_cores
from nemo_bench.errors import BenchError
from nemo_bench.files import fsync_folder, locked

_log = logging.getLogger(__name__)

#: The recipe's name for the first shard of its training data.
DATASET_NAME = "my-llama_00_text_document"
MANIFEST_NAME = "dataset.json"
TOKENIZER_NAME = "tokenizer"

_FORMAT = "nemo-bench local dataset"
_NOT_OURS = f"{MANIFEST_NAME} is not of a local dataset"
_FORMAT_VERSION = 1  # raise it when the same inputs would give other products

_PRODUCTS = (
    f"{DATASET_NAME}.bin",
    f"{DATASET_NAME}.idx",
    f"{TOKENIZER_NAME}/tokenizer.json",
    f"{TOKENIZER_NAME}/tokenizer_config.json",
    f"{TOKENIZER_NAME}/special_tokens_map.json",
)
# All that may lie in the folder for it to be ours to replace. Megatron puts its sample indices in a folder of
# the prefix's name. They are keyed by path and not by contents, so they have to go with the data that they
# index.
_OWN_NAMES = frozenset({MANIFEST_NAME, TOKENIZER_NAME, DATASET_NAME, f"{DATASET_NAME}.bin", f"{DATASET_NAME}.idx"})


@dataclass(frozen=True)
class PreparedDataset:
    """A local dataset on disk, complete and verified.

    Attributes:
        prefixes: absolute paths of the datasets, each without its .bin/.idx suffix.
        tokenizer_dir: absolute path of the Hugging Face tokenizer folder.
        vocab_size: number of tokens of the tokenizer, special ones included.
        documents: number of documents.
        tokens: number of tokens, the end-of-document tokens included.
        fingerprint: hexadecimal SHA-256 of the inputs.
        cached: whether it was found, rather than built by this call.
    """

    prefixes: tuple[Path, ...]
    tokenizer_dir: Path
    vocab_size: int
    documents: int
    tokens: int
    fingerprint: str
    cached: bool


def check_local(folder: Path, *, vocab_size: int, corpus_bytes: int) -> PreparedDataset:
    """The local dataset in `folder`, read in whole.

    Raises:
        BenchError: there is none made from these inputs, or it is damaged.
    """
    folder = Path(os.path.abspath(folder))
    found = _verify(Path(os.path.realpath(folder)), folder, _inputs(corpus.collect(corpus_bytes), vocab_size))
    if isinstance(found, str):
        raise BenchError(f"{folder}: {found}. `python prepare_data.py data=local` makes it.")
    return found


def prepare_local(
    folder: Path, *, vocab_size: int, corpus_bytes: int, report: Callable[[str], None] = _log.info
) -> PreparedDataset:
    """Make the local dataset in `folder`, or return the intact one of the same inputs that is there.

    Safe to call from several processes at once: one builds, the others wait for it. Killed at any moment it
    leaves either no folder or a complete one.

    Args:
        folder: where it goes; made with its parents. A dataset of other inputs or with damage is replaced.
        vocab_size: number of tokens of the tokenizer, special ones included; a small corpus may give fewer.
        corpus_bytes: about how many bytes of text to use.
        report: called with one line (no newline) for each thing a waiting user wants to know.

    Raises:
        BenchError: `folder` holds files that are not of a local dataset (they are left alone), it cannot be
            written or locked, the disk is full, the vocabulary is too small, or there is too little text.
    """
    tokenizer.check_vocab_size(vocab_size)
    files = corpus.collect(corpus_bytes)
    inputs = _inputs(files, vocab_size)
    folder = Path(os.path.abspath(folder))
    # The folder itself may be a link, over which a folder cannot be renamed. Only the work goes through the
    # real path: the paths handed out stay as given, since other machines may know only the link.
    target = Path(os.path.realpath(folder))
    try:
        # Looked at without the lock first: reading a dataset takes no right to write beside it.
        with contextlib.suppress(OSError):  # met again below, unless it came from another process's work
            found = _verify(target, folder, inputs)
            if isinstance(found, PreparedDataset):
                _remove_stale_if_idle(target)
                return found
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target, report):
            _remove_stale(target)
            found = _verify(target, folder, inputs)
            if isinstance(found, PreparedDataset):
                return found
            _refuse_foreign(target)
            if os.path.ismount(target):
                raise BenchError(
                    f"{folder} is a mount point, which cannot be replaced by a finished dataset: name a "
                    f"folder inside it, e.g. {folder / 'local'}."
                )
            report(f"Preparing the local dataset in {folder}: {found}.")
            manifest = _build(target, files, inputs, vocab_size, report)
            return _prepared(folder, manifest, cached=False)
    except OSError as error:
        raise _write_error(folder, error, files, vocab_size) from error


# --- inputs and manifest ------------------------------------------------------------------------------------


def _inputs(files: list[CorpusFile], vocab_size: int) -> dict[str, Any]:
    """Everything that decides what the products are, as JSON-ready values."""
    return {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "tokenizer": tokenizer.settings(vocab_size),
        "files": [{"name": file.name, "size": len(file.data), "sha256": file.sha256} for file in files],
    }


def _fingerprint(inputs: dict[str, Any]) -> str:
    """Hexadecimal SHA-256 of the inputs and of the format version."""
    text = json.dumps([_FORMAT_VERSION, inputs], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _difference(old: object, new: dict[str, Any]) -> str:
    """In what the inputs `old` of a manifest differ from `new`, as a clause."""
    if isinstance(old, dict):
        if old.get("python") != new["python"]:
            return f"it was made with {old.get('python')}, and this is {new['python']}"
        if old.get("tokenizer") != new["tokenizer"]:
            return "it was made with other tokenizer settings"
    return "it was made from other text"


def _read_manifest(target: Path) -> dict[str, Any] | str | None:
    """The manifest in `target`, None where there is none, or a clause saying why it cannot be used."""
    try:
        data = (target / MANIFEST_NAME).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        manifest = json.loads(data)
    except ValueError:
        # Only what is recognisably a piece of a manifest of ours makes the folder ours to replace.
        return f"{MANIFEST_NAME} is damaged" if _FORMAT.encode() in data[:100] else _NOT_OURS
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        return _NOT_OURS
    if manifest.get("version") != _FORMAT_VERSION:
        return f"{MANIFEST_NAME} has format version {manifest.get('version')} instead of {_FORMAT_VERSION}"
    counts = [manifest.get(key) for key in ("vocab_size", "documents", "tokens")]
    if (
        not all(isinstance(count, int) for count in counts)
        or not isinstance(manifest.get("fingerprint"), str)
        or not isinstance(manifest.get("products"), dict)
    ):
        return f"{MANIFEST_NAME} is damaged"
    return manifest


def _prepared(folder: Path, manifest: dict[str, Any], *, cached: bool) -> PreparedDataset:
    """The result for `folder` with the manifest `manifest`, which `_read_manifest` found good."""
    return PreparedDataset(
        prefixes=(folder / DATASET_NAME,),
        tokenizer_dir=folder / TOKENIZER_NAME,
        vocab_size=manifest["vocab_size"],
        documents=manifest["documents"],
        tokens=manifest["tokens"],
        fingerprint=manifest["fingerprint"],
        cached=cached,
    )


def _measure(path: Path) -> dict[str, Any]:
    """Size in bytes and hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    size = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
    return {"size": size, "sha256": digest.hexdigest()}


def _verify(target: Path, folder: Path, inputs: dict[str, Any]) -> PreparedDataset | str:
    """The dataset in `target` (known to the caller as `folder`) made from `inputs`, or a clause saying why not."""
    manifest = _read_manifest(target)
    if manifest is None:
        return "there is none yet"
    if isinstance(manifest, str):
        return manifest
    if manifest["fingerprint"] != _fingerprint(inputs):
        return _difference(manifest.get("inputs"), inputs)
    for name in _PRODUCTS:
        try:
            actual = _measure(target / name)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return f"its file {name} is missing"
        expected = manifest["products"].get(name)
        if actual != expected:
            if isinstance(expected, dict) and actual["size"] != expected.get("size"):
                return f"its file {name} has {actual['size']} bytes instead of {expected.get('size')}"
            return f"its file {name} has changed since it was made"
    return _prepared(folder, manifest, cached=True)


def _refuse_foreign(target: Path) -> None:
    """Raise BenchError where a dataset at `target` would take away files that are not of a local dataset.

    The lock must be held, or a folder being replaced would look like one without a manifest.
    """
    try:
        names = os.listdir(target)
    except FileNotFoundError:
        return
    except NotADirectoryError as error:
        raise BenchError(f"{target} is not a folder: choose another one for the local dataset.") from error
    # NFS keeps a deleted file that is still open under such a name.
    names = [name for name in names if not name.startswith(".nfs")]
    if not names:
        return
    manifest = _read_manifest(target)
    foreign = sorted(name for name in names if name not in _OWN_NAMES)
    if manifest is None or manifest == _NOT_OURS:
        # Not even files of the right names are ours then: they are the recipe's names for the user's data.
        foreign = sorted(names)
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise BenchError(
            f"{target} holds files that are not of a local dataset ({', '.join(foreign[:3])}{more}), and "
            "they are left alone: choose another folder for the local dataset, or move them away."
        )


# --- building -----------------------------------------------------------------------------------------------


def _sibling(target: Path, role: str) -> Path:
    """A new hidden path beside `target`, thus on its file system, that `_stale` recognises."""
    return target.parent / f".{target.name}.{role}-{os.getpid()}-{secrets.token_hex(4)}"


def _stale(target: Path) -> list[Path]:
    """What builds of `target` left beside it; only with the lock held is it known that none is under way."""
    prefixes = (f".{target.name}.building-", f".{target.name}.replaced-")
    return [target.parent / name for name in os.listdir(target.parent) if name.startswith(prefixes)]


def _remove_stale(target: Path) -> None:
    """Remove what killed builds left. The lock must be held."""
    for path in _stale(target):
        # NFS may refuse while a process elsewhere has a file of it open; a later call gets it.
        shutil.rmtree(path, ignore_errors=True)


def _remove_stale_if_idle(target: Path) -> None:
    """Remove what killed builds left, if there is something, nobody is building, and this user may."""
    with contextlib.suppress(OSError, BenchError):
        if _stale(target):
            with _lock(target, None):
                _remove_stale(target)


def _lock(target: Path, report: Callable[[str], None] | None) -> AbstractContextManager[int]:
    """Holds the lock of `target`; see `locked`."""
    return locked(target.parent / f".{target.name}.lock", "makes the local dataset", report)


def _build(
    target: Path,
    files: list[CorpusFile],
    inputs: dict[str, Any],
    vocab_size: int,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Build the dataset beside `target`, put it in its place and return its manifest, with the lock held."""
    building = _sibling(target, "building")
    try:
        # Not tempfile.mkdtemp, whose folders no other user may read.
        building.mkdir()
        manifest = _make_products(building, files, vocab_size, report)
        manifest["inputs"] = inputs
        manifest["fingerprint"] = _fingerprint(inputs)
        manifest["products"] = {name: _measure(building / name) for name in _PRODUCTS}
        _write_text(building / MANIFEST_NAME, json.dumps(manifest, indent=1) + "\n")
        fsync_folder(building / TOKENIZER_NAME)
        fsync_folder(building)
        _publish(building, target)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    report(
        f"Prepared {manifest['documents']:,} documents, {manifest['tokens']:,} tokens, with a tokenizer of "
        f"{manifest['vocab_size']:,} tokens."
    )
    return manifest


def _make_products(
    folder: Path, files: list[CorpusFile], vocab_size: int, report: Callable[[str], None]
) -> dict[str, Any]:
    """Write tokenizer and dataset into `folder`; returns the manifest's entries that describe them."""
    size = sum(len(file.data) for file in files)
    report(f"Training a tokenizer of {vocab_size:,} tokens on {len(files):,} files ({size / 1e6:.1f} MB).")
    trained = tokenizer.train((file.text for file in files), vocab_size=vocab_size)
    actual_size = trained.get_vocab_size()
    if actual_size < vocab_size:
        report(f"The text is too small for {vocab_size:,} tokens: the tokenizer has {actual_size:,}.")
    (folder / TOKENIZER_NAME).mkdir()
    for name, text in tokenizer.render(trained).items():
        _write_text(folder / TOKENIZER_NAME / name, text)

    report(f"Tokenizing {len(files):,} files.")
    # By the way that any shard of documents takes.
    lines = folder / "corpus.jsonl"
    _write_text(lines, "".join(json.dumps({"text": file.text}) + "\n" for file in files))
    counts = tokenize(Reader(lines), Encoder(folder / TOKENIZER_NAME), folder / DATASET_NAME, threads=usable_cores())
    lines.unlink()
    return {
        "format": _FORMAT,
        "version": _FORMAT_VERSION,
        "vocab_size": actual_size,
        "documents": counts.documents,
        "tokens": counts.tokens,
    }


def _write_text(path: Path, text: str) -> None:
    """Write a new UTF-8 file and make its contents durable."""
    with open(path, "x", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _publish(building: Path, target: Path) -> None:
    """Give the finished folder `building` the name `target`, whose old folder goes."""
    replaced = _sibling(target, "replaced")
    # Two renames, since one cannot replace a folder that is not empty. A kill between them leaves no dataset,
    # and the next call builds one.
    with contextlib.suppress(FileNotFoundError):
        os.rename(target, replaced)
    try:
        os.rename(building, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.rename(replaced, target)
        raise
    fsync_folder(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _bytes_needed(files: list[CorpusFile], vocab_size: int) -> int:
    """Bytes of disk that no build from `files` exceeds: a token per byte of text, index and tokenizer."""
    tokens = sum(len(file.data) + 1 for file in files)
    bytes_per_token = 2 if optimal_dtype(vocab_size) == "uint16" else 4
    return tokens * bytes_per_token + 20 * len(files) + 200 * (vocab_size + len(files)) + 1_000_000


def _write_error(folder: Path, error: OSError, files: list[CorpusFile], vocab_size: int) -> BenchError:
    """The error that tells the user of `error`, met while reading or writing `folder` or beside it."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        needed = _bytes_needed(files, vocab_size) / 1e6
        return BenchError(
            f"No space left for the local dataset in {folder} ({error.strerror}): free {needed:.0f} MB "
            "there, or choose a folder on another disk."
        )
    return BenchError(
        f"Cannot make the local dataset in {folder}: {error}. Choose a folder whose parent you may write in, "
        "on a disk that works."
    )
