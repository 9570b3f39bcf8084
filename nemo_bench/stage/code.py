"""This project's code, with the packages it needs as wheels: for a cluster without internet."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from nemo_bench.errors import BenchError
from nemo_bench.project import PROJECT
from nemo_bench.stage.config import StageConfig
from nemo_bench.stage.stage import Part, print_line

_PATTERNS = ["*.py", "*.sh", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"]
_PATTERNS += ["nemo_bench/**/*", "hydra_plugins/**/*", "conf/**/*"]


def code_part(_cfg: StageConfig, _stage_folder: Path) -> Part:
    """Return the part `<stage>/nemo_bench`."""
    digest = hashlib.sha256()
    for path in _project_files():
        content = path.read_bytes()
        digest.update(f"{path.relative_to(PROJECT).as_posix()}\0{len(content)}\0".encode() + content)
    plan = f"copy {PROJECT}, and download the packages it needs (pip wheel)"
    return Part("code", "nemo_bench", {"project": digest.hexdigest()[:12]}, plan, _make)


def _make(folder: Path, _lock: int) -> str:
    import tomllib

    for source in _project_files():
        destination = folder / source.relative_to(PROJECT)
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, destination)
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    command += ["--constraint", str(PROJECT / "constraints.txt"), "--wheel-dir", str(folder / "wheels")]
    print_line("code: copying this project, and downloading the packages it needs (pip wheel)")
    done = subprocess.run([*command, *project["dependencies"]], stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        remedy = "Run this where there is internet or a package index (PIP_INDEX_URL), or without this part (parts=...)"
        raise BenchError(f"pip could not download the packages it needs:\n{done.stderr.strip()}\n{remedy}")
    return f"{project['version']}, for Python {sys.version_info.major}.{sys.version_info.minor}"


def _project_files() -> Iterator[Path]:
    for pattern in _PATTERNS:
        files = (path for path in PROJECT.glob(pattern) if path.is_file() and "__pycache__" not in path.parts)
        yield from sorted(files)
