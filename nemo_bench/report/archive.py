"""A bundle of runs to share, without secrets: a `.tar.zst` of their text files, the report's own, and a manifest."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

from nemo_bench.errors import BenchError
from nemo_bench.files import atomic_file
from nemo_bench.record import folder as record
from nemo_bench.record.redaction import REMOVED, is_secret, redact
from nemo_bench.report.model import Report
from nemo_bench.report.page import plotly_script

SUFFIX = ".tar.zst"
MANIFEST = "MANIFEST.json"  # how many secrets were removed from each file; what is no text, and left out
_TEXT = (".json", ".jsonl", ".yaml", ".yml", ".out", ".err", ".log", ".txt", ".sh", ".sbatch")
_MIN_SECRET = 8  # a shorter value of a secret variable would match by chance


def write(report: Report, path: Path, extra: dict[str, str]) -> int:
    """Pack the runs of the report and of its baseline, and `extra` (name -> text); return the bundle's size in bytes.

    Raises BenchError if it cannot be written; an older bundle is then as it was.
    """
    from backports.zstd import CompressionParameter, tarfile

    removals: dict[str, int] = {}
    left_out: list[str] = []
    manifest = {"format": "nemo-bench runs", "version": 3, "removals": removals, "left_out": left_out}
    compression: dict[int, int] = {CompressionParameter.compression_level: 10, CompressionParameter.checksum_flag: 1}

    def add(name: str, text: str) -> None:
        clean = _redacted(text)
        content = clean.encode("utf-8", "surrogateescape")
        member = tar.tarinfo(name)
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
        removals[name] = clean.count(REMOVED) - text.count(REMOVED)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path, "wb") as file, tarfile.open(fileobj=file, mode="w:zst", options=compression) as tar:
            for name, source in _sources(report).items():
                if source.suffix in _TEXT and source.is_file() and not source.is_symlink():
                    add(name, source.read_bytes().decode("utf-8", "surrogateescape"))
                else:
                    left_out.append(name)
            for name, text in extra.items():
                add(name, text)
            add(MANIFEST, json.dumps(manifest, indent=1))
    except OSError as error:
        raise BenchError(f"archive={path}: cannot be written ({error.strerror or error})") from None
    return path.stat().st_size


def _sources(report: Report) -> dict[str, Path]:
    """Return the runs' files by their names in the bundle; a log keeps what its path says of its point."""
    sources: dict[str, Path] = {}
    for side, runs in (("runs", report.runs), ("baseline", report.baseline_runs)):
        for run in runs:
            path, name = Path(run.path), Path(side, run.name)
            if run.source == "log":
                named = run.identified.get("gpus") == "path"
                point = f"{run.version}/{run.precision}/{run.model}/{run.gpus}" if named else ""
                sources[str(name.parent / point / path.name)] = path
            else:
                profile = path / record.PROFILE
                children = sorted([*(child for child in path.iterdir() if child != profile), *profile.glob("rank*")])
                sources |= {str(name / child.relative_to(path)): child for child in children}
    return sources


def _redacted(text: str) -> str:
    """Return the text without secrets, and without the values of this process's secret variables."""
    for name, value in os.environ.items():
        if is_secret(name) and len(value) >= _MIN_SECRET and not value.isdigit():
            text = text.replace(value, REMOVED)
    script = plotly_script()  # of a page: it has no secrets, and variables called tokens
    return script.join(map(redact, text.split(script)))
