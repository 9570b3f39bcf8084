"""What a rank refuses of a GPU; torch's questions to the driver are answered here."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nemo_bench.cluster.processes import Outcome
from nemo_bench.config import load
from nemo_bench.launch import point
from nemo_bench.record import folder as record

torch = pytest.importorskip("torch")

CONFIG = Path(__file__).parents[1] / "runs/nemo-2.7.3/bf16/70b/1/20261122-172402-5f1a/config.yaml"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_rank_without_a_gpu_ends_with_one_message(tmp_path: Path) -> None:
    """The rank itself, as it is started, and the message that its launcher makes of it."""
    cfg, run = replace(load(CONFIG), stage_path=str(tmp_path)), record.RunFolder(tmp_path / "run")
    run.path.mkdir()
    text = OmegaConf.to_yaml(OmegaConf.structured(cfg))
    run.create(config_yaml=text, command=["python", "train.py"], overrides=[])
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "NODE_RANK": "0"}
    with open(run.log(0), "wb") as log:
        done = subprocess.run(
            [sys.executable, "-m", "nemo_bench.training.rank", str(run.path)],
            env={**os.environ, **place},
            cwd=Path(__file__).resolve().parents[2],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            timeout=120,
        )
    assert done.returncode == 1
    message = point.record_failure(cfg, run, Outcome(0, 1, seen_at=time.time()))
    printed = run.log(0).read_text()
    if torch.version.cuda is None:
        assert message.startswith("rank 0 of 1 failed: torch") and "is built without CUDA: install a" in message
        assert "Traceback" not in message + printed
    else:
        assert "CUDA sees no GPU" in message or "driver is too old" in message
