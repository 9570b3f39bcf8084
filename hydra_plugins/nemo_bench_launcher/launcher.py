"""Hydra launcher: every point of a sweep is a Slurm job of its own size.

Thin on purpose: Hydra executes the modules under hydra_plugins at every start, also for `--help`, so everything else is
imported when a sweep is launched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, open_dict

# The function that submits the points of each script.
SUBMITTERS = {
    "train": ("nemo_bench.launch.submission", "submit_points"),
    "prepare_data": ("nemo_bench.data.prepare", "submit_preparations"),
    "check_machine": ("nemo_bench.machine.command", "submit_checks"),
    "setup_stage": ("nemo_bench.stage.command", "submit_stage"),
}


class SlurmLauncher(Launcher):
    """`hydra/launcher=submitit_slurm`."""

    def __init__(self, wait: bool = False, **_: Any) -> None:
        self.wait = wait

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        self.loader, self.config = hydra_context.config_loader, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from importlib import import_module

        from nemo_bench.config import ComposedPoint
        from nemo_bench.errors import BenchError

        points = []
        for overrides in job_overrides:
            # Each point is composed anew: its nodes follow from its own scale, not from the first point's.
            config = self.loader.load_sweep_config(self.config, list(overrides))
            with open_dict(config):
                task_overrides = list(config.hydra.overrides.task)
                del config["hydra"]
            points.append(ComposedPoint(config, task_overrides))
        script = self.config.hydra.job.name
        if script not in SUBMITTERS:
            raise BenchError(f"{script}.py runs here: leave hydra/launcher out")
        module, submit = SUBMITTERS[script]
        getattr(import_module(module), submit)(points, wait=self.wait)
        return [JobReturn(overrides=point.overrides, status=JobStatus.COMPLETED) for point in points]
