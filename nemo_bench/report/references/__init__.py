"""Published numbers: one YAML file a table, named as `reference=` chooses it, and how they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from nemo_bench import flops
from nemo_bench.errors import BenchError
from nemo_bench.report.model import Reference, ReferencePoint

_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The tables that come with the program."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load(name: str) -> Reference:
    """The published table called `name`, or a file of the same form.

    Raises:
        BenchError: there is no such table, or the file is not of that form.
    """
    path = _FOLDER / f"{name}.yaml"
    if name not in names():
        path = Path(name)
        if not path.is_file():
            raise BenchError(
                f"reference={name}: there is no such table\n"
                f"  valid: {', '.join(names())}, null, or a YAML file of the form of {_FOLDER}/{names()[0]}.yaml"
            )
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
        assert isinstance(content, dict)
        return _reference(path.stem, {str(key): value for key, value in content.items()})
    except (
        KeyError,
        TypeError,
        ValueError,
        AssertionError,
        AttributeError,
        OmegaConfBaseException,
        YAMLError,
    ) as error:
        raise BenchError(
            f"{path}: not a table of published numbers ({type(error).__name__}: {error}); "
            f"{_FOLDER}/{names()[0]}.yaml shows the form"
        ) from None


def _reference(name: str, table: dict[str, Any]) -> Reference:
    return Reference(
        name=name,
        title=str(table["title"]),
        source=str(table["source"]),
        version=str(table["version"]),
        date=str(table["date"]),
        hardware=str(table["hardware"]),
        statistic=str(table["statistic"]),
        container=str(table["container"]),
        layout={str(key): int(value) for key, value in table["layout"].items()},
        data=str(table["data"]),
        notes=tuple(map(str, table.get("notes") or ())),
        architecture={
            str(model): {str(key): int(value) for key, value in sizes.items()}
            for model, sizes in table["architecture"].items()
        },
        points=tuple(_point(name, table, point) for point in table["points"]),
    )


def _point(name: str, table: dict[str, Any], point: dict[str, Any]) -> ReferencePoint:
    batch, seq_length, step_time_s = int(point["global_batch_size"]), int(table["seq_length"]), point["step_time_s"]
    return ReferencePoint(
        reference=name,
        model=str(point["model"]),
        precision=str(point["precision"]),
        gpus=int(point["gpus"]),
        gpu=str(table["gpu"]),
        global_batch_size=batch,
        seq_length=seq_length,
        step_time_s=float(step_time_s),
        tokens_per_s=float(point["tokens_per_s"]),
        mfu=None if point.get("mfu") is None else float(point["mfu"]),
        days_to_1t_tokens=float(point["days_to_1t_tokens"]),
        tokens_per_s_from_step_time=flops.tokens_per_second(
            seq_length=seq_length, global_batch_size=batch, step_time_s=float(step_time_s)
        ),
        notes=tuple(map(str, point.get("notes") or ())),
    )
