"""The house: which room may import which. A room imports rooms of lower floors, and its own."""

from __future__ import annotations

import ast
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
# Lowest floor first; rooms of one floor do not know each other.
FLOORS = (
    ("errors", "interrupt", "project"),
    ("files", "flops", "fields"),
    ("composition",),
    ("config",),
    ("record", "memory", "cli"),
    ("report",),
    ("cluster",),
    ("data", "training"),
    ("stage",),
    ("entrypoints",),
    ("checks",),
    ("launch",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def imports(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("nemo_bench.")}
    return rooms


def test_imports_run_downwards() -> None:
    arrows = {
        (path.relative_to(PROJECT / "nemo_bench").parts[0].removesuffix(".py"), room)
        for path in (PROJECT / "nemo_bench").rglob("*.py")
        for room in imports(path)
    }
    upwards = {(a, b) for a, b in arrows if a != b and a != "__init__" and FLOOR_OF[a] <= FLOOR_OF[b]}
    assert upwards == set()
