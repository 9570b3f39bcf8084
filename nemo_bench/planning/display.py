"""Estimates on the terminal, in 80 columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from nemo_bench.config import TrainConfig
from nemo_bench.flops import FlopsConvention
from nemo_bench.planning.answer import Answer
from nemo_bench.planning.search import overrides

WIDTH = 80
_BAR = 20  # characters of the greatest share
_SWEEP = {"point": -24, "step s": 7, "from": 7, "to": 7, "tokens/s": 10, "MFU": 6, "GiB": 4, "published": 13}


def make_console() -> Console:
    """Return a console of the terminal's width, at least 80 columns wide."""
    console = Console(highlight=False)
    return console if console.width >= WIDTH else Console(width=WIDTH, highlight=False)


def print_answer(console: Console, answer: Answer) -> None:
    """Print a point's estimate, what it is made of, and what it rests on."""
    low, high = map(_digits, answer.range_s)
    facts = {"step time": f"[bold]{_digits(answer.step_time_s)} s[/bold]   {low} to {high}"}
    if calibration := answer.calibration:
        facts["uncalibrated"] = f"{_digits(answer.estimate.step_time_s)} s"
        facts["calibrated by"] = f"{calibration.source}: factor {calibration.factor:.4f}"
    facts["tokens/s"] = f"{answer.tokens_per_s:,.0f}"
    facts["MFU"] = f"{_share(answer.mfu(FlopsConvention.RECIPE))}"
    facts["MFU, causal attention"] = f"{_share(answer.mfu(FlopsConvention.CAUSAL))}"
    facts["days"] = f"{answer.days:.1f} for {answer.cfg.total_tokens:.3g} tokens"
    facts["memory"] = f"{_gib(answer)} of {answer.cfg.gpu.memory_gib or 0:g} GiB a GPU"
    for row, error in answer.published():
        facts[f"published, {row.reference}"] = f"{row.step_time_s:g} s: the estimate is {error:+.1%}"
    console.print(f"[bold]{answer.name}[/bold]   {answer.layout}")
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for fact in facts.items():
        table.add_row(*fact)
    console.print(table)
    console.print(_breakdown(answer))
    for line in _remarks(answer):
        console.print(line)


def _breakdown(answer: Answer) -> Table:
    estimate = answer.estimate
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(f"of stage {estimate.critical_stage}, which has most work", min_width=32)
    for name in ("s", "share"):
        table.add_column(name, justify="right")
    table.add_column("")
    greatest = max(estimate.breakdown_s.values())
    for name, part in estimate.breakdown_s.items():
        if part:
            bar = "▇" * round(part / greatest * _BAR)
            table.add_row(name, f"{part:.3f}", f"{part / estimate.step_time_s:.1%}", bar)
    table.add_section()
    table.add_row("sum", f"{estimate.step_time_s:.3f}", "100.0%")
    return table


def _remarks(answer: Answer) -> list[str]:
    """Return what an estimate rests on, and what it leaves open."""
    estimate, rates = answer.estimate, answer.estimate.rates
    versions = ", ".join(f"{name} {rates.tables['versions'][name]}" for name in ("torch", "transformer_engine"))
    lines = [f"Rates: {rates.derived_from or rates.gpu}, {rates.tables['date']}, {versions}. Other software differs."]
    if rates.derived_from:
        lines.append(f"{rates.gpu}: derived from {rates.derived_from} by its memory's speed; never measured.")
    if not estimate.measured_shape:
        lines.append("The layer's shape was not measured: interpolated by product size (docs/estimate.md: up to 3%).")
    if estimate.layer_host_ms is not None:
        limit = ": the host may be the limit" if estimate.host_is_limit else ""
        host = f"about {estimate.layer_host_ms:.1f} ms to launch{limit}."
        lines.append(f"A layer: {estimate.layer_gpu_ms:.1f} ms on the GPU, {host}")
    return lines


def print_row(console: Console, answer: Answer, *, first: bool) -> None:
    """Print a point of a sweep as a row, below the header if it is the first; `*`: the host may be the limit."""
    mfu, published = answer.mfu(FlopsConvention.RECIPE), answer.published()
    cells = [
        f"{answer.name}{' *' if answer.estimate.host_is_limit else ''}",
        *map(_digits, (answer.step_time_s, *answer.range_s)),
        f"{answer.tokens_per_s:,.0f}",
        "-" if mfu is None else f"{mfu:.1%}",
        _gib(answer),
        f"{published[0][0].step_time_s:g} {published[0][1]:+.1%}" if published else "-",
    ]
    for line in [[*_SWEEP], cells] if first else [cells]:
        widths = zip(line, _SWEEP.values())
        text = "".join(cell.ljust(-width) if width < 0 else cell.rjust(width) for cell, width in widths)
        console.print(text, soft_wrap=True)


def print_search(console: Console, cfg: TrainConfig, answers: Sequence[Answer]) -> None:
    """Print the fastest layouts, each with the parts that tell them apart and the line that chooses it."""
    groups = {
        "products": ("matrix products", "attention"),
        "parallel": ("tensor parallel", "waits in lockstep", "context parallel"),
        "bubble": ("pipeline bubble and p2p",),
        "reduction": ("gradient reduction", "parameter gathering"),
    }
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", "step s", "GiB", *groups, "rest"):
        table.add_column(name, justify="right")
    for number, answer in enumerate(answers, 1):
        parts, step_s = answer.estimate.breakdown_s, answer.estimate.step_time_s
        shares = [sum(parts[part] for part in group) / step_s for group in groups.values()]
        cells = [str(number), _digits(answer.step_time_s), _gib(answer)]
        table.add_row(*cells, *(f"{share:.1%}" for share in [*shares, 1 - sum(shares)]))
    console.print(table)
    for number, answer in enumerate(answers, 1):
        console.print(f"{number:2}  {answer.layout}\n    {' '.join(overrides(cfg, answer.cfg))}", soft_wrap=True)


def _digits(time_s: float) -> str:
    return f"{time_s:.4g}" if time_s < 1000 else f"{time_s:.0f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _gib(answer: Answer) -> str:
    return "-" if answer.memory_gib is None else f"{answer.memory_gib:.0f}"
