"""The schedule of an estimate as one HTML page that needs nothing else: stages over time."""

from __future__ import annotations

import html
import json
from typing import Any

from nemo_bench.planning.answer import Answer
from nemo_bench.report.page import plotly_script

_COLOURS = {True: "#2f7fd1", False: "#cf6a12"}
# More passes than this make the page slow: the first and the last are shown.
_SHOWN = 4000


def render(answer: Answer) -> str:
    """Return the page as text."""
    title = html.escape(f"{answer.name}: {answer.layout}")
    figure = json.dumps(schedule_figure(answer)).replace("</", "<\\/")
    step = f"step {answer.estimate.step_time_s:.4g} s by rates and constants"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f"<style>body {{ font-family: sans-serif; margin: 2rem }}</style></head>\n"
        f"<body><h1>{title}</h1><p>{step}; stage {answer.estimate.critical_stage} has most work.</p>\n"
        f'<div id="schedule"></div>\n<script>{plotly_script()}</script>\n'
        f'<script>const figure = {figure}; Plotly.newPlot("schedule", figure.data, figure.layout)</script>\n'
        "</body></html>\n"
    )


def schedule_figure(answer: Answer) -> dict[str, Any]:
    """Return each pass of a micro-batch as a bar on its stage's line, forward and backward."""
    timeline = answer.estimate.timeline
    events = timeline.events()
    if len(events) > _SHOWN:
        events = sorted(events, key=lambda event: event.start_ms)
        events = events[: _SHOWN // 2] + events[-_SHOWN // 2 :]
    traces = []
    for forward, name in ((True, "forward"), (False, "backward")):
        shown = [event for event in events if event.forward is forward]
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": name,
                "base": [round(event.start_ms / 1e3, 5) for event in shown],
                "x": [round((event.end_ms - event.start_ms) / 1e3, 5) for event in shown],
                "y": [f"stage {event.stage}" for event in shown],
                "text": [f"{event.micro_batch}" for event in shown],
                "hovertext": [f"micro-batch {event.micro_batch}, chunk {event.chunk}" for event in shown],
                "textposition": "inside",
                "insidetextanchor": "middle",
                "marker": {"color": _COLOURS[forward], "line": {"width": 0.5, "color": "white"}},
            }
        )
    stages = timeline.pipeline.stages
    names = [f"stage {stage}" for stage in reversed(range(stages))]
    layout = {
        "barmode": "overlay",
        "height": 140 + 60 * stages,
        "xaxis": {"title": {"text": "s"}},
        "yaxis": {"type": "category", "categoryorder": "array", "categoryarray": names},
        "margin": {"t": 20},
    }
    return {"data": traces, "layout": layout}
