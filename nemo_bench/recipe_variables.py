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

    Raises:
        BenchError: a variable contradicts the command line, is not known, or has nothing here that it stands for.
    """
    table = yaml.safe_load(TABLE.read_text())
    variables = {name: value for name, value in environment.items() if value}
    typed = dict(argument.lstrip("+").split("=", 1) for argument in arguments if "=" in argument and argument[0] != "-")
    added, problems = [], [*_unusable(table, variables)]
    for name, meant in _meant(table, variables):
        key, value = meant.lstrip("+").split("=", 1)
        variable = f"{name}={variables[name]}"
        if key not in typed and name in table["of_a_point"] and "experiment" in typed:
            problems.append(
                f"{variable} is set, and experiment={typed['experiment']} has its own {key}: "
                f"unset {name}, or type {meant} as well"
            )
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
    for name, meaning in table["switches"].items():
        if variables.get(name, "").lower() == "true":
            yield from ((name, override) for override in meaning)
    name, code = table["settings"]
    if variables.keys() >= {name, code}:
        words = (word.lstrip("+") for word in shlex.split(variables[code]))
        yield from ((code, f"++entrypoint.settings.{word}") for word in words if "=" in word)


def _unusable(table: Mapping[str, Any], variables: Mapping[str, str]) -> Iterator[str]:
    known = [*table["always"], *table["refused"], *table["settings"]]
    for name in sorted(variables):
        if name in table["refused"]:
            yield f"{name} has no effect here: unset it; {table['refused'][name]}"
        elif name.startswith(tuple(table["prefixes"])) and name not in known:
            names = [other for other in known if other.startswith(tuple(table["prefixes"]))]
            yield f"{name} is not one of the recipe's: unset it; valid: {', '.join(names)}"
    if len(variables.keys() & {*table["settings"]}) == 1:
        yield f"{' and '.join(table['settings'])} belong together: set or unset both"
