"""A login node's installation, `pip install -e .`, without torch or NeMo (`make` builds it in build/light)."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
PYTHON = PROJECT / "build" / "light" / "bin" / "python"
SCALES = "64gpu,128gpu,256gpu,512gpu,1024gpu,2048gpu"


def run(stage: Path, *command: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "HYDRA_"))}
    done = subprocess.run(
        [str(PYTHON), *command],
        cwd=PROJECT,
        env={**environment, "STAGE_PATH": str(stage)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_checks_prepares_and_reports_without_torch(small_tokenizer: Path, tmp_path: Path) -> None:
    if not PYTHON.exists():
        pytest.fail("build/light is missing: `make light` installs what a login node needs there")
    absent = run(
        tmp_path, "-c", "from importlib.util import find_spec as f; print(f('torch') or f('nemo') or f('megatron'))"
    )
    assert absent == "None\n"

    points = run(tmp_path, "train.py", "-m", "precision=bf16,fp8", f"scale={SCALES}", "launch=dry")
    assert points.count("launch=dry: nothing was started.") == 12

    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"Text number {i}."}) + "\n" for i in range(100)))
    run(tmp_path, "prepare_data.py", f"sources=[{tmp_path}/a.jsonl]", f"tokenizer_folder={small_tokenizer}")
    assert list(tmp_path.rglob("*.idx"))

    run(tmp_path, "report.py", f"runs={PROJECT}/tests/runs/nemo-2.7.3/fp8", f"output={tmp_path}/report")
    assert json.loads((tmp_path / "report" / "results.json").read_text())["points"]
