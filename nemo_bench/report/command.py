"""`report.py`: the configuration to a report, on the terminal and in files."""

from __future__ import annotations

import glob
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_bench.config import typed_as
from nemo_bench.errors import BenchError, RunFailed
from nemo_bench.files import write_text
from nemo_bench.flops import Architecture
from nemo_bench.report import archive, model, page, tables
from nemo_bench.report.bare_logs import Given
from nemo_bench.report.build import build_report
from nemo_bench.report.config import ReportConfig
from nemo_bench.report.model import SUCCESSES
from nemo_bench.report.terminal import make_console, print_report

_GROUPS = ("model", "precision", "gpu")


def run_report(raw: DictConfig) -> None:
    """Make the report, print it, and write its files; RunFailed, then, where a point has no success or regressed."""
    # A group's interpolations speak of a training configuration, which is not here: they stay as they are.
    groups: Any = OmegaConf.to_container(raw, resolve=False)
    cfg = typed_as(ReportConfig, OmegaConf.masked_copy(raw, [str(key) for key in raw if key not in _GROUPS]))
    if cfg.archive is not None and not cfg.archive.endswith(archive.SUFFIX):
        raise BenchError(f"archive={cfg.archive}: the name must end in {archive.SUFFIX}")
    if cfg.output == "":
        raise BenchError("output is empty: name a folder, auto, or null for the terminal only")
    inputs, baseline = _paths("runs", cfg.runs), _paths("baseline", cfg.baseline)
    report = build_report(
        inputs,
        baseline=baseline,
        given=_given(cfg, groups),
        tolerance=cfg.tolerance,
        total_tokens=cfg.total_tokens,
        reference=cfg.reference if isinstance(cfg.reference, list | None) else str(cfg.reference),
    )
    files = {
        "results.json": model.to_json(report),
        "results.csv": tables.csv_text(report),
        "results.md": tables.markdown(report),
        "report.html": page.render(report),
    }
    console = make_console()
    print_report(console, report)
    if cfg.output is not None:
        beside = inputs[0] if inputs[0].is_dir() else inputs[0].absolute().parent
        folder = beside / "report" if cfg.output == "auto" else Path(cfg.output)
        _write(folder, files)
        console.print(f"written: {folder}/ ({', '.join(files)})", soft_wrap=True, highlight=False)
    if cfg.archive is not None:
        size = archive.write(report, Path(cfg.archive), files)
        console.print(f"packed without secrets: {cfg.archive} ({size / 1e6:.2f} MB)", soft_wrap=True, highlight=False)
    if report.exit_code:
        overall = "no success" if report.verdict in SUCCESSES else report.verdict
        raise RunFailed("\n  ".join([f"{overall}:", *report.failures]))


def _given(cfg: ReportConfig, groups: dict[str, Any]) -> Given:
    sizes = groups["model"]
    return Given(
        **{key: (groups[key] or {}).get("name") for key in _GROUPS},
        gpus=cfg.gpus,
        global_batch_size=cfg.global_batch_size,
        max_steps=cfg.max_steps,
        seq_length=sizes["seq_length"] if cfg.seq_length is None and sizes else cfg.seq_length,
        architecture=_architecture(sizes) if sizes else None,
    )


def _architecture(model_group: dict[str, Any]) -> Architecture:
    sizes: dict[str, Any] = {size.name: model_group.get(size.name) for size in fields(Architecture)}
    for name, size in sizes.items():
        if not isinstance(size, int) or not 0 < size < 10**9:
            raise BenchError(f"model.{name}={size}: must be a whole number above 0")
    return Architecture(**sizes)


def _paths(key: str, value: Any) -> list[Path]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    if "" in values or (key == "runs" and not values):  # the empty path would be the current folder
        raise BenchError(f"{key}: name at least one run folder, folder of runs, or log file")
    paths: list[Path] = []
    for text in (os.path.expanduser(str(item)) for item in values):
        matches = [name for name in sorted(glob.glob(text)) if os.path.isfile(name) or os.path.isdir(name)]
        paths += map(Path, matches if matches and not os.path.exists(text) else [text])
    return paths


def _write(folder: Path, files: dict[str, str]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            # A name of a file that is no UTF-8 is escaped: readers of JSON and CSV take nothing else.
            write_text(folder / name, text.encode("utf-8", "backslashreplace").decode())
    except OSError as error:
        fix = "name another folder, or output=null for the terminal only"
        raise BenchError(f"output={folder}: cannot be written ({error.strerror}); {fix}") from None
