"""Where a point's seconds went: each term of its estimate, or of a baseline, beside what the run's evidence gives.

Evidence of a term is a profile (`profile=torch`), whose kernels belong to terms (kernel_classes.term_of); without one,
what ranks measured: the rate of matrix products, and the time in which each waited for others. A term without evidence
explains nothing. What neither explains stands at the end.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence

from nemo_bench.estimate.step import Estimate
from nemo_bench.report.kernel_classes import ATTENTION, COMMUNICATION, GEMM, OPTIMIZER, OTHER_COMMUNICATION
from nemo_bench.report.model import Attribution, Point, Run, Term
from nemo_bench.report.profile import StepProfile
from nemo_bench.report.remarks import throttling

# A matrix rate this much below what the estimate takes explains slow products; less is the warmth of a GPU.
SLOW_PRODUCTS = 0.02
_COMPUTED = ("matrix products", "attention", "other kernels", "recomputation")
_WAITS = "waits in lockstep"
_COMMUNICATION = (
    *("tensor parallel", _WAITS, "context parallel", "fp8 scaling factors", "pipeline bubble and p2p"),
    *("gradient reduction", "parameter gathering", OTHER_COMMUNICATION),
)
NO_EVIDENCE = "no evidence"


def from_estimate(point: Point, runs: Sequence[Run], estimate: Estimate | None) -> Attribution | None:
    """Return the way from the estimate to a measured point; None where there is no estimate or no measurement."""
    if point.numbers is None or estimate is None:
        return None
    step_s, run = point.numbers.step_time_s, _with_profile(runs)
    expected = {name: seconds for name, seconds in estimate.breakdown_s.items() if seconds}
    profile = profile_of(run, estimate.critical_stage)
    terms = _by_profile(profile, expected, run) if profile else _without(run, expected, step_s, estimate)
    findings = [*_findings(run, profile, estimate)]
    published_s = point.reference.step_time_s if point.reference and point.verdict.ratio is not None else None
    return _attribution(point.name, "estimate", estimate.step_time_s, step_s, terms, findings, published_s)


def from_baseline(point: Point, runs: Sequence[Run], old: Point, old_runs: Sequence[Run]) -> Attribution | None:
    """Return the way from a baseline's point to the point; None where one of them was not measured."""
    if point.numbers is None or old.numbers is None:
        return None
    run, before = _with_profile(runs), _with_profile(old_runs)
    profile, old_profile = profile_of(run), profile_of(before)
    terms: list[Term] = []
    if profile and old_profile and profile.rank == old_profile.rank:
        terms = _by_profile(profile, _seconds(old_profile), run)
    else:
        terms = [Term("every term", None, None, NO_EVIDENCE)]
    findings = [*_findings(run, profile and old_profile)]
    if (old_rates := _rates(before)) and (rates := _rates(run)):
        findings.append(f"matrix rate of the slowest GPU: {min(old_rates):.0f} TFLOP/s before, {min(rates):.0f} now")
    times = old.numbers.step_time_s, point.numbers.step_time_s
    return _attribution(point.name, f"baseline, {old.name}", *times, terms, findings)


def _attribution(
    name: str,
    source: str,
    expected_s: float,
    measured_s: float,
    terms: Sequence[Term],
    findings: Sequence[str],
    published_s: float | None = None,
) -> Attribution:
    explained_s = sum(term.difference_s or 0.0 for term in terms)
    rest_s = measured_s - expected_s - explained_s
    return Attribution(name, source, expected_s, measured_s, tuple(terms), rest_s, tuple(findings), published_s)


def _with_profile(runs: Sequence[Run]) -> Run:
    return next((run for run in runs if profile_of(run)), runs[0])


def profile_of(run: Run, stage: int | None = None) -> StepProfile | None:
    """Return a profile that knows terms, of a rank of this pipeline stage where there is one."""
    known = [profile for profile in run.profiles if profile.terms]
    return next((profile for profile in known if stage == _stage(run, profile.rank)), known[0] if known else None)


def _stage(run: Run, rank: int | None) -> int:
    """Return a rank's pipeline stage: stages are the outermost of Megatron's groups."""
    return (rank or 0) * run.layout.get("PP", 1) // (run.gpus or 1)


def _seconds(profile: StepProfile) -> dict[str, float]:
    return {**{name: ms / 1e3 for name, ms in profile.terms.items()}, "host": profile.idle_ms / 1e3}


def _rows(names: Sequence[str], recomputes: bool, run: Run) -> Iterator[tuple[str, ...]]:
    """Yield terms, those together that a profile cannot tell apart."""
    # A rank waits for others in the collective that it needs most: of its layers, or of its gradients.
    sizes = {"tensor parallel": run.layout.get("TP", 1), "context parallel": run.layout.get("CP", 1)}
    place = next((name for name, size in sizes.items() if size > 1), "gradient reduction")
    together = [place, _WAITS], [*_COMPUTED] if recomputes else []
    taken: set[str] = set()
    for name in names:
        group = next((group for group in together if name in group), [name])
        if name not in taken:
            yield tuple(other for other in group if other in names)
        taken.update(group)


def _by_profile(profile: StepProfile, expected: Mapping[str, float], run: Run) -> list[Term]:
    measured, terms = _seconds(profile), []
    for names in _rows([*dict.fromkeys([*expected, *measured])], "recomputation" in expected, run):
        seconds, own = (sum(side.get(name, 0.0) for name in names) for side in (expected, measured))
        text = f"rank {profile.rank}'s profile{': idle' if names == ('host',) else ''}"
        terms.append(Term(", ".join(names), seconds, own, text))
    return terms


def _without(run: Run, expected: Mapping[str, float], step_s: float, estimate: Estimate) -> list[Term]:
    """Return the terms of a run without a profile, by what its ranks measured."""
    own, rates = [device.own_time_s for device in run.devices if device.own_time_s is not None], _rates(run)
    slower = estimate.rates.matrix_tflops / min(rates) - 1 if rates else 0.0
    terms, between = [], [name for name in _COMMUNICATION if name in expected]
    for name, seconds in expected.items():
        scaled = name in ("matrix products", "attention") and slower > SLOW_PRODUCTS
        measured, text = (seconds * (1 + slower), "slowest GPU's matrix rate") if scaled else (None, NO_EVIDENCE)
        if name not in between or not own:
            terms.append(Term(name, seconds, measured, text))
    if between and own:
        waited = step_s - statistics.fmean(own)
        names, seconds = ", ".join(between), sum(expected[name] for name in between)
        terms.append(Term(names, seconds, waited, f"what {len(own)} ranks waited"))
    return terms


def _rates(run: Run) -> list[float]:
    return [device.matrix_tflops for device in run.devices if device.matrix_tflops]


def _findings(run: Run, profile: StepProfile | None, estimate: Estimate | None = None) -> Iterator[str]:
    if profile is None:
        yield "profile=torch gives evidence of every term"
    elif estimate and (stage := _stage(run, profile.rank)) != estimate.critical_stage:
        yield f"the profile is of stage {stage}, the estimate's terms are of stage {estimate.critical_stage}"
    if profile:
        kinds = (GEMM, ATTENTION, OPTIMIZER, COMMUNICATION)
        others = [f"{item.name} {item.ms:,.1f}" for item in profile.classes if item.name not in kinds]
        yield f"other kernels and those of the model's ends (ms): {', '.join(others)}"
    if (rates := _rates(run)) and estimate:
        assumed = estimate.rates.matrix_tflops
        yield f"matrix rate of the slowest GPU before the training: {min(rates):.0f} TFLOP/s, assumed {assumed:.0f}"
    yield from throttling(run)
    for rank in run.ranks:
        if rank.straggler:
            by = "" if rank.slower is None else f" by {rank.slower:.0%}"
            yield f"rank {rank.rank} lags behind its peers{by}: {rank.measure}"
