"""The house: which room may import which. A room imports rooms of lower floors, and its own."""

from __future__ import annotations

import ast
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
# Lowest floor first; rooms of one floor do not know each other.
FLOORS = (
    ("errors", "project", "startup"),
    ("files", "flops", "fields", "pipeline"),
    ("composition",),
    ("config",),
    ("record", "memory", "cli", "recipe_variables"),
    ("estimate",),
    ("report",),
    ("cluster",),
    ("data", "training"),
    ("stage",),
    ("entrypoints",),
    ("checks",),
    ("launch",),
    ("planning", "machine"),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def imports(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [f"{n.module}.{alias.name}" for n in nodes if isinstance(n, ast.ImportFrom) for alias in n.names]
    return {name.split(".")[1] for name in names if name.startswith("nemo_bench.")}


def test_imports_run_downwards() -> None:
    package = PROJECT / "nemo_bench"
    files = [(path, path.relative_to(package).parts[0].removesuffix(".py")) for path in package.rglob("*.py")]
    arrows = {(room, other) for path, room in files for other in imports(path)}
    assert {(a, b) for a, b in arrows if a not in (b, "__init__") and FLOOR_OF[a] <= FLOOR_OF[b]} == set()
