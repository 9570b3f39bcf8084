"""The report as one HTML page that needs nothing else: `report.html.j2` with Plotly's script in it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from nemo_bench.report import figures, model, tables
from nemo_bench.report.comparison import recorded
from nemo_bench.report.model import Report
from nemo_bench.report.numbers import counted, tokens_text, unit_name

# Of more runs than this, the others are a row of the table.
DETAILED_RUNS = 60
DRAWN_RUNS = 24  # in one figure
OPEN_RUNS = 4
SHOWN_RANKS = 24

_CONTROL_CHARACTERS = {code: "\ufffd" for code in range(32) if chr(code) not in "\t\n\r"}


@cache
def plotly_script() -> str:
    """Return Plotly's script, which every page carries."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def render(report: Report) -> str:
    """Return the page as the text of an HTML file in UTF-8."""
    folder = Path(__file__).parent
    options: Any = {"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=FileSystemLoader(folder), finalize=_printable, **options)
    environment.filters |= {function.__name__: function for function in _FILTERS}
    environment.tests["numeric"] = tables.is_numeric
    return environment.get_template("report.html.j2").render(
        report=report,
        style=Markup((folder / "page.css").read_text(encoding="utf-8")),
        plotly=Markup(plotly_script()),
        successes=model.SUCCESSES,
        budget=tokens_text(report.total_tokens),
        point_of={name: point.name for point in report.points for name in point.runs},
        detailed_runs=DETAILED_RUNS,
        drawn_runs=DRAWN_RUNS,
        open_runs=OPEN_RUNS,
        shown_ranks=SHOWN_RANKS,
    )


def _printable(value: object) -> object:
    """Return text without what HTML forbids: names of files and lines of logs may hold any byte."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return value.encode("utf-8", "replace").decode().translate(_CONTROL_CHARACTERS)


_FILTERS: tuple[Callable[..., Any], ...] = (
    *(tables.points_table, tables.runs_table, tables.comparison_table, tables.changes_table, tables.attribution_table),
    *(figures.scaling, figures.losses, figures.step_times, figures.waterfall),
    *(tables.percent, tables.significant, counted, unit_name, recorded),
)
