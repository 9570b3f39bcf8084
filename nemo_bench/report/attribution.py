"""Where a point's seconds went: each term of its estimate, or of a baseline, beside what the run's evidence gives.

Evidence is a profile (`profile=torch`), whose kernels belong to terms (kernel_classes.term_of); without one, the rate
of matrix products and the waits that ranks measured. A term without evidence explains nothing; the rest stands as such.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from nemo_bench.estimate.step import Estimate
from nemo_bench.record.machine import latest_check
from nemo_bench.report import remarks
from nemo_bench.report.kernel_classes import ATTENTION, COMMUNICATION, GEMM, OPTIMIZER
from nemo_bench.report.model import Attribution, Run, Term
from nemo_bench.report.points import Group
from nemo_bench.report.profile import StepProfile

# A matrix rate this much below what the estimate takes explains slow products; less is the warmth of a GPU.
SLOW_PRODUCTS = 0.02
UNEXPLAINED, SHOWN_PLACES = "unexplained", 4
_PRODUCTS = ("matrix products", "attention")
_COMPUTED = (*_PRODUCTS, "other kernels", "recomputation")
_OWN = (*_COMPUTED, "embedding, output layer, loss", "optimizer", "host")  # no other rank's


def ways(group: Group, old: Group | None) -> Iterator[Attribution]:
    """Yield the ways to a point, if it was measured, from what it should take and from a baseline's point."""
    point, estimate = group.point, group.estimate
    if point.numbers is None:
        return
    step_s, run, profile = point.numbers.step_time_s, *_profiled(group)
    if estimate:
        expected = {name: seconds for name, seconds in estimate.breakdown_s.items() if seconds}
        terms = [*(_by_profile(profile, expected, run) if profile else _by_ranks(run, expected, step_s, estimate))]
        source, start_s = "estimate", estimate.step_time_s
        if point.reference and point.verdict.ratio is not None:
            source, start_s = "published", point.reference.step_time_s
            terms.insert(0, Term("estimate", start_s, estimate.step_time_s, "docs/estimate.md"))
        yield _way(point.name, source, start_s, step_s, terms, _findings(run, profile, estimate))
    if old and old.point.numbers:
        _, old_profile = _profiled(old)
        terms = [*_by_profile(profile, _seconds(old_profile), run)] if profile and old_profile else []
        yield _way(point.name, old.point.name, old.point.numbers.step_time_s, step_s, terms, _findings(run, profile))


def _way(name: str, source: str, start_s: float, step_s: float, terms: list[Term], said: Iterator[str]) -> Attribution:
    rest_s = step_s - start_s - sum(term.more_s for term in terms)
    rest = Term(UNEXPLAINED, 0.0, rest_s, f"{abs(rest_s) / step_s:.1%} of step")
    return Attribution(name, source, start_s, step_s, (*terms, rest), tuple(said))


def _profiled(group: Group) -> tuple[Run, StepProfile | None]:
    """Return a run with a profile that knows terms, of a rank of the estimate's stage where there is one."""
    known = [(run, profile) for run in group.final for profile in run.profiles if profile.terms]
    stage = group.estimate.critical_stage if group.estimate else 0
    return next((pair for pair in known if _stage(*pair) == stage), known[0] if known else (group.run, None))


def _stage(run: Run, profile: StepProfile) -> int:
    """Return the pipeline stage of a profile's rank: stages are the outermost of Megatron's groups."""
    return profile.rank * run.layout.get("PP", 1) // (run.gpus or 1)


def _seconds(profile: StepProfile) -> dict[str, float]:
    return {**{name: ms / 1e3 for name, ms in profile.terms.items()}, "host": profile.idle_ms / 1e3}


def _by_profile(profile: StepProfile, expected: Mapping[str, float], run: Run) -> Iterator[Term]:
    """Yield the terms of a profile, those in one that it cannot tell apart."""
    sizes = {"tensor parallel": run.layout.get("TP", 1), "context parallel": run.layout.get("CP", 1)}
    # A rank waits for others in the collective that it needs most: of its layers, or of its gradients.
    waits = next((name for name, size in sizes.items() if size > 1), "gradient reduction")
    joined = dict.fromkeys((waits, "waits in lockstep"), f"{waits}, waits")
    if "recomputation" in expected:
        joined |= dict.fromkeys(_COMPUTED, ", ".join(_COMPUTED))
    before, after = defaultdict[str, float](float), defaultdict[str, float](float)
    for side, terms in ((before, expected), (after, _seconds(profile))):
        for name, seconds in terms.items():
            side[joined.get(name, name)] += seconds
    for name in dict.fromkeys([*before, *after]):
        yield Term(name, before[name], after[name], f"rank {profile.rank} profile")


def _by_ranks(run: Run, expected: Mapping[str, float], step_s: float, estimate: Estimate) -> Iterator[Term]:
    """Yield the terms of a run without a profile, by what its ranks and the machine's check measured."""
    own = [device.own_time_s for device in run.devices if device.own_time_s is not None]
    assumed, (rate, source) = estimate.rates.matrix_tflops, _slowest_rate(run)
    slower = assumed / (rate or assumed) - 1
    for name, seconds in expected.items():
        if name in _PRODUCTS and slower > SLOW_PRODUCTS:
            yield Term(name, seconds, seconds * (1 + slower), f"slowest GPU's matrix rate, {source}")
        elif name in _OWN or not own:
            yield Term(name, seconds)
    if own and (names := [name for name in expected if name not in _OWN]):
        waited_s = step_s - statistics.fmean(own)
        yield Term(", ".join(names), sum(expected[name] for name in names), waited_s, f"waits of {len(own)} ranks")


def machine_check(run: Run) -> dict[str, Any]:
    """Return the last machine check of the run's cluster; empty without one."""
    config = run.record.config or {}
    return (config and latest_check(config["stage_path"], config["cluster"]["name"], str(run.gpu))) or {}


def _slowest_rate(run: Run) -> tuple[float, str]:
    """Return the least bf16 matrix rate of a GPU (TFLOP/s; 0: not measured), and what measured it."""
    if checked := machine_check(run).get("rates", {}).get("bf16_tflops"):
        return float(checked["least"]), "machine check"
    rates = [device.matrix_tflops for device in run.devices if device.matrix_tflops]
    return min(rates, default=0.0), "before the training"


def _findings(run: Run, profile: StepProfile | None, estimate: Estimate | None = None) -> Iterator[str]:
    if profile is None:
        yield "profile=torch gives evidence of every term"
    else:
        known = (GEMM, ATTENTION, OPTIMIZER, COMMUNICATION)
        others = ", ".join(f"{item.name} {item.ms:,.1f}" for item in profile.classes if item.name not in known)
        yield f"other kernels, with the model's ends (ms): {others}"
        if estimate and (stage := _stage(run, profile)) != estimate.critical_stage:
            yield f"profile of stage {stage}, estimate of stage {estimate.critical_stage}"
    rate, source = _slowest_rate(run)
    if rate and estimate:
        assumed = estimate.rates.matrix_tflops
        yield f"matrix rate of the slowest GPU ({source}): {rate:.0f} TFLOP/s, assumed {assumed:.0f}"
    for finding in (check := machine_check(run)).get("findings", ()):
        places = ", ".join(f"{place['host']} GPU {place['gpu']}" for place in finding["where"][:SHOWN_PLACES])
        yield f"machine check of {check['checked_at']}: {places}: {finding['what']}"
    yield from remarks.of_runs([run])
