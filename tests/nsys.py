"""A stand-in for NVIDIA's `nsys`: notes what it was called with, and runs the command as its child."""

from __future__ import annotations

from pathlib import Path

SCRIPT = """#!/bin/bash
printf '%s\\n' "$@" > "{folder}/nsys.$$.arguments.tmp"
mv "{folder}/nsys.$$.arguments.tmp" "{folder}/nsys.$$.arguments"
shift
while [[ $1 == -* ]]; do
  [[ $1 == --output=* ]] && output=${{1#--output=}}
  shift
done
"$@"
status=$?
echo recorded > "$output.nsys-rep"
exit $status
"""


def install(folder: Path) -> Path:
    """Puts it into `folder`, which is to be put on PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "nsys"
    path.write_text(SCRIPT.format(folder=folder))
    path.chmod(0o755)
    return path


def calls(folder: Path) -> dict[int, list[str]]:
    """The arguments of each call, by its process."""
    return {
        int(path.name.split(".")[1]): path.read_text().splitlines() for path in sorted(folder.glob("nsys.*.arguments"))
    }
