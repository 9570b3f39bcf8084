"""A run's numbers in the logger that a user has, by Megatron's names: written between steps, by one rank.

Nothing leaves the machine unless the user's own variables say so: a closed network cannot hold a run up.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from nemo_bench.config import TrainConfig
from nemo_bench.errors import BenchError
from nemo_bench.record.folder import LOGGER
from nemo_bench.training.hooks import Hooks, RunRecorder, Step

# Ours -> Megatron's, in its TensorBoard files; for the rest it has none.
_NAMES = {
    "loss": "lm loss",
    "lr": "learning-rate",
    "grad_norm": "grad-norm",
    "train_step_timing_s": "iteration-time",
    "tflops_per_gpu": "throughput/tflops/device",
    "tokens_per_s_per_gpu": "throughput/tokens_per_sec/device",
    "mfu": "mfu",
    "peak_memory_gib": "mem-max-allocated-gigabytes",
}
Writer = tuple[Callable[[dict[str, float], int], object], Callable[[], object]]  # writes a step; closes


class MetricsLogger(Hooks):
    """Write what `recorder`, which stands ahead, has recorded of each step."""

    def __init__(self, cfg: TrainConfig, recorder: RunRecorder) -> None:
        self.cfg, self.recorder = cfg, recorder

    def train_start(self, first_step: int) -> None:
        kind, folder = self.cfg.logger.kind, self.recorder.run.path / LOGGER
        folder.mkdir(exist_ok=True)
        try:
            self._write, self._close = _OPENED[kind](folder)
        except ImportError as error:
            raise BenchError(f"logger={kind}: {error}\npip install {kind}, or logger=none") from None

    def step_end(self, step: Step) -> None:
        row = self.recorder.row
        self._write({_NAMES[name]: float(row[name]) for name in _NAMES if name in row}, step.number + 1)

    def train_end(self) -> None:
        self._close()


def _tensorboard(folder: Path) -> Writer:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder))

    def write(numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return write, writer.close


def _wandb(folder: Path) -> Writer:
    import wandb

    mode = os.environ.get("WANDB_MODE", "offline")
    run = wandb.init(project="nemo-bench", name=folder.parent.name, dir=str(folder), mode=mode)  # type: ignore[arg-type]
    return run.log, run.finish


def _mlflow(folder: Path) -> Writer:
    import mlflow

    mlflow.set_tracking_uri(os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db"))
    mlflow.start_run(run_name=folder.parent.name)
    return lambda numbers, step: mlflow.log_metrics(numbers, step=step), mlflow.end_run


_OPENED = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
