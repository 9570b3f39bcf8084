"""`setup_stage.py` for tests: a copy of the project that needs little, a stage folder, a fake of enroot."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.conftest import PROJECT, started

IMAGE = b"the layers of an image"
# Records its arguments, and copies a prepared image. $FAKE says how it goes wrong.
ENROOT = """#!/bin/sh
here=$(dirname "$0")
if [ "$1" = version ]; then echo 3.5.0; exit 0; fi
echo "$@" >> "$here/calls"
case "$FAKE" in
  full) head -c 8000000 /dev/zero > "$3" || exit 1 ;;
  slow)
    head -c 10 "$here/prepared.sqsh" > "$3"; echo $$ > "$here/started"
    while [ ! -e "$here/release" ]; do sleep 0.02; done ;;
esac
cp "$here/prepared.sqsh" "$3"
"""


def copy_project(copy: Path) -> None:
    """Copy this project, but let it need one package, which its own folder provides instead of an index."""
    for name in ("nemo_bench", "hydra_plugins", "conf"):
        shutil.copytree(PROJECT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup_stage.py", "jobs.py", "train.py", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(PROJECT / name, copy)
    text = (copy / "pyproject.toml").read_text()
    text = re.sub(r"^dependencies = \[.*?^\]", 'dependencies = ["needed"]', text, flags=re.MULTILINE | re.DOTALL)
    (copy / "pyproject.toml").write_text(text)
    (copy / "constraints.txt").write_text("needed==1.0\n")
    for version in ("1.0", "2.0"):
        about = f"needed-{version}.dist-info"
        with zipfile.ZipFile(copy / f"needed-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr("needed.py", f"VERSION = {version!r}\n")
            wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: needed\nVersion: {version}\n")
            wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{about}/RECORD", "")


class Setup:
    """`setup_stage.py` with a stage folder and an enroot of the test's own."""

    def __init__(self, project: Path, tmp_path: Path) -> None:
        self.project, self.tmp_path, self.stage = project, tmp_path, tmp_path / "stage"
        self.bin = tmp_path / "bin"
        self.bin.mkdir()
        self.put("enroot", ENROOT)
        (self.bin / "prepared.sqsh").write_bytes(IMAGE)
        dropped = ("SLURM_", "SBATCH_", "HYDRA_", "HF_", "ENROOT_", "XDG_", "PIP_")
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(dropped)},
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "STAGE_PATH": str(self.stage),
            "HOME": str(tmp_path / "home"),
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(project),
            "PIP_CONFIG_FILE": os.devnull,
            "HF_ENDPOINT": "http://127.0.0.1:9",  # discard: no test reaches the real one
        }

    def put(self, name: str, script: str) -> None:
        """Add a program that is found before the machine's own."""
        (self.bin / name).write_text(script)
        (self.bin / name).chmod(0o755)

    def start(self, *args: str, **environment: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(self.project / "setup_stage.py"), *args]
        return started(command, self.tmp_path, {**self.environment, **environment})

    def __call__(self, *args: str, code: int = 0, **environment: str) -> tuple[str, str]:
        process = self.start(*args, **environment)
        out, err = process.communicate(timeout=120)
        assert process.returncode == code, out + err
        assert "Traceback" not in err
        return out, err

    def enroot_calls(self) -> list[str]:
        path = self.bin / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def leftovers(self) -> list[str]:
        """Return the hidden files, except locks."""
        return [str(path) for path in self.stage.rglob(".*") if path.suffix != ".lock"]

    def snapshot(self) -> dict[str, tuple[int, int]]:
        """Return inode and date of everything in the stage folder."""
        paths = sorted(self.stage.rglob("*"))
        return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}
