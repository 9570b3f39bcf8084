"""The schedule of an estimate as one HTML page that needs nothing else: stages over time."""

from __future__ import annotations

from typing import Any

from nemo_bench.planning.answer import Answer

_COLOURS = {"forward": "#2f7fd1", "backward": "#cf6a12"}
_SHOWN = 4000  # passes; of more, which would make the page slow, the first and the last


def render(answer: Answer) -> str:
    """Return the page as text: each pass of a micro-batch is a bar on its stage's line."""
    from plotly.io import to_html

    estimate = answer.estimate
    events = sorted(estimate.timeline.events(), key=lambda event: event.start_ms)
    if len(events) > _SHOWN:
        events = events[: _SHOWN // 2] + events[-_SHOWN // 2 :]
    traces: list[dict[str, Any]] = []
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
    layout = {
        "height": 140 + 60 * estimate.timeline.pipeline.stages,
        "title": {
            "text": f"{answer.name}: {answer.layout}<br>Step {estimate.step_time_s:.4g} s by rates and constants"
        },
        "barmode": "overlay",
        "xaxis": {"title": {"text": "s"}},
        "yaxis": {"categoryorder": "category descending", "type": "category"},
    }
    return str(to_html({"data": traces, "layout": layout}, validate=False, div_id="schedule"))
