"""A bundle to share: records, logs, configuration and environment of the runs, without secrets.

A `.tar.zst` with one folder a run, the report's own files, and `MANIFEST.json`: size and SHA-256 of each file, and how
many lines were changed to take secrets out. What is no text, such as checkpoints, is left out and named there.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import secrets
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from nemo_bench.errors import BenchError
from nemo_bench.record import folder as record
from nemo_bench.record.node import NODE, kept_environment
from nemo_bench.record.redaction import REMOVED, is_secret, redact
from nemo_bench.report.model import Report, Run

SUFFIX = ".tar.zst"
MANIFEST = "MANIFEST.json"
_TEXT = (".json", ".jsonl", ".yaml", ".yml", ".out", ".err", ".log", ".txt", ".sh", ".sbatch")
_CHUNK_BYTES = 1 << 20
_MIN_SECRET = 8  # a shorter value of a secret variable would match by chance
_KEY_BEGINS, _KEY_ENDS = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY"), re.compile(rb"-----END [A-Z ]*PRIVATE KEY")


def check(path: Path) -> None:
    """Refuses another suffix.

    Raises:
        BenchError: naming the right one.
    """
    if not path.name.endswith(SUFFIX):
        raise BenchError(f"archive={path}: the name must end in {SUFFIX}")


def write(report: Report, path: Path, extra: dict[str, str]) -> int:
    """Packs the runs of the report, and its baseline's, into `path`; returns the bundle's size in bytes.

    Args:
        report: what is packed.
        path: ends in .tar.zst; replaced only when the new bundle is complete and was read back.
        extra: texts that go along: file name -> content.

    Raises:
        BenchError: another suffix, or the disk refuses.
    """
    check(path)
    runs = list({run.path: run for run in (*report.runs, *report.baseline_runs)}.values())
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        manifest = _pack(aside, runs, extra)
        _verify(aside, manifest)
        os.replace(aside, path)
    except OSError as error:
        raise BenchError(f"archive={path}: cannot be written ({error.strerror or error})") from None
    finally:
        with contextlib.suppress(OSError):  # its folder may be none
            aside.unlink(missing_ok=True)
    return path.stat().st_size


def _pack(path: Path, runs: list[Run], extra: dict[str, str]) -> dict[str, Any]:
    import zstandard

    files: dict[str, Any] = {}
    left_out: list[str] = []
    literal = _own_secrets()
    with open(path, "wb") as out:
        with (
            zstandard.ZstdCompressor(level=10).stream_writer(out, closefd=False) as packed,
            tarfile.open(fileobj=packed, mode="w|", format=tarfile.PAX_FORMAT) as tar,
        ):
            for place, run in _places(runs):
                for source in _sources(Path(run.path)):
                    name = place if run.source == "log" else f"{place}/{source.relative_to(run.path)}"
                    if source.suffix in _TEXT and source.is_file() and not source.is_symlink():
                        files[name] = _add(tar, name, source, literal)
                    else:
                        left_out.append(name)
            for name, text in extra.items():
                files[name] = _add_text(tar, name, text, literal)
            manifest = {"format": "nemo-bench runs", "version": 1, "files": files, "left_out": left_out}
            _add_text(tar, MANIFEST, json.dumps(manifest, indent=1), literal)
        out.flush()
        os.fsync(out.fileno())
    return manifest


def _places(runs: list[Run]) -> Iterator[tuple[str, Run]]:
    """Where each run goes in the bundle: its name, safe as a path, and unique; a log also keeps what its path told."""
    seen: set[str] = set()
    for run in runs:
        name = re.sub(r"[^\w.\-]+", "_", run.name)
        if run.source == "log":
            name = re.sub(r"[^\w.\-]+", "_", Path(run.path).name)
            if run.identified.get("gpus") == "path":
                name = f"{run.version}/{run.precision}/{run.model}/{run.gpus}/{name}"
        stem, dot, suffix = name.rpartition(".") if run.source == "log" else (name, "", "")
        number = 1
        while name in seen:
            number += 1
            name = f"{stem}-{number}{dot}{suffix}"
        seen.add(name)
        yield f"runs/{name}", run


def _sources(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    profile = path / record.PROFILE
    return sorted([*(each for each in path.iterdir() if each != profile), *profile.glob("rank*")])


def _own_secrets() -> list[bytes]:
    """Values of this process's secret variables: a log may hold one without its name."""
    return [
        value.encode()
        for name, value in os.environ.items()
        if is_secret(name) and len(value) >= _MIN_SECRET and not value.isdigit()
    ]


def _add(tar: tarfile.TarFile, name: str, source: Path, literal: list[bytes]) -> dict[str, Any]:
    """Adds a file without its secrets: by way of a temporary one, since a tar wants the size first."""
    with open(source, "rb") as file, tempfile.TemporaryFile() as clean:
        changed = 0
        for line, dirty in _clean_lines(file, literal, environment=source.name == NODE):
            clean.write(line)
            changed += dirty
        return _add_file(tar, name, clean, int(source.stat().st_mtime), changed)


def _add_text(tar: tarfile.TarFile, name: str, text: str, literal: list[bytes]) -> dict[str, Any]:
    clean = b"".join(line for line, _ in _clean_lines(io.BytesIO(text.encode()), literal))
    return _add_file(tar, name, io.BytesIO(clean), 0, 0)


def _add_file(tar: tarfile.TarFile, name: str, file: IO[bytes], mtime: int, changed: int) -> dict[str, Any]:
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = file.seek(0, os.SEEK_END), mtime, 0o644
    file.seek(0)
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
    file.seek(0)
    tar.addfile(info, file)
    return {"size_bytes": info.size, "sha256": digest.hexdigest(), "lines_changed": changed}


def _clean_lines(file: IO[bytes], literal: list[bytes], *, environment: bool = False) -> Iterator[tuple[bytes, bool]]:
    """The file's lines without secrets, and whether each was changed.

    Args:
        file: read by lines, however long they are.
        literal: values to take out wherever they stand.
        environment: the file is a node.json, of whose variables only the known harmless ones are kept.
    """
    if environment:
        file = io.BytesIO(_clean_node(file.read()))
    in_key = False
    for line in file:
        clean = line
        for value in literal:
            clean = clean.replace(value, REMOVED.encode())
        begins = _KEY_BEGINS.search(clean)
        if in_key or begins:
            ends = _KEY_ENDS.search(clean)
            in_key = not ends
            clean = (clean[: begins.start()] if begins else b"") + REMOVED.encode() + b"\n"
        else:
            text = clean.decode("utf-8", errors="surrogateescape")
            clean = redact(text).encode("utf-8", errors="surrogateescape")
        yield clean, clean != line


def _clean_node(data: bytes) -> bytes:
    try:
        node = json.loads(data)
        node["environment"] = kept_environment(node["environment"])
    except (ValueError, TypeError, KeyError, AttributeError):
        return data
    return json.dumps(node, indent=2).encode() + b"\n"


def _verify(path: Path, manifest: dict[str, Any]) -> None:
    """Reads the bundle back.

    Raises:
        OSError: it does not hold what was packed.
    """
    import zstandard

    expected = dict(manifest["files"])
    with (
        open(path, "rb") as file,
        zstandard.ZstdDecompressor().stream_reader(file) as unpacked,
        tarfile.open(fileobj=unpacked, mode="r|") as tar,
    ):
        for member in tar:
            content = tar.extractfile(member)
            assert content is not None
            digest = hashlib.sha256()
            while chunk := content.read(_CHUNK_BYTES):
                digest.update(chunk)
            if member.name != MANIFEST and expected.pop(member.name)["sha256"] != digest.hexdigest():
                raise OSError(f"{member.name} was not written as it was read")
    if expected:
        raise OSError(f"{next(iter(expected))} is missing in the bundle")
