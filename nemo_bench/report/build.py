"""The report: inputs to runs, runs to points, points to verdicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from nemo_bench.errors import BenchError
from nemo_bench.record import folder as record
from nemo_bench.report import comparison, inputs, model, points, references, runs
from nemo_bench.report.bare_logs import Given, check, load_log
from nemo_bench.report.model import Assumptions, Report, Run
from nemo_bench.report.statistics import CONFIDENCE

DEFAULT_REFERENCE = "nvidia-24.09"
DEFAULT_TOLERANCE = 0.05

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
        reference: names or files of published tables; None: no verdicts.

    Raises:
        BenchError: an input does not exist or holds no run, or an argument is not valid.
    """
    given = given or Given()
    check(given)
    if not 0 <= tolerance < 1:
        raise BenchError(f"tolerance={tolerance}: a fraction from 0 to below 1; 0.05 is 5%")
    if not 0 < total_tokens < math.inf:
        raise BenchError(f"total_tokens={total_tokens}: must be a number above 0")
    tables = [references.load(name) for name in ([reference] if isinstance(reference, str) else reference or ())]
    all_runs, warnings = _load(paths, "runs", given, total_tokens)
    old_runs, old_warnings = _load(baseline, "baseline", given, total_tokens) if baseline else ([], [])
    groups, old_groups = points.gather(all_runs), points.gather(old_runs)
    all_points, old_points = (
        [points.make_point(group, tables, tolerance) for group in side] for side in (groups, old_groups)
    )
    comparisons: list[model.Comparison] = []
    if baseline:
        comparisons, unmatched = comparison.compare(groups, all_points, old_groups, old_points, tolerance)
        warnings += old_warnings + unmatched + _shared(all_runs, old_runs)
    known = {name for point in all_points for name in point.runs}
    unknown = [run.name for run in all_runs if run.name not in known]
    if unknown:
        warnings.append(f"not known what was run, so in no point: {', '.join(unknown)} (see their warnings)")
    values = {point.verdict.value for point in all_points}
    good = bool(values) and values <= {*model.SUCCESSES} and not any(each.regression for each in comparisons)
    return Report(
        generated_at=record.timestamp(),
        generator=_generator(),
        inputs=tuple(map(str, paths)),
        verdict=_overall(values),
        exit_code=0 if good else 1,
        runs=tuple(all_runs),
        points=tuple(all_points),
        references=tuple(tables),
        scaling=tuple(points.scaling(groups, all_points, tables)),
        assumptions=Assumptions(tolerance, total_tokens, CONFIDENCE, tuple(table.name for table in tables)),
        warnings=tuple(warnings),
        baseline_inputs=tuple(map(str, baseline)),
        baseline_runs=tuple(old_runs),
        baseline_points=tuple(old_points),
        comparisons=tuple(comparisons),
    )


def _shared(all_runs: Sequence[Run], old_runs: Sequence[Run]) -> list[str]:
    both = {run.path for run in all_runs} & {run.path for run in old_runs}
    return [f"runs= and baseline= share {len(both)} of {len(old_runs)} runs: compared with themselves"] if both else []


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
    candidates, warnings = inputs.find(paths, key)
    named = {path.resolve() for path in paths}
    loaded: list[tuple[Path, Run]] = []
    stepless: list[str] = []
    for path in candidates:
        try:
            run = runs.load_run(path, total_tokens) if path.is_dir() else load_log(path, given, total_tokens)
        except BenchError as error:
            warnings.append(str(error))
        except OSError as error:
            warnings.append(f"{path}: cannot be read ({error.strerror})")
        else:
            if run.source == "run folder" or run.steps or (path in named and run.gpus is not None):
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
    names = inputs.unique_names([path for path, _ in loaded])
    return [replace(run, name=name) for name, (_, run) in zip(names, loaded)], warnings
