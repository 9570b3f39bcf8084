"""The programs that train: what conf/entrypoint chooses from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib import import_module
from pathlib import Path

from nemo_bench.config import TrainConfig
from nemo_bench.errors import ConfigurationRefused, Problem

# The modules of this package, each with an `ENTRYPOINT`. With Bridge our program imports that in the place of NeMo 2.
STACKS = {"nemo2": "nemo2", "megatron_bridge": "nemo2", "nemo_24_09": "nemo_24_09"}


class Entrypoint(ABC):
    """What a program needs to train a point, and what it cannot do. These defaults ask for nothing special."""

    memory_is_estimated = True  # whether memory.py knows this program's optimizer

    def problems(self, cfg: TrainConfig) -> list[Problem]:
        """Return what the configuration asks for and the program cannot do."""
        return []

    def machine_problems(self, cfg: TrainConfig) -> list[Problem]:
        """Return what this machine lacks to run the program here."""
        return []

    @abstractmethod
    def rank_command(self, cfg: TrainConfig, run_dir: Path, python: str) -> list[str]:
        """Return what each rank runs with the interpreter `python`."""

    def environment(self, cfg: TrainConfig) -> dict[str, str]:
        """Return the ranks' environment. `cluster.env` and, on this machine, the user's own variables win over it."""
        environment = {**self.derived_environment(cfg), **cfg.entrypoint.env}
        return {name: value for name, value in environment.items() if value is not None}

    def derived_environment(self, cfg: TrainConfig) -> dict[str, str]:
        """Return what of the environment follows from the GPU and the layout. `entrypoint.env` wins over it."""
        return {}

    def srun_options(self, cfg: TrainConfig) -> list[str]:
        """Return the options of srun that the program needs. `cluster.srun_args` come after them and win."""
        return []

    def keeps_image_pythonpath(self, cfg: TrainConfig) -> bool:
        """Return whether the program keeps the PYTHONPATH of its image: it then imports nothing of this project."""
        return False

    def files(self, cfg: TrainConfig, run_dir: Path) -> dict[Path, str]:
        """Return the files that the ranks read besides `config.yaml`, with their text."""
        return {}


def entrypoint_of(cfg: TrainConfig) -> Entrypoint:
    """Return the program that `cfg` chose; raise ConfigurationRefused if there is none of that name."""
    stack = cfg.entrypoint.stack
    if stack not in STACKS:
        fix = f"valid: {', '.join(STACKS)}"
        raise ConfigurationRefused([Problem("entrypoint.stack", stack, "unknown program", fix)])
    entrypoint = import_module(f"{__name__}.{STACKS[stack]}").ENTRYPOINT
    assert isinstance(entrypoint, Entrypoint)
    return entrypoint
