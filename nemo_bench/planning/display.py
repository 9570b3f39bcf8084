"""Estimates on the terminal, in 80 columns, and their schedule as a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Column, Table

from nemo_bench.config import TrainConfig
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
        facts["uncalibrated"] = f"{_digits(estimate.step_time_s)} s, times {calibration.factor:.4f}"
        facts["calibrated by"] = calibration.source
    facts["tokens/s"] = f"{answer.tokens_per_s:,.0f}"
    facts["MFU"] = _share(answer.mfu())
    facts["MFU, causal attention"] = _share(answer.mfu(causal=True))
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
    software = ", ".join(f"{name} {rates.tables['versions'][name]}" for name in ("torch", "transformer_engine"))
    console.print(f"Rates: {rates.derived_from or rates.gpu}, {rates.tables['date']}, {software}.")
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
        console.print(_ROW.format("point", "step s", "from", "to", "tokens/s", "MFU", "GiB", "published"))
    published = answer.published()
    cells = (
        answer.name + " *" * answer.estimate.host_is_limit,
        *map(_digits, (answer.step_time_s, *answer.range_s)),
        f"{answer.tokens_per_s:,.0f}",
        _share(answer.mfu()),
        _gib(answer),
        f"{published[0][0].step_time_s:g} {published[0][1]:+.1%}" if published else "-",
    )
    console.print(_ROW.format(*cells), soft_wrap=True)


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


def schedule_page(answer: Answer) -> str:
    """Return a page of HTML that needs nothing else: each pass of a micro-batch as a bar on its stage's line."""
    from plotly.io import to_html

    estimate = answer.estimate
    events = sorted(estimate.timeline.events(), key=lambda event: event.start_ms)
    drawn, traces = events[:4000], list[dict[str, Any]]()  # more would make the page slow
    for name, colour in (("forward", "#2f7fd1"), ("backward", "#cf6a12")):
        shown = [event for event in drawn if event.forward == (name == "forward")]
        times = {
            "base": [round(event.start_ms / 1e3, 5) for event in shown],
            "x": [round((event.end_ms - event.start_ms) / 1e3, 5) for event in shown],
            "y": [f"stage {event.stage}" for event in shown],
            "hovertext": [f"micro-batch {event.micro_batch}, chunk {event.chunk}" for event in shown],
        }
        marker = {"color": colour, "line": {"width": 0.5, "color": "white"}}
        traces.append({"type": "bar", "orientation": "h", "name": name, "marker": marker, **times})
    step = f"Step {estimate.step_time_s:.4g} s by rates and constants; {len(drawn):,} of {len(events):,} passes"
    layout = {
        "height": 140 + 60 * estimate.timeline.pipeline.stages,
        "title": {"text": f"{answer.name}: {answer.layout}<br>{step}"},
        "barmode": "overlay",
        "xaxis": {"title": {"text": "s"}},
        "yaxis": {"categoryorder": "category descending", "type": "category"},
    }
    return str(to_html({"data": traces, "layout": layout}, validate=False, div_id="schedule"))


def _right(*names: str) -> list[Column]:
    return [Column(name, justify="right") for name in names]


def _digits(time_s: float) -> str:
    return f"{time_s:.4g}" if time_s < 1000 else f"{time_s:.0f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _gib(answer: Answer) -> str:
    return "-" if answer.memory_gib is None else f"{answer.memory_gib:.0f}"
