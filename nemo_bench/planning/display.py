"""Estimates on the terminal, in 80 columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Column, Table

from nemo_bench.config import TrainConfig
from nemo_bench.flops import FlopsConvention
from nemo_bench.planning.answer import Answer
from nemo_bench.planning.search import overrides

_ROW = "{:24}{:>7}{:>7}{:>7}{:>10}{:>7}{:>4}{:>13}"
# Parts of the breakdown that tell layouts apart.
_GROUPS = {
    "products": ("matrix products", "attention"),
    "parallel": ("tensor parallel", "waits in lockstep", "context parallel"),
    "bubble": ("pipeline bubble and p2p",),
    "reduction": ("gradient reduction", "parameter gathering"),
}


def print_answer(console: Console, answer: Answer) -> None:
    """Print a point's estimate, what it is made of, and what it rests on."""
    estimate, rates = answer.estimate, answer.estimate.rates
    low, high = map(_digits, answer.range_s)
    facts = {"step time": f"[bold]{_digits(answer.step_time_s)} s[/bold]   {low} to {high}"}
    if calibration := answer.calibration:
        facts["uncalibrated"] = f"{_digits(estimate.step_time_s)} s"
        facts["calibrated by"] = f"{calibration.source}: factor {calibration.factor:.4f}"
    facts["tokens/s"] = f"{answer.tokens_per_s:,.0f}"
    facts["MFU"] = _share(answer.mfu(FlopsConvention.RECIPE))
    facts["MFU, causal attention"] = _share(answer.mfu(FlopsConvention.CAUSAL))
    facts["days"] = f"{answer.days:.1f} for {answer.cfg.total_tokens:.3g} tokens"
    facts["memory"] = f"{_gib(answer)} of {answer.cfg.gpu.memory_gib or 0:g} GiB a GPU"
    for row, error in answer.published():
        facts[f"published, {row.reference}"] = f"{row.step_time_s:g} s: the estimate is {error:+.1%}"
    console.print(f"[bold]{answer.name}[/bold]   {answer.layout}")
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for fact in facts.items():
        table.add_row(*fact)
    title = f"of stage {estimate.critical_stage}, which has most work"
    parts = Table(title, *_right("s", "share"), "", box=box.SIMPLE_HEAD, pad_edge=False)
    greatest = max(estimate.breakdown_s.values())
    for name, part in estimate.breakdown_s.items():
        if part:
            bar = "▇" * round(part / greatest * 20)
            parts.add_row(name, f"{part:.3f}", f"{part / estimate.step_time_s:.1%}", bar)
    parts.add_section()
    parts.add_row("sum", f"{estimate.step_time_s:.3f}", "100.0%")
    console.print(table, parts)
    versions = ", ".join(f"{name} {rates.tables['versions'][name]}" for name in ("torch", "transformer_engine"))
    console.print(
        f"Rates: {rates.derived_from or rates.gpu}, {rates.tables['date']}, {versions}. Other software differs."
    )
    if rates.derived_from:
        console.print(f"{rates.gpu}: derived from {rates.derived_from} by its memory's speed; never measured.")
    if not estimate.measured_shape:
        console.print("This layer's shape was not measured: interpolated by product size (docs/estimate.md: up to 3%).")
    if estimate.layer_host_ms is not None:
        limit = ": the host may be the limit" if estimate.host_is_limit else ""
        host = f"about {estimate.layer_host_ms:.1f} ms to launch{limit}."
        console.print(f"A layer: {estimate.layer_gpu_ms:.1f} ms on the GPU, {host}")


def print_row(console: Console, answer: Answer, *, first: bool) -> None:
    """Print a point of a sweep as a row, below the header if it is the first; `*`: the host may be the limit."""
    if first:
        header = _ROW.format("point", "step s", "from", "to", "tokens/s", "MFU", "GiB", "published")
        console.print(header, soft_wrap=True)
    published = answer.published()
    row = _ROW.format(
        answer.name + " *" * answer.estimate.host_is_limit,
        *map(_digits, (answer.step_time_s, *answer.range_s)),
        f"{answer.tokens_per_s:,.0f}",
        _share(answer.mfu(FlopsConvention.RECIPE)),
        _gib(answer),
        f"{published[0][0].step_time_s:g} {published[0][1]:+.1%}" if published else "-",
    )
    console.print(row, soft_wrap=True)


def print_search(console: Console, cfg: TrainConfig, answers: Sequence[Answer]) -> None:
    """Print the fastest layouts, each with the parts that tell them apart and the line that chooses it."""
    table = Table(*_right("", "step s", "GiB", *_GROUPS, "rest"), box=box.SIMPLE_HEAD, pad_edge=False)
    for number, answer in enumerate(answers, 1):
        parts, step_s = answer.estimate.breakdown_s, answer.estimate.step_time_s
        shares = [sum(parts[part] for part in group) / step_s for group in _GROUPS.values()]
        cells = [str(number), _digits(answer.step_time_s), _gib(answer)]
        table.add_row(*cells, *(f"{share:.1%}" for share in [*shares, 1 - sum(shares)]))
    console.print(table)
    for number, answer in enumerate(answers, 1):
        console.print(f"{number:2}  {answer.layout}\n    {' '.join(overrides(cfg, answer.cfg))}", soft_wrap=True)


def _right(*names: str) -> list[Column]:
    return [Column(name, justify="right") for name in names]


def _digits(time_s: float) -> str:
    return f"{time_s:.4g}" if time_s < 1000 else f"{time_s:.0f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _gib(answer: Answer) -> str:
    return "-" if answer.memory_gib is None else f"{answer.memory_gib:.0f}"
