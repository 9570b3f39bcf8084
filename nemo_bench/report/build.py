"""The report: inputs to runs, runs to points, points to verdicts; and what `report.py` does with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from nemo_bench.errors import BenchError
from nemo_bench.record import folder as record
from nemo_bench.report import comparison, model, points, references, runs
from nemo_bench.report.model import Assumptions, Method, Report, Run
from nemo_bench.report.numbers import LAST_LOSSES, tokens_text
from nemo_bench.report.runs import Given
from nemo_bench.report.statistics import CONFIDENCE, MIN_STEADY_STEPS

DEFAULT_REFERENCE = "nvidia-24.09"
DEFAULT_TOLERANCE = 0.05


def build_report(
    inputs: Sequence[Path],
    *,
    baseline: Sequence[Path] = (),
    given: Given | None = None,
    tolerance: float = DEFAULT_TOLERANCE,
    total_tokens: float = runs.DEFAULT_TOTAL_TOKENS,
    reference: str | None = DEFAULT_REFERENCE,
) -> Report:
    """Everything that is to be said about the runs that `inputs` name or hold.

    Args:
        inputs: run folders, folders of them, log files.
        baseline: the same of what they are compared with.
        given: what the command line says of bare logs.
        tolerance: of a verdict, as a fraction.
        total_tokens: budget behind the days to train.
        reference: name or file of the published table; None: no verdicts.

    Raises:
        BenchError: an input does not exist or holds no run, or an argument is not valid.
    """
    given = given or Given()
    runs.check(given)
    if not 0 <= tolerance < 1:
        raise BenchError(f"tolerance={tolerance}: a fraction from 0 to below 1; 0.05 is 5%")
    if not total_tokens > 0:
        raise BenchError(f"total_tokens={total_tokens}: must be above 0")
    table = references.load(reference) if reference is not None else None
    found, warnings = _load(inputs, "runs", given, total_tokens)
    groups = points.gather(found)
    made = [points.make_point(group, table, tolerance) for group in groups]
    base_found: list[Run] = []
    base_made: list[model.Point] = []
    comparisons: list[model.Comparison] = []
    if baseline:
        base_found, more = _load(baseline, "baseline", given, total_tokens)
        base_groups = points.gather(base_found)
        base_made = [points.make_point(group, table, tolerance) for group in base_groups]
        comparisons, unmatched = comparison.compare(groups, made, base_groups, base_made, tolerance)
        warnings += more + unmatched
        both = {run.path for run in found} & {run.path for run in base_found}
        if both:
            warnings.append(
                f"runs= and baseline= share {len(both)} of {len(base_found)} runs: compared with themselves"
            )
    unknown = [run.name for run in found if not any(run.name in point.runs for point in made)]
    if unknown:
        warnings.append(f"not known what was run, so in no point: {', '.join(unknown)} (see their warnings)")
    verdict = points.overall(made)
    failed = verdict in (model.FAIL, model.INCOMPLETE) or any(each.regression for each in comparisons)
    return Report(
        schema_version=model.SCHEMA_VERSION,
        generated_at=record.timestamp(),
        generator=_generator(),
        inputs=tuple(map(str, inputs)),
        verdict=verdict,
        exit_code=int(failed),
        runs=tuple(found),
        points=tuple(made),
        references=(table,) if table is not None else (),
        scaling=tuple(points.scaling(groups, made, table)),
        baseline_inputs=tuple(map(str, baseline)),
        baseline_runs=tuple(base_found),
        baseline_points=tuple(base_made),
        comparisons=tuple(comparisons),
        assumptions=Assumptions(tolerance, total_tokens, CONFIDENCE, (table.name,) if table else ()),
        methods=methods(total_tokens),
        warnings=tuple(warnings),
    )


def _generator() -> str:
    try:
        return f"nemo-bench {metadata.version('nemo-bench')}"
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "nemo-bench"


def _load(inputs: Sequence[Path], key: str, given: Given, total_tokens: float) -> tuple[list[Run], list[str]]:
    """The runs of all inputs with unique names, and a word on what could not be read: it hides no other."""
    paths, warnings = runs.find(inputs, key)
    named = {path.resolve() for path in inputs}
    found: list[tuple[Path, Run]] = []
    stepless: list[str] = []
    for path in paths:
        try:
            run = runs.load(path, given, total_tokens)
        except BenchError as error:
            warnings.append(str(error))
        except OSError as error:
            warnings.append(f"{path}: cannot be read ({error.strerror})")
        else:
            if run.source == "run folder" or len(run.steps) or (path in named and run.gpus is not None):
                found.append((path, run))
            elif path in named:
                warnings.append(f"{path}: {run.why_not_final}")  # nothing tells that it is a run's log
            else:
                stepless.append(path.name)  # a file that lies beside the logs
    if stepless:
        shown = ", ".join(stepless[:5]) + (", ..." if len(stepless) > 5 else "")
        number = "1 file holds" if len(stepless) == 1 else f"{len(stepless)} files hold"
        warnings.append(f"{number} no training step: {shown}")
    if not found:
        told = "".join(f"\n  {text}" for text in warnings)
        raise BenchError(
            f"{key}={','.join(map(str, inputs))}: no run folder and no log with train_step_timing there{told}"
        )
    found.sort(key=lambda pair: (pair[1].model or "", pair[1].precision or "", pair[1].gpus or 0, pair[0]))
    names = runs.unique_names([path for path, _ in found])
    return [replace(run, name=name) for name, (_, run) in zip(names, found)], warnings


def methods(total_tokens: float) -> tuple[Method, ...]:
    """How each number is computed, for whoever reads the report."""
    return (
        Method(
            "step time",
            "s",
            "NeMo's train_step_timing, synchronised with the device; the median of the steps that count. The recipe "
            "reads the last step: it is shown beside.",
        ),
        Method(
            "steps that count",
            "",
            "Left out are the warm-up (leading steps, at most half of all, before the first within three spreads, and "
            "never less than 2%, of the second half's median; the same after a restart), and the step after a "
            f"validation, a checkpoint or a profile. Fewer than {MIN_STEADY_STEPS} steps are no result.",
        ),
        Method("spread", "s", "1.4826 x the median absolute deviation of the steps that count."),
        Method(
            "confidence interval",
            "s",
            "95%, Student's t. Of several repeats: over their medians. Of one run: over the medians of about sqrt(n) "
            "batches of about sqrt(n) consecutive steps, since neighbouring steps depend on each other; it says "
            "nothing about how runs differ.",
        ),
        Method("tokens/s", "1/s", "sequence length x global batch size / step time"),
        Method(
            "model FLOPs",
            "",
            "a sequence, forward and backward: S (12 L h^2 (1 + g/a + S/h) + 18 L f h + 6 V h), the recipe's "
            "convention (S tokens, L layers, h hidden size, f FFN size, a heads, g query groups, V vocabulary): "
            "3.94e15 for the 70B at 8192. The causal convention (Megatron-LM's) halves the attention core S/h: the "
            "recipe's is 7.2% more there.",
        ),
        Method("TFLOP/s a GPU", "TFLOP/s", "global batch size x model FLOPs / step time / GPUs / 1e12"),
        Method("MFU", "", "TFLOP/s a GPU / dense peak of the GPU in the run's number format, which is named beside it"),
        Method(
            "pipeline bubble",
            "of a step",
            "((PP - 1) / VP) / (GA + (PP - 1) / VP), GA micro-batches for each copy of the model: what the layout "
            "leaves idle where all stages have equal work (Narayanan et al. 2021)",
        ),
        Method(f"days to {tokens_text(total_tokens)} tokens", "days", "tokens / (tokens/s) / 86400"),
        Method("last loss", "", f"mean of the last {LAST_LOSSES} steps"),
        Method(
            "verdict",
            "",
            "tokens/s at the median step time / tokens/s at the published step time: PASS within the tolerance of 1, "
            "FAIL below, FASTER THAN PUBLISHED above.",
        ),
        Method(
            "comparison",
            "",
            "ratio of tokens/s with Welch's 95% interval: SLOWER or FASTER where that leaves out 1, else NO "
            "DIFFERENCE. The noise is how the repeats of a point differ, pooled over all points of the model that were "
            "repeated; where none was, it comes from the steps of the runs.",
        ),
        Method("parallel efficiency", "", "tokens/s a GPU / tokens/s a GPU at the fewest GPUs of the curve"),
    )
