"""Where this project lies, for the processes that it starts: it need not be installed."""

from __future__ import annotations

import os
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]


def python_path(inherited: str | None) -> str:
    """PYTHONPATH that finds this project first, from any folder, and then what `inherited` (a PYTHONPATH) finds."""
    return f"{PROJECT}{os.pathsep}{inherited}" if inherited else str(PROJECT)
