"""Estimates on the terminal, in 80 columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from nemo_bench.planning.answer import Answer
from nemo_bench.planning.search import Found

WIDTH = 80
_GREATEST_SHARE_BAR = 20  # characters


def make_console() -> Console:
    """Return a console of the terminal's width, at least 80 columns wide."""
    console = Console(highlight=False)
    return console if console.width >= WIDTH else Console(width=WIDTH, highlight=False)


def print_answer(console: Console, answer: Answer) -> None:
    """Print a point's estimate, what it is made of, and what it rests on."""
    estimate, (low, high) = answer.estimate, answer.range_s
    console.print(f"[bold]{answer.name}[/bold]   {answer.layout}")
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    facts.add_row("step time", f"[bold]{seconds(answer.step_time_s)} s[/bold]   {seconds(low)} to {seconds(high)}")
    if answer.calibration is not None:
        facts.add_row("uncalibrated", f"{seconds(estimate.step_time_s)} s")
        facts.add_row("calibrated by", f"{answer.calibration.source}: factor {answer.calibration.factor:.4f}")
    facts.add_row("tokens/s", f"{answer.tokens_per_s:,.0f}")
    if answer.mfu is not None and answer.mfu_causal is not None:
        facts.add_row("MFU", f"{answer.mfu:.2%} (causal attention: {answer.mfu_causal:.2%})")
    facts.add_row("days", f"{answer.days:.1f} for {answer.total_tokens:.3g} tokens")
    if answer.memory_gib is not None:
        has = "" if answer.gpu_memory_gib is None else f" of {answer.gpu_memory_gib:g}"
        facts.add_row("memory", f"{answer.memory_gib:.0f}{has} GiB a GPU")
    for row in answer.published:
        facts.add_row("published", f"{row.step_time_s:g} s, {row.reference}: the estimate is {answer.error(row):+.1%}")
    console.print(facts)
    console.print(_breakdown(answer))
    for line in remarks(answer):
        console.print(line)


def _breakdown(answer: Answer) -> Table:
    estimate = answer.estimate
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(f"of stage {estimate.critical_stage}, which has most work", min_width=32)
    table.add_column("s", justify="right")
    table.add_column("share", justify="right")
    table.add_column("")
    greatest = max(estimate.breakdown_s.values())
    for name, part in estimate.breakdown_s.items():
        if part:
            bar = "▇" * round(part / greatest * _GREATEST_SHARE_BAR)
            table.add_row(name, f"{part:.3f}", f"{part / estimate.step_time_s:.1%}", bar)
    table.add_section()
    table.add_row("sum", f"{estimate.step_time_s:.3f}", "100.0%")
    return table


def remarks(answer: Answer) -> list[str]:
    """Return what an estimate rests on, and what it leaves open."""
    estimate, rates = answer.estimate, answer.estimate.rates
    versions = ", ".join(f"{name} {rates.tables['versions'][name]}" for name in ("torch", "transformer_engine"))
    lines = [f"Rates: {rates.derived_from or rates.gpu}, {rates.tables['date']}, {versions}. Other software differs."]
    if rates.derived_from:
        lines.append(f"{rates.gpu}: derived from {rates.derived_from} by its memory's speed; never measured.")
    if not estimate.measured_shape:
        lines.append("The layer's shape was not measured: interpolated by product size (docs/estimate.md: up to 3%).")
    if estimate.layer_host_ms is not None:
        host = f"A layer: {estimate.layer_gpu_ms:.1f} ms on the GPU, about {estimate.layer_host_ms:.1f} ms to launch"
        lines.append(f"{host}{': the host may be the limit' if estimate.host_is_limit else ''}.")
    return lines


def print_row(console: Console, answer: Answer, *, first: bool) -> None:
    """Print a point of a sweep as a row, below the header if it is the first."""
    columns = ("point", "step s", "from", "to", "tokens/s", "MFU", "GiB", "published")
    widths = (-24, 7, 7, 7, 10, 6, 4, 13)
    published = "-"
    if answer.published:
        row = answer.published[0]
        published = f"{row.step_time_s:g} {answer.error(row):+.1%}"
    low, high = answer.range_s
    cells = (
        f"{answer.name}{' *' if answer.estimate.host_is_limit else ''}",
        seconds(answer.step_time_s),
        seconds(low),
        seconds(high),
        f"{answer.tokens_per_s:,.0f}",
        "-" if answer.mfu is None else f"{answer.mfu:.1%}",
        "-" if answer.memory_gib is None else f"{answer.memory_gib:.0f}",
        published,
    )
    for line in (columns, cells) if first else (cells,):
        text = "".join(cell.ljust(-width) if width < 0 else cell.rjust(width) for cell, width in zip(line, widths))
        console.print(text, soft_wrap=True)


def print_search(console: Console, layouts: Sequence[Found]) -> None:
    """Print the fastest layouts, each with the parts that tell them apart and the line that chooses it."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", "step s", "GiB", "products", "parallel", "bubble", "reduction", "rest"):
        table.add_column(name, justify="right")
    for number, layout in enumerate(layouts, 1):
        parts = dict(layout.answer.estimate.breakdown_s)
        step = sum(parts.values())
        groups = {
            "products": parts.pop("matrix products") + parts.pop("attention"),
            "parallel": parts.pop("tensor parallel") + parts.pop("waits in lockstep") + parts.pop("context parallel"),
            "bubble": parts.pop("pipeline bubble and p2p"),
            "reduction": parts.pop("gradient reduction") + parts.pop("parameter gathering"),
        }
        groups["rest"] = sum(parts.values())
        shares = [f"{part / step:.1%}" for part in groups.values()]
        memory = layout.answer.memory_gib
        cells = (seconds(layout.answer.step_time_s), "-" if memory is None else f"{memory:.0f}")
        table.add_row(str(number), *cells, *shares)
    console.print(table)
    for number, layout in enumerate(layouts, 1):
        console.print(f"{number:2}  {layout.answer.layout}\n    {' '.join(layout.overrides)}", soft_wrap=True)


def seconds(time_s: float) -> str:
    """Return seconds with four digits."""
    return f"{time_s:.4g}" if time_s < 1000 else f"{time_s:.0f}"
