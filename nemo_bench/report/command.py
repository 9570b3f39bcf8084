"""`report.py`: the configuration to a report, on the terminal and in files."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from nemo_bench.errors import BenchError, RunFailed
from nemo_bench.files import write_text
from nemo_bench.report import archive, model, page, tables
from nemo_bench.report.bare_logs import Given
from nemo_bench.report.build import build_report
from nemo_bench.report.config import ReportConfig
from nemo_bench.report.model import SUCCESSES, Report
from nemo_bench.report.runs import architecture_of

if TYPE_CHECKING:
    from rich.console import Console

# More runs than this are a list for the files, not for a terminal.
SHOWN_RUNS = 30
SHOWN_CHANGES = 20
_GROUPS = ("model", "precision", "gpu")


def run_report(raw: DictConfig) -> None:
    """Make the report, print it, and write its files.

    Raises:
        BenchError: input that cannot be used; nothing was written.
        RunFailed: a point fails, is incomplete, or regressed; everything was printed and written.
    """
    from nemo_bench.report.terminal import make_console

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
    show(console, report)
    if cfg.output is not None:
        folder = _output(cfg.output, inputs)
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
        seq_length=cfg.seq_length or (cfg.model["seq_length"] if chosen["model"] else None),
        architecture=architecture_of(cfg.model) if chosen["model"] else None,
    )


def _paths(key: str, value: Any) -> list[Path]:
    values = list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]
    if "" in values or (key == "runs" and not values):  # the empty path would be the current folder
        raise BenchError(f"{key}: name at least one run folder, folder of runs, or log file")
    paths = []
    for text in map(str, values):
        text = os.path.expanduser(text)
        matches = sorted(glob.glob(text)) if glob.has_magic(text) and not Path(text).exists() else []
        paths += [Path(match) for match in matches or [text]]
    return paths


def _output(output: str, inputs: list[Path]) -> Path:
    if output != "auto":
        return Path(output)
    first = inputs[0]
    return (first if first.is_dir() else first.absolute().parent) / "report"


def _write(folder: Path, files: dict[str, str]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            write_text(folder / name, text)
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
    return "\n".join([f"{report.verdict}: {len(bad)} of {len(report.points)} points", *(f"  {text}" for text in bad)])


_COLOURS = {
    model.PASS: "green",
    model.FAIL: "bold red",
    model.INVALID: "bold red",
    model.UNDECIDED: "yellow",
    model.INCOMPLETE: "red",
    model.FASTER: "cyan",
    model.NOT_COMPARABLE: "yellow",
}


def show(console: Console, report: Report) -> None:
    """The report on the terminal."""
    from rich.markup import escape

    if report.points:
        console.print(_rich(tables.points_table(report)))
    for point in report.points:
        if point.verdict.value != model.NO_REFERENCE:
            console.print(
                f"  [bold]{escape(point.name)}[/] {escape(point.verdict.line)}", highlight=False, soft_wrap=True
            )
        # Of one that passes, the files tell the rest.
        for text in point.verdict.remarks if point.verdict.value not in SUCCESSES else []:
            console.print(f"    {escape(text)}", highlight=False, soft_wrap=True)
    if report.comparisons:
        console.print(_rich(tables.comparison_table(report.comparisons)))
    for each in report.comparisons:
        found = list(tables.changes(each))
        for kind, text in found[:SHOWN_CHANGES]:
            console.print(f"  [bold]{escape(each.point)}[/] {kind}: {escape(text)}", highlight=False, soft_wrap=True)
        if len(found) > SHOWN_CHANGES:
            console.print(f"  and {len(found) - SHOWN_CHANGES} more changes, in results.md and results.json")
    if len(report.runs) == 1:
        from nemo_bench.report.terminal import summary_table

        console.print(summary_table(report.runs[0]))
        for text in report.runs[0].warnings:
            console.print(f"[yellow]warning:[/] {escape(text)}", highlight=False, soft_wrap=True)
    elif len(report.runs) <= SHOWN_RUNS:
        console.print(_rich(tables.runs_table(report.runs)))
    for text in report.warnings:
        console.print(f"[yellow]warning:[/] {escape(text)}", highlight=False, soft_wrap=True)


def _rich(table: tables.Table) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(title=table.title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in table.header:
        made.add_column(name.lstrip(">"), justify="right" if name.startswith(">") else "left", overflow="fold")
    for row in table.rows:
        made.add_row(*(Text(cell, style=_COLOURS.get(cell.partition(",")[0], "")) for cell in row))
    return made
