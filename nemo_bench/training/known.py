"""Calls of NeMo, Megatron and Megatron-Bridge with the settings that the installed version has.

No version is compared: containers hold builds of their own. A setting that a version lacks is left out where that
changes neither what is trained nor what is measured, and written down; else it is an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from nemo_bench.errors import BenchError

# By an older version's name, where it has that.
_OLDER_NAMES = {"fp8_param_gather": "fp8_params"}
# What a version without the setting does, where that is not "off".
_WITHOUT: dict[str, Any] = {
    "cross_entropy_fusion_impl": "native",
    "fp8_recipe": "delayed",
    "recompute_modules": ["core_attn"],
}
# Change no step; nemo2.py holds the vocabulary against the tokenizer's.
_HARMLESS = (
    *("ckpt_optim_fully_reshardable", "overlap_param_gather", "vocab_size", "vp_stage", "tp_comm_bootstrap_backend"),
)

left_out: set[str] = set()


def names_of(target: Callable[..., Any]) -> set[str]:
    """Return the settings that a function or a class takes, those included that a class hands on to its bases."""
    functions = [target]
    if inspect.isclass(target):
        functions = [vars(owner)["__init__"] for owner in target.__mro__ if "__init__" in vars(owner)]
    names: set[str] = set()
    for function in functions:
        parameters = inspect.signature(function).parameters
        names |= set(parameters)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    return names


def known(target: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
    """Return `target(*arguments, **settings)`, without the settings that it lacks and does not need.

    Raise BenchError where without one of them another model would be trained, or another kernel measured.
    """
    names = names_of(target)
    kept: dict[str, Any] = {}
    for name, value in settings.items():
        older = _OLDER_NAMES.get(name, name)
        if name in names or older in names:
            kept[name if name in names else older] = value
            continue
        off = value is None or value is False or value == "none"
        if not off and name not in _HARMLESS and _WITHOUT.get(name) != value:
            instead = f"{name}={_WITHOUT.get(name, 'false' if value is True else 'null')}"
            raise BenchError(
                f"{name}={value} would be without effect: {target.__name__} of the installed version has no such "
                f"setting\nuse {instead}, or a container that has it (entrypoint=...)"
            )
        left_out.add(name)
    return target(*arguments, **kept)
