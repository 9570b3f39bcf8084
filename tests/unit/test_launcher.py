"""A sweep of many points: each is composed once, whoever launches it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

COUNTED = """
import atexit, runpy, sys
from hydra._internal.config_loader_impl import ConfigLoaderImpl
compose, composed = ConfigLoaderImpl.load_sweep_config, []

def counted(self, master_config, overrides):
    composed.append(overrides)
    return compose(self, master_config, overrides)

ConfigLoaderImpl.load_sweep_config = counted
sys.argv = sys.argv[1:]
atexit.register(lambda: print("composed", len(composed)))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("launcher", [(), ("hydra/launcher=submitit_slurm",)])
def test_each_point_is_composed_once(project: Path, tmp_path: Path, launcher: tuple[str, ...]) -> None:
    point = ("data=mock", "launch=dry", "scale=64gpu", "precision=bf16,fp8", "trainer.max_steps=5,6", *launcher)
    command = [sys.executable, "-c", COUNTED, str(project / "train.py"), "-m", *point]
    environment = {**os.environ, "PYTHONPATH": str(project)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stderr == "" and "composed 4" in done.stdout
    for words in ("bf16, 64 x h100 (8 nodes x 8)", "fp8, 64 x h100 (8 nodes x 8)", "steps      5\n", "steps      6\n"):
        assert done.stdout.count(words) == 2
