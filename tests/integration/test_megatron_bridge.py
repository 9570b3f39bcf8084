"""Megatron-Bridge trains on this machine's CPU: its newest release for Python 3.11, laid over this environment.

Bridge 0.3 has no Llama 3.1 RoPE scaling by a setting: it is off here.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_bench.report.logs import read_log
from nemo_bench.report.runs import load_run, log_warnings

from .conftest import PROJECT, SMALL, Run, environment, run_dirs

OVERLAY = PROJECT / "build/bridge"
pytestmark = [
    pytest.mark.train,
    pytest.mark.skipif(not (OVERLAY / ".complete").exists(), reason="`make build/bridge/.complete` brings Bridge"),
]
PP2_VP2 = (
    *("trainer.devices=2", "model.pipeline_model_parallel_size=2", "model.virtual_pipeline_model_parallel_size=2"),
    *("profile=torch", "profile.start_step=4", "profile.end_step=5"),
)


@pytest.fixture(scope="module")
def bridge(stage: Path) -> Callable[..., Run]:
    def run(*overrides: str) -> Run:
        before = run_dirs(stage)
        command = [sys.executable, str(PROJECT / "train.py"), *SMALL, "entrypoint=bridge_26_04", *overrides]
        path = os.pathsep.join(filter(None, [str(OVERLAY), os.environ.get("PYTHONPATH")]))
        env = {**environment(stage), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=stage, env=env, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stdout + done.stderr
        (run_dir,) = run_dirs(stage) - before
        return Run(run_dir, done.stdout, done.stderr)

    return run


@pytest.mark.parametrize("layout", [(), PP2_VP2], ids=["one process", "PP2 VP2, profiled"])
def test_bridge_trains_and_its_own_log_has_the_same_step_times(
    layout: tuple[str, ...], bridge: Callable[..., Run]
) -> None:
    ran = bridge("model.rope_scaling=false", *layout)
    assert [row["step"] for row in ran.steps] == list(range(20))
    assert sum(ran.losses[-5:]) / 5 < ran.losses[0] - 0.3 and all(row["grad_norm"] > 0 for row in ran.steps)
    events = [json.loads(line) for line in (ran.run_dir / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events if event["event"] != "profile"] == [
        *("importing", "building", "left_out", "training", "done")
    ]
    ranks = 2 if layout else 1
    assert len(json.loads((ran.run_dir / "ranks.json").read_text())["ranks"]) == ranks
    assert (ran.run_dir / "profile/rank0.txt").exists() == bool(layout)
    run = load_run(ran.run_dir)
    assert (run.version, run.software) == ("26.04", "bridge-0.3.0")
    assert any("left out" in warning and "rope_scaling" in warning for warning in run.warnings)
    # The last rank prints the mean time from one line to the next: a step, and what lies between two.
    log = read_log(ran.run_dir / f"rank{ranks - 1}.out")
    assert any("from one line of the log to the next" in text for text in log_warnings(log))
    assert log.steps.step == list(range(1, 21)) and log.global_batch_size == 8
    assert log.steps.loss == pytest.approx(ran.losses, rel=1e-5)
    between_s = [printed - row["train_step_timing_s"] for printed, row in zip(log.steps.time_s, ran.steps)]
    assert min(between_s) > -0.002 and statistics.median(between_s) < 0.05
