"""The report as one HTML page that needs nothing else: `report.html.j2` with Plotly's script in it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from nemo_bench.report import figures, tables
from nemo_bench.report.comparison import recorded
from nemo_bench.report.model import SUCCESSES, Report

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
    environment.filters |= {"percent": tables.percent, "significant": tables.significant}
    environment.tests["numeric"] = tables.is_numeric
    return environment.get_template("report.html.j2").render(
        report=report,
        style=Markup((folder / "page.css").read_text(encoding="utf-8")),
        plotly=Markup(plotly_script()),
        successes=SUCCESSES,
        point_of={name: point.name for point in report.points for name in point.runs},
        tables=tables,
        figures=figures,
        recorded=recorded,
    )


def _printable(value: object) -> object:
    """Return text without what HTML forbids: names of files and lines of logs may hold any byte."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return value.encode("utf-8", "replace").decode().translate(_CONTROL_CHARACTERS)
