"""What the records of a point's runs show that may explain its verdict."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from nemo_bench.report.model import Run
from nemo_bench.report.numbers import unit_name

# Beyond these, a run's steps are worth a word.
DRIFT = 0.02
SPREAD = 0.05
SHOWN_FAULTS = 5

_PERCENT = re.compile(r"\d+(?:\.\d+)?%")


def of_runs(runs: Sequence[Run]) -> list[str]:
    """Return what repeats show, each remark once: with the range of its percentages, and in how many runs."""
    remarks: dict[str, list[str]] = {}
    for run in runs:
        for text in _of_run(run):
            remarks.setdefault(_PERCENT.sub("%", text), []).append(text)
    return [_merged(texts, len(runs)) for texts in remarks.values()]


def _merged(texts: Sequence[str], runs: int) -> str:
    columns = zip(*(_PERCENT.findall(text) for text in texts))
    ends = [(min(values, key=_percent), max(values, key=_percent)) for values in columns]
    ranges = iter(low if low == high else f"{low} to {high}" for low, high in ends)
    text = _PERCENT.sub(lambda _: next(ranges), texts[0])
    if runs == 1:
        return text
    where = f"all {runs}" if len(texts) == runs else f"{len(texts)} of {runs}"
    return f"{text} (in {where} runs)"


def _percent(text: str) -> float:
    return float(text.rstrip("%"))


def _of_run(run: Run) -> Iterator[str]:
    times = run.times
    if times is not None:
        pauses = [f"{number} after a {reason}" for reason, number in times.excluded.items() if reason != "restart"]
        if pauses:
            yield f"disturbed steps, left out: {', '.join(pauses)}"
        if times.excluded.get("restart"):
            yield "the run was restarted"
        if abs(times.drift) > DRIFT:
            yield f"steps became {abs(times.drift):.1%} {'slower' if times.drift > 0 else 'faster'} during the run"
        if times.spread > SPREAD:
            yield f"steps spread by {times.spread:.0%} of their median (5% to 95% quantile)"
    slow = [rank for rank in run.ranks if rank.straggler]
    for rank in slow[:SHOWN_FAULTS]:
        by = "" if rank.slower is None else f", {rank.slower:.0%} slower than the others"
        yield f"straggling {unit_name(run)}: rank {rank.rank} ({rank.measure}{by})"
    if len(slow) > SHOWN_FAULTS:
        yield f"and {len(slow) - SHOWN_FAULTS} more stragglers"
    yield from throttling(run)


def throttling(run: Run) -> Iterator[str]:
    """Yield what the driver said during the steps of clocks held back.

    The power cap is no fault: at full load it is what ends the clocks' rise. It is shown elsewhere, not blamed.
    """
    faults = [
        (max(shares.values()), device, shares)
        for device in run.devices
        if (shares := {reason: share for reason, share in device.throttled.items() if reason != "sw_power_cap"})
    ]
    faults.sort(key=lambda fault: (-fault[0], fault[1].rank))
    for _, device, shares in faults[:SHOWN_FAULTS]:
        texts = [f"{reason.replace('_', ' ')} in {share:.0%} of its steps" for reason, share in shares.items()]
        host = f" on {device.host}" if device.host else ""
        yield f"clocks of rank {device.rank}'s GPU{host} held back: {', '.join(texts)}"
    if len(faults) > SHOWN_FAULTS:
        yield f"and of {len(faults) - SHOWN_FAULTS} more ranks' GPUs"
