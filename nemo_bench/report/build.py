"""The report: inputs to runs, runs to points, points to verdicts."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from nemo_bench.errors import BenchError
from nemo_bench.record import folder as record
from nemo_bench.record.machine import check_line
from nemo_bench.report import attribution, comparison, model, points, references, runs
from nemo_bench.report.bare_logs import Given, load_log
from nemo_bench.report.model import Report, Run

_LOG_SUFFIXES = (".out", ".log", ".txt", ".err", ".out.gz", ".log.gz", ".txt.gz")
_DATASET_SUFFIX = "-description.txt"  # Megatron's description of a dataset that it cached
_RANK = re.compile(r"(?<![a-z])rank[_-]?\d+")
# The gravest first.
_GRAVITY = (model.FAIL, model.INVALID, model.UNDECIDED, model.INCOMPLETE, model.NOT_COMPARABLE, *model.SUCCESSES)


def build_report(
    paths: Sequence[Path],
    *,
    baseline: Sequence[Path] = (),
    given: Given | None = None,
    tolerance: float = 0.05,
    total_tokens: float = runs.DEFAULT_TOTAL_TOKENS,
    reference: str | Sequence[str] | None = "auto",
) -> Report:
    """Return the report on the run folders and logs that `paths` name or hold; BenchError where there are none.

    `baseline` are what they are compared with, `given` what the command line says of bare logs, `reference` names or
    files of published tables; auto: those that come with the program; None: no verdicts.
    """
    given = given or Given()
    names = references.names() if reference == "auto" else [reference] if isinstance(reference, str) else reference
    tables = [references.load(str(name)) for name in names or ()]
    all_runs, warnings = _load(paths, "runs", given, total_tokens)
    old_runs, old_warnings = _load(baseline, "baseline", given, total_tokens) if baseline else ([], [])
    groups, old_groups = ([*points.gather(side, tables, tolerance)] for side in (all_runs, old_runs))
    all_points = tuple(group.point for group in groups)
    if reference == "auto":
        used = {point.reference.reference for point in all_points if point.reference}
        tables = [table for table in tables if table.name in used]
    pairs = [(group, comparison.nearest(group, old_groups)) for group in groups]
    comparisons = tuple(comparison.compare(group, old, tolerance) for group, old in pairs if old)
    warnings += [f"{group.point.name}: the baseline has no such point" for group, old in pairs if baseline and not old]
    if both := {run.path for run in all_runs} & {run.path for run in old_runs}:
        warnings.append(f"runs= and baseline= share {len(both)} of {len(old_runs)} runs: compared with themselves")
    unknown = [run.name for run in all_runs if not run.identity_known]
    failures = [f"{p.name}: {p.verdict.text}" for p in all_points if p.verdict.value not in model.SUCCESSES]
    failures += [f"{item.point}: slower than the baseline" for item in comparisons if item.regression]
    failures += [f"{point.name}: GPU not known; name it with gpu=..." for point in all_points if point.gpu is None]
    failures += [f"{name}: not known what was run: name it with model=... precision=... gpus=..." for name in unknown]
    checks = [attribution.machine_check(run) for run in all_runs]
    gravest = min((point.verdict.value for point in all_points), key=_GRAVITY.index, default=model.INCOMPLETE)
    return Report(
        generated_at=record.timestamp(),
        inputs=tuple(map(str, paths)),
        verdict=model.PASS if gravest == model.FASTER else gravest,
        exit_code=1 if failures else 0,
        failures=tuple(failures),
        runs=tuple(all_runs),
        points=all_points,
        references=tuple(tables),
        scaling=tuple(points.scaling(all_points)),
        tolerance=tolerance,
        total_tokens=total_tokens,
        warnings=(*warnings, *old_warnings),
        baseline_inputs=tuple(map(str, baseline)),
        baseline_runs=tuple(old_runs),
        baseline_points=tuple(group.point for group in old_groups),
        comparisons=comparisons,
        attributions=tuple(way for pair in pairs for way in attribution.ways(*pair)),
        machine_checks=tuple(dict.fromkeys(check_line(check) for check in checks if check)),
    )


def _load(paths: Sequence[Path], key: str, given: Given, total_tokens: float) -> tuple[list[Run], list[str]]:
    """Return the runs of all inputs with unique names, and a word on what could not be read: it hides no other."""
    warnings: list[str] = []
    jobs: dict[Path, list[Path]] = {}  # the logs of one job, a file a rank
    for path in _find(paths, key, warnings):
        jobs.setdefault(path.with_name(_RANK.sub("rank", path.name)), []).append(path)
    named = {path.resolve() for path in paths}
    loaded: list[tuple[Path, Run]] = []
    stepless: list[str] = []  # files that lie beside the logs
    first_of: dict[str, Path] = {}
    for path, *others in jobs.values():
        try:
            run = runs.load_run(path, total_tokens) if path.is_dir() else load_log(path, others, given, total_tokens)
        except BenchError as error:
            warnings.append(str(error))
            continue
        except OSError as error:
            warnings.append(f"{path}: cannot be read ({error.strerror or error})")
            continue
        first = first_of.setdefault(repr((run.point, run.record, run.steps)), path)
        if len(run.steps) > 1 and first != path:
            warnings.append(f"{path}: has the same steps as {first}: counts once")
        elif run.source == "run folder" or run.steps or (path in named and run.gpus is not None):
            loaded.append((path, run))
        elif path in named:
            warnings.append(f"{path}: {run.why_not_final}")  # nothing tells that it is a run's log
        else:
            stepless.append(path.name)
    if stepless:
        shown = ", ".join(stepless[:5]) + (", ..." if len(stepless) > 5 else "")
        warnings.append(f"files without a training step: {len(stepless)} ({shown})")
    if not loaded:
        details = "".join(f"\n  {text}" for text in warnings)
        inputs = ",".join(map(str, paths))
        raise BenchError(f"{key}={inputs}: no run folder and no log with training steps there{details}")
    loaded.sort(key=lambda pair: (pair[1].model or "", pair[1].precision or "", pair[1].gpus or 0, pair[0]))
    names = _unique_names([path for path, _ in loaded])
    return [replace(run, name=name) for name, (_, run) in zip(names, loaded)], warnings


def _find(paths: Sequence[Path], key: str, closed: list[str]) -> list[Path]:
    """Return the run folders, and the logs in none of them, that `paths` name or hold; `closed`: cannot be opened."""
    inputs: dict[Path, None] = {}
    for path in paths:
        if not os.path.isfile(path) and not os.path.isdir(path):
            what = "neither a file nor a folder" if os.path.exists(path) else "there is no such file or folder"
            raise BenchError(f"{key}={path}: {what}\n  name run folders, folders that hold some, or log files")
        inputs |= dict.fromkeys(run.resolve() for run in ([path] if path.is_file() else _below(path, closed)))
    return list(inputs)


def _below(root: Path, closed: list[str]) -> Iterator[Path]:
    def note(error: OSError) -> None:
        closed.append(f"{error.filename}: cannot be looked into ({error.strerror})")

    seen: set[Path] = set()
    for name, folders, files in os.walk(root, followlinks=True, onerror=note):
        folder = Path(name)
        if record.RUN in files:
            yield folder
        if record.RUN in files or folder.resolve() in seen:  # by a link, perhaps to a folder above
            folders.clear()
            continue
        seen.add(folder.resolve())
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (folder / name for name in sorted(files) if name.endswith(_LOG_SUFFIXES)):
            # The recipe's name for the log of a run folder is a link to it.
            in_run = path.is_symlink() and (path.resolve().parent / record.RUN).is_file()
            if path.is_file() and not in_run and not path.name.endswith(_DATASET_SUFFIX):
                yield path


def _unique_names(paths: Sequence[Path]) -> list[str]:
    """Return a name for each path: its last part, with as many parts before it as it takes to tell all apart."""
    names = [path.name for path in paths]
    for depth in range(2, max(len(path.parts) for path in paths)):
        counts = Counter(names)
        names = ["/".join(path.parts[-depth:]) if counts[name] > 1 else name for name, path in zip(names, paths)]
    return names
