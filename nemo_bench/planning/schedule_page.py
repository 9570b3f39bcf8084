"""The schedule of an estimate as one HTML page that needs nothing else: stages over time."""

from __future__ import annotations

import html
import json
from typing import Any

from nemo_bench.planning.answer import Answer
from nemo_bench.report.page import plotly_script

_COLOURS = {"forward": "#2f7fd1", "backward": "#cf6a12"}
_SHOWN = 4000  # passes; of more, which would make the page slow, the first and the last


def render(answer: Answer) -> str:
    """Return the page as text."""
    title, estimate = html.escape(f"{answer.name}: {answer.layout}"), answer.estimate
    figure = json.dumps(_figure(answer)).replace("</", "<\\/")
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title></head>\n'
        f'<body style="font-family: sans-serif"><h1>{title}</h1>\n'
        f"<p>Step {estimate.step_time_s:.4g} s by rates and constants.</p>\n"
        f'<div id="schedule"></div>\n<script>{plotly_script()}</script>\n'
        f'<script>const figure = {figure}; Plotly.newPlot("schedule", figure.data, figure.layout)</script>\n'
        "</body></html>\n"
    )


def _figure(answer: Answer) -> dict[str, Any]:
    """Return each pass of a micro-batch as a bar on its stage's line."""
    events = sorted(answer.estimate.timeline.events(), key=lambda event: event.start_ms)
    if len(events) > _SHOWN:
        events = events[: _SHOWN // 2] + events[-_SHOWN // 2 :]
    traces = []
    for name, colour in _COLOURS.items():
        shown = [event for event in events if event.forward == (name == "forward")]
        times = {
            "base": [round(event.start_ms / 1e3, 5) for event in shown],
            "x": [round((event.end_ms - event.start_ms) / 1e3, 5) for event in shown],
            "y": [f"stage {event.stage}" for event in shown],
            "hovertext": [f"micro-batch {event.micro_batch}, chunk {event.chunk}" for event in shown],
        }
        marker = {"color": colour, "line": {"width": 0.5, "color": "white"}}
        traces.append({"type": "bar", "orientation": "h", "name": name, "marker": marker, **times})
    stages = {"categoryorder": "category descending", "type": "category"}
    height = 140 + 60 * answer.estimate.timeline.pipeline.stages
    layout = {"barmode": "overlay", "height": height, "xaxis": {"title": {"text": "s"}}, "yaxis": stages}
    return {"data": traces, "layout": layout}
