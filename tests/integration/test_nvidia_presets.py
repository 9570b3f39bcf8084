"""NVIDIA's own performance recipes for H100 and B200 against our experiments of the same name, every value of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from fnmatch import fnmatch
from typing import Any

import pytest
import yaml

from nemo_bench.project import PROJECT

OVERLAY = PROJECT / "build/bridge_0_6"
pytestmark = [
    pytest.mark.train,
    pytest.mark.skipif(not (OVERLAY / ".complete").exists(), reason="`make build/bridge_0_6/.complete` brings Bridge"),
]


def explains(reason: dict[str, str], experiment: str, setting: str) -> bool:
    chosen = reason.get("experiments", "*").split("|")
    return fnmatch(setting, reason["setting"]) and any(fnmatch(experiment, pattern) for pattern in chosen)


def test_our_presets_are_nvidias_but_for_a_list_with_reasons() -> None:
    env = {**os.environ, "PYTHONPATH": f"{OVERLAY}:{PROJECT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.nvidia_presets"]
    built = subprocess.run(command, cwd=PROJECT, env=env, capture_output=True, text=True, timeout=400)
    assert built.returncode == 0, built.stderr
    compared: dict[str, dict[str, Any]] = json.loads(built.stdout)
    assert len(compared) == 18
    reasons = yaml.safe_load((PROJECT / "tests/nvidia_presets.yaml").read_text())
    different = [(experiment, setting) for experiment, settings in compared.items() for setting in settings]
    unexplained = {
        (*where, *compared[where[0]][where[1]])
        for where in different
        if not any(explains(reason, *where) for reason in reasons)
    }
    assert unexplained == set()
    assert [reason for reason in reasons if not any(explains(reason, *where) for where in different)] == []
