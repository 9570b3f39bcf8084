"""The report: inputs to runs, runs to points, points to verdicts."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from nemo_bench.errors import BenchError
from nemo_bench.record import folder as record
from nemo_bench.report import attribution, comparison, model, points, references, runs
from nemo_bench.report.bare_logs import Given, check, load_log
from nemo_bench.report.model import Report, Run

DEFAULT_REFERENCE = "auto"
DEFAULT_TOLERANCE = 0.05

_LOG_SUFFIXES = (".out", ".log", ".txt", ".err", ".out.gz", ".log.gz", ".txt.gz")
_DATASET_SUFFIX = "-description.txt"  # Megatron's description of a dataset that it cached
_RANK = re.compile(r"(?<![a-z])rank[_-]?\d+")
# The gravest first.
_GRAVITY = (model.FAIL, model.INVALID, model.UNDECIDED, model.INCOMPLETE, model.NOT_COMPARABLE)


def build_report(
    paths: Sequence[Path],
    *,
    baseline: Sequence[Path] = (),
    given: Given | None = None,
    tolerance: float = DEFAULT_TOLERANCE,
    total_tokens: float = runs.DEFAULT_TOTAL_TOKENS,
    reference: str | Sequence[str] | None = DEFAULT_REFERENCE,
) -> Report:
    """Return everything that is to be said about the runs that `paths` name or hold.

    Args:
        paths: run folders, folders of them, log files.
        baseline: the same of what they are compared with.
        given: what the command line says of bare logs.
        tolerance: of a verdict, as a fraction.
        total_tokens: budget behind the days to train.
        reference: names or files of published tables; auto: those that come with the program; None: no verdicts.

    Raises:
        BenchError: an input does not exist or holds no run, or an argument is not valid.
    """
    given = given or Given()
    check(given)
    if not 0 <= tolerance < 1:
        raise BenchError(f"tolerance={tolerance}: a fraction from 0 to below 1; 0.05 is 5%")
    if not 0 < total_tokens < math.inf:
        raise BenchError(f"total_tokens={total_tokens}: must be a number above 0")
    names = [*reference] if isinstance(reference, (list, tuple)) else [] if reference is None else [reference]
    tables = [references.load(str(name)) for name in (references.names() if reference == "auto" else names)]
    all_runs, warnings = _load(paths, "runs", given, total_tokens)
    old_runs, old_warnings = _load(baseline, "baseline", given, total_tokens) if baseline else ([], [])
    groups, old_groups = ([*points.gather(side, tables, tolerance)] for side in (all_runs, old_runs))
    if reference == "auto":
        used = {group.point.reference.reference for group in groups if group.point.reference}
        tables = [table for table in tables if table.name in used]
    comparisons, unmatched = comparison.compare(groups, old_groups, tolerance) if baseline else ([], [])
    all_points = tuple(group.point for group in groups)
    values = {point.verdict.value for point in all_points}
    known = all(run.identity_known for run in all_runs) and all(point.gpu for point in all_points)
    regressed = any(item.regression for item in comparisons)
    good = bool(values) and values <= {*model.SUCCESSES} and known and not regressed
    return Report(
        generated_at=record.timestamp(),
        generator=_generator(),
        inputs=tuple(map(str, paths)),
        verdict=_overall(values),
        exit_code=0 if good else 1,
        runs=tuple(all_runs),
        points=all_points,
        references=tuple(tables),
        scaling=tuple(points.scaling(groups, tables)),
        tolerance=tolerance,
        total_tokens=total_tokens,
        warnings=(*warnings, *old_warnings, *unmatched, *_remarks(all_runs, old_runs)),
        baseline_inputs=tuple(map(str, baseline)),
        baseline_runs=tuple(old_runs),
        baseline_points=tuple(group.point for group in old_groups),
        comparisons=tuple(comparisons),
        attributions=tuple(_attributions(groups, all_runs, comparisons, old_groups, old_runs)),
    )


def _attributions(
    groups: Sequence[points.Group],
    all_runs: Sequence[Run],
    comparisons: Sequence[model.Comparison],
    old_groups: Sequence[points.Group],
    old_runs: Sequence[Run],
) -> Iterator[attribution.Attribution]:
    """Yield where each measured point's seconds went, from its estimate and from its baseline."""
    named, old_named = ({run.name: run for run in side} for side in (all_runs, old_runs))
    olds, baseline_of = (
        {old.point.name: old.point for old in old_groups},
        {item.point: item.baseline for item in comparisons},
    )
    for group in groups:
        final = [named[name] for name in group.point.final_runs]
        found = [attribution.from_estimate(group.point, final, group.estimate)]
        if old := olds.get(baseline_of.get(group.point.name, "")):
            found.append(
                attribution.from_baseline(group.point, final, old, [old_named[name] for name in old.final_runs])
            )
        yield from filter(None, found)


def _remarks(all_runs: Sequence[Run], old_runs: Sequence[Run]) -> Iterator[str]:
    both = {run.path for run in all_runs} & {run.path for run in old_runs}
    if both:
        yield f"runs= and baseline= share {len(both)} of {len(old_runs)} runs: compared with themselves"
    unknown = [run.name for run in all_runs if not run.identity_known]
    if unknown:
        yield f"not known what was run, so in no point: {', '.join(unknown)} (see their warnings)"


def _overall(values: set[str]) -> str:
    """Return the verdict of a whole report: the gravest of its points'."""
    if not values:
        return model.INCOMPLETE
    best = model.PASS if values & {model.PASS, model.FASTER} else model.NO_REFERENCE
    return next((value for value in _GRAVITY if value in values), best)


def _generator() -> str:
    try:
        return f"nemo-bench {metadata.version('nemo-bench')}"
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "nemo-bench"


def _load(paths: Sequence[Path], key: str, given: Given, total_tokens: float) -> tuple[list[Run], list[str]]:
    """Return the runs of all inputs with unique names, and a word on what could not be read: it hides no other."""
    candidates, warnings = _find(paths, key)
    named = {path.resolve() for path in paths}
    loaded: list[tuple[Path, Run]] = []
    stepless: list[str] = []
    jobs: dict[Path, list[Path]] = {}  # the logs of one job, a file a rank
    for path in candidates:
        jobs.setdefault(path.with_name(_RANK.sub("rank", path.name)), []).append(path)
    first_of: dict[str, Path] = {}
    for path, *others in jobs.values():
        try:
            run = runs.load_run(path, total_tokens) if path.is_dir() else load_log(path, others, given, total_tokens)
        except BenchError as error:
            warnings.append(str(error))
        except OSError as error:
            warnings.append(f"{path}: cannot be read ({error.strerror or error})")
        else:
            identity = repr((run.point, run.record, run.steps))
            if len(run.steps) > 1 and first_of.setdefault(identity, path) != path:
                warnings.append(f"{path}: has the same steps as {first_of[identity]}: counts once")
            elif run.source == "run folder" or run.steps or (path in named and run.gpus is not None):
                loaded.append((path, run))
            elif path in named:
                warnings.append(f"{path}: {run.why_not_final}")  # nothing tells that it is a run's log
            else:
                stepless.append(path.name)  # a file that lies beside the logs
    if stepless:
        shown = ", ".join(stepless[:5]) + (", ..." if len(stepless) > 5 else "")
        number = "1 file holds" if len(stepless) == 1 else f"{len(stepless)} files hold"
        warnings.append(f"{number} no training step: {shown}")
    if not loaded:
        details = "".join(f"\n  {text}" for text in warnings)
        raise BenchError(
            f"{key}={','.join(map(str, paths))}: no run folder and no log with training steps there{details}"
        )
    loaded.sort(key=lambda pair: (pair[1].model or "", pair[1].precision or "", pair[1].gpus or 0, pair[0]))
    names = _unique_names([path for path, _ in loaded])
    return [replace(run, name=name) for name, (_, run) in zip(names, loaded)], warnings


def _find(paths: Sequence[Path], key: str) -> tuple[list[Path], list[str]]:
    """Return the run folders, and the logs in none of them, that `paths` name or hold; and what cannot be opened."""
    inputs: dict[Path, None] = {}
    closed: list[str] = []
    seen: set[Path] = set()
    for path in paths:
        if not path.is_file() and not path.is_dir():
            what = "neither a file nor a folder" if path.exists() else "there is no such file or folder"
            raise BenchError(f"{key}={path}: {what}\n  name run folders, folders that hold some, or log files")
        for run in [path] if path.is_file() else _below(path, seen, closed):
            inputs[run.resolve()] = None
    return list(inputs), closed


def _below(folder: Path, seen: set[Path], closed: list[str]) -> Iterator[Path]:
    real = folder.resolve()
    if real in seen:  # by a link, perhaps to a folder above
        return
    seen.add(real)
    try:
        if (folder / record.RUN).is_file():
            yield folder
            return
        entries = sorted(folder.iterdir())
    except OSError as error:
        closed.append(f"{folder}: cannot be looked into ({error.strerror})")
        return
    for path in entries:
        if path.is_dir() and not path.name.startswith("."):
            yield from _below(path, seen, closed)
        elif path.is_symlink() and (path.resolve().parent / record.RUN).is_file():
            continue  # the recipe's name for the log of a run folder
        elif path.name.endswith(_LOG_SUFFIXES) and not path.name.endswith(_DATASET_SUFFIX) and path.is_file():
            yield path


def _unique_names(paths: Sequence[Path]) -> list[str]:
    """Return a name for each path: its last part, with as many parts before it as it takes to tell all apart."""
    names = [path.name for path in paths]
    for depth in range(2, max((len(path.parts) for path in paths), default=0) + 1):
        counts = Counter(names)
        names = ["/".join(path.parts[-depth:]) if counts[name] > 1 else name for name, path in zip(names, paths)]
    return [re.sub(r"^/+", "/", name) for name in names]
