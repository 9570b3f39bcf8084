"""A bundle of runs to share, without secrets.

A `.tar.zst` with the text files of each run, the report's own files, and `MANIFEST.json`: size and SHA-256 of each
file, how many secrets were removed from it, and what was left out because it is not text, such as checkpoints.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_bench.errors import BenchError
from nemo_bench.files import atomic_file
from nemo_bench.record import folder as record
from nemo_bench.record.redaction import REMOVED, is_secret, redact
from nemo_bench.report.model import Report, Run
from nemo_bench.report.page import plotly_script

if TYPE_CHECKING:
    from backports.zstd.tarfile import TarFile

SUFFIX = ".tar.zst"
MANIFEST = "MANIFEST.json"
_TEXT = (".json", ".jsonl", ".yaml", ".yml", ".out", ".err", ".log", ".txt", ".sh", ".sbatch")
_MIN_SECRET = 8  # a shorter value of a secret variable would match by chance


def check(path: Path) -> None:
    """Refuse a name with another suffix.

    Raises:
        BenchError: the name does not end in .tar.zst.
    """
    if not path.name.endswith(SUFFIX):
        raise BenchError(f"archive={path}: the name must end in {SUFFIX}")


def write(report: Report, path: Path, extra: dict[str, str]) -> int:
    """Pack the runs of the report and of its baseline into `path`; return its size in bytes.

    Args:
        report: the report.
        path: the bundle, which is replaced once the new one is complete.
        extra: more files: name -> content.

    Raises:
        BenchError: the suffix is another one, or the bundle cannot be written.
    """
    from backports.zstd import CompressionParameter, tarfile

    compression: dict[int, int] = {CompressionParameter.compression_level: 10, CompressionParameter.checksum_flag: 1}
    check(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path, "wb") as file, tarfile.open(fileobj=file, mode="w:zst", options=compression) as tar:
            _pack(tar, report, extra)
    except OSError as error:
        raise BenchError(f"archive={path}: cannot be written ({error.strerror or error})") from None
    return path.stat().st_size


def _pack(tar: TarFile, report: Report, extra: dict[str, str]) -> None:
    secrets = _secret_values()
    files: dict[str, Any] = {}
    left_out = []
    for folder, run in _folders([*report.runs, *report.baseline_runs]).items():
        for source in _sources(Path(run.path)):
            name = folder if run.source == "log" else f"{folder}/{source.relative_to(run.path)}"
            if source.suffix in _TEXT and source.is_file() and not source.is_symlink():
                files[name] = _add(tar, name, source.read_bytes().decode("utf-8", "surrogateescape"), secrets)
            else:
                left_out.append(name)
    for name, text in extra.items():
        files[name] = _add(tar, name, text, secrets)
    manifest = {"format": "nemo-bench runs", "version": 2, "files": files, "left_out": left_out}
    _add(tar, MANIFEST, json.dumps(manifest, indent=1), secrets)


def _folders(runs: list[Run]) -> dict[str, Run]:
    """Return where each run goes in the bundle; a log whose path names its point keeps that part of its path."""
    folders: dict[str, Run] = {}
    for run in {run.path: run for run in runs}.values():
        name = re.sub(r"[^\w.\-]+", "_", run.name)
        if run.source == "log" and run.identified.get("gpus") == "path":
            name = f"{run.version}/{run.precision}/{run.model}/{run.gpus}/{Path(run.path).name}"
        while f"runs/{name}" in folders:
            name = f"{len(folders)}/{name}"
        folders[f"runs/{name}"] = run
    return folders


def _sources(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    profile = path / record.PROFILE
    return sorted([*(child for child in path.iterdir() if child != profile), *profile.glob("rank*")])


def _secret_values() -> list[str]:
    """Return the values of this process's secret variables: a log may hold one without its name."""
    return [
        value
        for name, value in os.environ.items()
        if is_secret(name) and len(value) >= _MIN_SECRET and not value.isdigit()
    ]


def _add(tar: TarFile, name: str, text: str, secrets: list[str]) -> dict[str, Any]:
    """Add a file without its secrets; return its entry in the manifest."""
    script = plotly_script()  # of a page: it has no secrets, and variables called tokens
    clean = script.join(_redacted(part, secrets) for part in text.split(script))
    content = clean.encode("utf-8", "surrogateescape")
    member = tar.tarinfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
    removed = clean.count(REMOVED) - text.count(REMOVED)
    return {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), "removals": removed}


def _redacted(text: str, secrets: list[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, REMOVED)
    return redact(text)
