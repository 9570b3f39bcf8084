"""What makes a run's numbers impossible, what in them is only worth a word, and what may explain a point's verdict."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from nemo_bench.report.model import Numbers, Run
from nemo_bench.report.statistics import NO_TIME, Steps

# A loss that has grown so much is no training any more.
_DIVERGED = 10
_HUGE_LOSS = 1e30
_SAME_LOSS = 0.001
# Printed rates are rounded, and printed a step; ours is a mean.
_SAME_RATE = 0.02
_SHOWN_FAULTS = 5


def of_runs(runs: Sequence[Run]) -> list[str]:
    """Return what repeats show; of several, each remark with the number of runs that it is of."""
    counts = Counter(text for run in runs for text in dict.fromkeys(_of_run(run)))
    return [f"{text} (in {count} of {len(runs)} runs)" if len(runs) > 1 else text for text, count in counts.items()]


def _of_run(run: Run) -> Iterator[str]:
    yield from run.remarks
    if run.source == "run folder" and run.gpu not in (None, "cpu") and run.gpu_reported is None:
        yield f"no driver names its GPU, which is {run.gpu} by its configuration"
    excluded = {**run.times.excluded, NO_TIME: len(run.steps) - run.times.steps} if run.times else {}
    if left_out := [f"{number} ({reason})" for reason, number in excluded.items() if number]:
        yield f"steps left out: {', '.join(left_out)}"
    texts = [
        f"straggling {run.unit}: rank {rank.rank} ({rank.measure}, {rank.slower:.0%} slower than the others)"
        for rank in run.ranks
        if rank.straggler
    ]
    yield from _first(texts, "stragglers")
    yield from throttling(run)


def throttling(run: Run) -> list[str]:
    """Return what held clocks back, by the driver, the worst first."""
    worst: dict[str, float] = {}  # text -> the largest share of steps in it
    for device in run.devices:
        # The power cap ends the rise of clocks at full load.
        shares = {reason: share for reason, share in device.throttled.items() if reason != "sw_power_cap"}
        if shares:
            host = f" on {device.host}" if device.host else ""
            reasons = (f"{reason.replace('_', ' ')} in {share:.0%} of its steps" for reason, share in shares.items())
            worst[f"clocks of rank {device.rank}'s GPU{host} held back: {', '.join(reasons)}"] = max(shares.values())
    return _first(sorted(worst, key=lambda text: -worst[text]), "ranks' GPUs")


def _first(texts: list[str], what: str) -> list[str]:
    more = len(texts) - _SHOWN_FAULTS
    return [*texts[:_SHOWN_FAULTS], f"and {more} more {what}"] if more > 0 else texts


def invalid(run: Run, numbers: Numbers | None) -> str | None:
    """Return why the run's numbers cannot be right, if they cannot."""
    if contradiction := _bad_steps(run.steps) or _bad_formats(run.record.config or {}):
        return contradiction
    if numbers is None or numbers.mfu_causal is None or numbers.mfu_causal < 1 or run.gpu == "cpu":
        return None
    keys = ("global_batch_size", "seq_length", "gpus", "model", "precision", "gpu")
    values = ", ".join(f"{key}={getattr(run, key)}" for key in keys)
    return f"{numbers.mfu_causal:.0%} of the GPUs' peak is impossible: one of these is wrong: {values}"


def _bad_steps(steps: Steps) -> str | None:
    losses = [(step, loss) for step, loss in zip(steps.step, steps.loss) if loss is not None]
    norms = _bad_norms(steps)
    if len(norms) == 1 and norms[0][0] != steps.last:
        norms = []  # a skipped step
    broken = [(step, loss) for step, loss in losses if not 0 < loss < _HUGE_LOSS]
    for name, bad in (("loss", broken), ("gradient norm", norms)):
        if bad:
            others = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            return f"the {name} is {bad[0][1]:g} at step {bad[0][0]}{others}"
    if losses:
        first, last = losses[0][1], losses[-1][1]
        limit = _DIVERGED * max(first, 1)
        if last > limit:
            grown = next(step for step, loss in losses if loss > limit)
            return f"the loss grows from {first:.4g} to {last:.4g}, tenfold at step {grown}"
    return None


def _bad_norms(steps: Steps) -> list[tuple[int, float]]:
    """Return the steps whose gradient norm is no number: a single one was skipped, as under loss scaling."""
    norms = zip(steps.step, steps.grad_norm)
    return [(step, norm) for step, norm in norms if norm is not None and not math.isfinite(norm)]


def _bad_formats(config: dict[str, Any]) -> str | None:
    """Return how the precision's name, a free label, contradicts its number formats."""
    precision = config.get("precision") or {}
    plain = "fp32" if str(precision.get("trainer_precision")) == "32" else "bf16"
    formats = "fp4" if precision.get("fp4") else "fp8" if precision.get("fp8") else plain
    if not precision or formats in str(precision["name"]):  # also fp8_cs, mxfp8
        return None
    return f"precision.name is {precision['name']}, and its number formats are {formats}'s"


def warnings(run: Run, numbers: Numbers | None, rates: dict[str, float]) -> Iterator[str]:
    """Yield what in the steps is odd without being impossible; `rates` are those that the log prints."""
    steps = run.steps
    strides = [after - before for before, after in itertools.pairwise(steps.step)]
    if not strides:
        return
    norms = _bad_norms(steps)
    first, last = run.first_loss or math.nan, run.last_loss or math.nan
    guessing = math.log(run.architecture.vocab_size) if run.architecture else math.inf
    gaps = sum(strides) - len(strides) * min(strides)
    if len(norms) == 1:
        yield f"step {norms[0][0]} has no finite gradient norm: it was skipped"
    if run.first_loss is None:
        yield "no loss was logged"
    if run.data != "mock" and last > first * (1 - _SAME_LOSS):  # of random tokens there is nothing to learn
        yield f"the loss does not fall: {first:.4g} to {last:.4g}"
    if first > 2 * guessing:
        yield f"the first loss is {first:.4g}; guessing gives {guessing:.3g}"
    if set(steps.grad_norm) == {0.0}:
        yield "the gradient norm is 0 throughout"
    if steps.step[0] > min(strides):
        yield f"the record begins at step {steps.step[0]}"
    if gaps > 0:
        yield f"{gaps} steps are missing between others"
    if numbers is None or run.times is None:
        return
    usual = numbers.at(run.times.median_s)
    tflops = (usual.tflops_per_gpu, usual.tflops_per_gpu_causal)
    ours = {"tokens_per_s_per_gpu": (usual.tokens_per_s_per_gpu,), "tflops_per_gpu": tflops}
    for name, printed in rates.items():
        known = [value for value in ours[name] if value is not None]
        if known and printed > 0 and all(abs(value / printed - 1) > _SAME_RATE for value in known):
            unit = "tokens/s a GPU" if name.startswith("tokens") else "TFLOP/s a GPU"
            yield f"the log prints {printed:,.4g} {unit}, and this report finds {known[0]:,.4g}"
