"""`report.py`: the configuration to a report, on the terminal and in files."""

from __future__ import annotations

import glob
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_bench.errors import BenchError, RunFailed
from nemo_bench.files import write_text
from nemo_bench.flops import Architecture
from nemo_bench.report import archive, model, page, tables
from nemo_bench.report.bare_logs import Given
from nemo_bench.report.build import build_report
from nemo_bench.report.config import ReportConfig
from nemo_bench.report.model import SUCCESSES, Report
from nemo_bench.report.runs import architecture_of

_GROUPS = ("model", "precision", "gpu")


def run_report(raw: DictConfig) -> None:
    """Make the report, print it, and write its files; RunFailed, then, where a point has no success or regressed."""
    from nemo_bench.report.terminal import make_console, print_report

    cfg = _typed(raw)
    if cfg.archive is not None:
        archive.check(Path(cfg.archive))
    if cfg.output == "":
        raise BenchError("output is empty: name a folder, auto, or null for the terminal only")
    inputs, baseline = _paths("runs", cfg.runs), _paths("baseline", cfg.baseline)
    report = build_report(
        inputs,
        baseline=baseline,
        given=_given(cfg),
        tolerance=cfg.tolerance,
        total_tokens=cfg.total_tokens,
        reference=cfg.reference,
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
        raise RunFailed(_failure(report))


def _typed(raw: DictConfig) -> ReportConfig:
    own = OmegaConf.masked_copy(raw, [str(key) for key in raw if key not in _GROUPS])
    cfg = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ReportConfig), own))
    assert isinstance(cfg, ReportConfig)
    # What a group's interpolations speak of, a training configuration, is not here: they stay as they are.
    plain: Any = OmegaConf.to_container(raw, resolve=False)
    for key in _GROUPS:
        setattr(cfg, key, plain[key])
    return cfg


def _given(cfg: ReportConfig) -> Given:
    chosen = {key: (getattr(cfg, key) or {}).get("name") for key in _GROUPS}
    return Given(
        **chosen,
        gpus=cfg.gpus,
        global_batch_size=cfg.global_batch_size,
        max_steps=cfg.max_steps,
        seq_length=cfg.model["seq_length"] if cfg.seq_length is None and chosen["model"] else cfg.seq_length,
        architecture=_architecture(cfg.model) if chosen["model"] else None,
    )


def _architecture(sizes: dict[str, Any]) -> Architecture:
    for size in fields(Architecture):
        if not isinstance(sizes.get(size.name), int) or not 0 < sizes[size.name] < 10**9:
            raise BenchError(f"model.{size.name}={sizes.get(size.name)}: must be a whole number above 0")
    return architecture_of(sizes)


def _paths(key: str, value: Any) -> list[Path]:
    values = list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]
    if "" in values or (key == "runs" and not values):  # the empty path would be the current folder
        raise BenchError(f"{key}: name at least one run folder, folder of runs, or log file")
    paths = []
    for text in map(str, values):
        text = os.path.expanduser(text)
        matches = sorted(glob.glob(text)) if glob.has_magic(text) and not Path(text).exists() else []
        matches = [match for match in matches if Path(match).is_file() or Path(match).is_dir()] or matches
        paths += [Path(match) for match in matches or [text]]
    return paths


def _write(folder: Path, files: dict[str, str]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            # A name of a file that is no UTF-8 is escaped: readers of JSON and CSV take nothing else.
            write_text(folder / name, text.encode("utf-8", "backslashreplace").decode())
    except OSError as error:
        raise BenchError(
            f"output={folder}: cannot be written ({error.strerror}); name another folder, or output=null for the "
            "terminal only"
        ) from None


def _failure(report: Report) -> str:
    bad = [f"{point.name}: {point.verdict.text}" for point in report.points if point.verdict.value not in SUCCESSES]
    bad += [f"{each.point}: slower than the baseline" for each in report.comparisons if each.regression]
    if not report.points:
        return "it is not known what was run: name it with model=... precision=... gpus=... gpu=..."
    bad += [f"{point.name}: GPU not known; name it with gpu=..." for point in report.points if point.gpu is None]
    bad += [f"{run.name}: not known what was run" for run in report.runs if not run.identity_known]
    head = "no success" if report.verdict in SUCCESSES else report.verdict
    return "\n".join([f"{head}: {len(bad)} of {len(report.points)} points", *(f"  {text}" for text in bad)])
