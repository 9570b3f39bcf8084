"""Each step's numbers in a user's logger, by Megatron's names."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_bench.config import load
from nemo_bench.errors import BenchError
from nemo_bench.record.folder import RunFolder

pytest.importorskip("torch")

CONFIG = Path(__file__).parents[1] / "runs/nemo-2.7.3/bf16/70b/1/20261122-172402-5f1a/config.yaml"


def hooks(run_dir: Path, kind: str) -> list[Any]:
    from nemo_bench.training.hooks import RankTelemetry, RunRecorder
    from nemo_bench.training.loggers import MetricsLogger

    run_dir.mkdir()
    cfg, run = load(CONFIG), RunFolder(run_dir)
    cfg.logger.kind, cfg.gpu.device = kind, "cpu"
    telemetry = RankTelemetry(cfg, run, 0, None)
    recorder = RunRecorder(cfg, run, telemetry)
    return copy.deepcopy([telemetry, recorder, MetricsLogger(cfg, recorder)])  # as NeMo copies callbacks


def three_steps(chosen: list[Any]) -> None:
    from nemo_bench.training.hooks import Step

    for hook in chosen:
        hook.train_start(0)
    for number in range(3):
        for hook in chosen:
            hook.step_end(Step(number, 1.5 + number, 2.5, 0.7, 3e-4))
    chosen[-1].train_end()


def test_tensorboard_has_the_numbers_of_steps_jsonl(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    three_steps(hooks(tmp_path / "run", "tensorboard"))
    written = accumulator.EventAccumulator(str(tmp_path / "run/logger")).Reload()
    rows = [json.loads(line) for line in (tmp_path / "run/steps.jsonl").read_text().splitlines()]
    for name, ours in {"iteration-time": "train_step_timing_s", "lm loss": "loss", "mfu": "mfu"}.items():
        scalars = written.Scalars(name)
        assert [scalar.step for scalar in scalars] == [1, 2, 3]
        assert [scalar.value for scalar in scalars] == pytest.approx([row[ours] for row in rows])


def test_wandb_is_offline_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    three_steps(hooks(tmp_path / "run", "wandb"))
    (written,) = (tmp_path / "run/logger/wandb").glob("offline-run-*/*.wandb")
    assert b"throughput/tflops/device" in written.read_bytes()


def test_a_logger_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(BenchError, match=r"logger=mlflow: .*\npip install mlflow, or logger=none"):
        three_steps(hooks(tmp_path / "run", "mlflow"))
