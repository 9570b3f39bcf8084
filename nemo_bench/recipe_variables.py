"""The environment variables of NVIDIA's recipe (recipe_variables.yaml) as overrides of a command line."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from nemo_bench.errors import BenchError

TABLE = Path(__file__).with_suffix(".yaml")


def overrides(arguments: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Return the overrides that the variables stand for and `arguments`, a command line of train.py, does not have.

    Raises BenchError if a variable contradicts the command line, or stands for nothing here.
    """
    table = yaml.safe_load(TABLE.read_text())
    variables = {name: value for name, value in environment.items() if value}
    typed = dict(argument.lstrip("+").split("=", 1) for argument in arguments if "=" in argument and argument[0] != "-")
    refused = table["refused"].items()
    problems = [f"{name} has no effect here: unset it; {why}" for name, why in refused if name in variables]
    added = []
    for name, meant in _meant(table, variables):
        key, value = meant.lstrip("+").split("=", 1)
        variable = f"{name}={variables[name]}"
        if key not in typed and name in table["of_a_point"] and "experiment" in typed:
            other = f"experiment={typed['experiment']} has its own {key}"
            problems.append(f"{variable} is set, and {other}: unset {name}, or type {meant} as well")
        elif key not in typed:
            added.append(meant)
        elif typed[key] != value:
            problems.append(f"{variable} is set, and {key}={typed[key]} is typed: type {meant}, or unset {name}")
    if problems:
        raise BenchError("the recipe's environment variables:\n  " + "\n  ".join(problems))
    return added


def _meant(table: Mapping[str, Any], variables: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield each variable with an override that it stands for."""
    meanings = dict(table["always"])
    if variables.keys() & {"DTYPE", "MODEL_SIZE"}:
        meanings |= table["with_dtype_or_model_size"]
    for name in (name for name in meanings if name in variables):
        value = variables[name] if name == "RUN_CONF_IMAGE" else variables[name].lower()
        yield from ((name, meaning.format(value)) for meaning in meanings[name])
    for name in (name for name in table["switches"] if variables.get(name, "").lower() == "true"):
        yield from ((name, override) for override in table["switches"][name])
    name, code = table["settings"]
    if variables.keys() >= {name, code}:
        words = (word.lstrip("+") for word in shlex.split(variables[code]))
        yield from ((code, f"++entrypoint.settings.{word}") for word in words if "=" in word)
