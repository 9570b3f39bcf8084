"""Published numbers: one YAML file a table, named as `reference=` chooses it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from nemo_bench.errors import BenchError
from nemo_bench.files import plain_yaml
from nemo_bench.flops import Architecture

_FOLDER = Path(__file__).parent / "published"


@dataclass
class _Shared:
    """What a table says for all its points, and a point may say for itself."""

    software: str = ""  # its release
    container: str = ""
    entrypoint: str = ""  # which of our programs trains as that software did
    recipes: list[str] = field(default_factory=list)  # releases of the recipe that measured it: their results folders
    gpu: str = ""
    seq_length: int = 0
    data: str = ""
    statistic: str = ""  # what the step times are: "last step", "mean", "mean of steps 35 to 44" (counted from 1)
    flops_convention: str = ""  # of the printed MFU: recipe or causal
    layout: dict[str, int] = field(default_factory=dict)  # TP, PP, VP, CP, MBS, GA; `layers` of a shortened model
    environment: dict[str, str] = field(default_factory=dict)  # of the ranks
    settings: dict[str, Any] = field(default_factory=dict)  # key of the configuration -> value
    notes: list[str] = field(default_factory=list)  # what is inconsistent in what was printed, or missing


@dataclass
class ReferencePoint(_Shared):
    """A published number, as printed."""

    reference: str = ""  # the name of its table
    model: str = MISSING
    precision: str = MISSING
    gpus: int = MISSING
    global_batch_size: int = MISSING
    step_time_s: float = MISSING
    tokens_per_s: float | None = None
    mfu: float | None = None
    days_to_1t_tokens: float | None = None
    architecture: dict[str, int] = field(default_factory=dict)

    @property
    def tokens_per_s_from_step_time(self) -> float:
        """Throughput at the printed step time: what verdicts are held against."""
        return self.seq_length * self.global_batch_size / self.step_time_s


@dataclass
class Reference(_Shared):
    """A published table."""

    name: str = ""  # what `reference=` chooses it by
    title: str = MISSING
    source: str = MISSING  # who published it, where
    date: str = MISSING  # of publication, as exactly as is known
    hardware: str = MISSING  # what it was measured on
    architecture: dict[str, dict[str, int]] = MISSING  # sizes of each model in it
    model_settings: dict[str, dict[str, Any]] = field(default_factory=dict)  # of each model, besides `settings`
    mfu_architecture: dict[str, dict[str, int]] = field(default_factory=dict)  # other sizes that its MFU counts
    points: list[ReferencePoint] = MISSING


def names() -> list[str]:
    """Return the tables that come with the program."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def architecture_in_recipe(
    release: str | None, model: str | None, precision: str | None, gpus: int | None
) -> Architecture | None:
    """Return the sizes that this release of NVIDIA's recipe gave a model on so many GPUs, where they are published."""
    for point in (point for name in names() if release for point in load(name).points):
        if release in point.recipes and (point.model, point.precision, point.gpus) == (model, precision, gpus):
            return Architecture(**point.architecture)
    return None


@cache
def load(name: str) -> Reference:
    """Return the published table called `name`, or that of a file of the same form."""
    path, example = _FOLDER / f"{name}.yaml", _FOLDER / f"{names()[0]}.yaml"
    if name not in names():
        path = Path(name)
        if not path.is_file():
            valid = f"valid: auto, {', '.join(names())}, null, or a YAML file of the form of {example}"
            raise BenchError(f"reference={name}: there is no such table\n  {valid}")
    try:
        content = OmegaConf.merge(OmegaConf.structured(Reference), OmegaConf.create(plain_yaml(path)))
        table: Reference = OmegaConf.to_object(content)  # type: ignore[assignment]
        table.name = path.stem
        for point in table.points:
            _complete(point, table)
    except (OmegaConfBaseException, YAMLError, KeyError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise BenchError(f"{path}: not a table of published numbers ({why}); {example} shows the form") from None
    return table


def _complete(point: ReferencePoint, table: Reference) -> None:
    point.reference = table.name
    for key in (shared.name for shared in fields(_Shared) if shared.name != "notes"):
        if not getattr(point, key):
            setattr(point, key, getattr(table, key))
    point.settings = {**table.settings, **table.model_settings.get(point.model, {}), **point.settings}
    layers = {"num_layers": point.layout["layers"]} if "layers" in point.layout else {}
    point.architecture = {**table.architecture[point.model], **point.architecture, **layers}
    name = f"{point.model} {point.precision} {point.gpus}"
    steps = re.fullmatch(r"mean of steps (\d+) to (\d+)", point.statistic)
    if point.statistic not in ("last step", "mean") and not (steps and 1 <= int(steps[1]) <= int(steps[2])):
        raise ValueError(f"{name}: statistic {point.statistic}; valid: last step, mean, mean of steps 11 to 44")
    numbers = [*point.layout.values(), point.gpus, point.global_batch_size, point.seq_length, point.step_time_s]
    if not all(0 < number < math.inf for number in numbers):
        raise ValueError(f"{name}: every number must be positive and finite")
    sizes = {size.name for size in fields(Architecture)}
    if point.architecture.keys() != sizes or not point.gpu:
        raise ValueError(f"{name}: needs gpu, and as architecture {', '.join(sorted(sizes))}")
