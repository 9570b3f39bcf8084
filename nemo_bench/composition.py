"""Composing with Hydra: the functions that conf/ calls, what Hydra does not do by itself, its errors in our words."""

from __future__ import annotations

import difflib
import functools
import math
import os
import re
import sys
from typing import Any

from omegaconf import OmegaConf

from nemo_bench.fields import absolute, settings

# Groups that are not keys of the composed configuration.
GROUPS_ONLY = ("scale", "experiment")
# Lines of Hydra's and OmegaConf's messages about their own objects, or that propose `+key=value`: the schema is closed,
# so that would only move the error.
_NOISE: tuple[str, ...] = ("To append to your config", "Config search path", "See https://hydra.cc")
_NOISE += ("reference_type=", "object_type=", "full_key:", "provider=")


def weak_scaling_batch(sequences: int, per_gpus: int, num_nodes: int, devices: int) -> int:
    """Return the global batch size (sequences) that keeps `sequences` on every `per_gpus` GPUs, rounded up.

    Rounding never hides a wrong batch: the checks refuse one that does not divide into micro-batches.
    """
    return math.ceil(sequences * num_nodes * devices / per_gpus)


def default_stage_path() -> str:
    """Return `STAGE_PATH`, or `outputs` if it is not set or empty; absolute."""
    return absolute(os.environ.get("STAGE_PATH") or "outputs")


def first_set(*variables: str) -> str | None:
    """Return the value of the first of these environment variables that is set and not empty."""
    return next(filter(None, map(os.environ.get, variables)), None)


@functools.cache
def temporary_folder() -> str:
    """Return a folder that is removed when this process ends, for what Hydra's sweeper writes about a sweep."""
    import atexit
    import shutil
    import tempfile

    folder = tempfile.mkdtemp(prefix="nemo-bench-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


for resolver in (weak_scaling_batch, default_stage_path, first_set, temporary_folder):
    OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)


def prepare_hydra() -> None:
    """Prepare Hydra and the command line that it is about to read."""
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins

    # hydra-submitit-launcher, where it is installed, registers launchers of the same names, and Hydra would hold
    # conf/hydra/launcher/ against their schemas.
    Plugins.instance()  # finds and registers all plugins, once
    launchers = ConfigStore.instance().repo.get("hydra", {}).get("launcher", {})
    for name in ("submitit_slurm.yaml", "submitit_local.yaml"):
        launchers.pop(name, None)
    # --cfg job shows numbers (global batch size 256), not the interpolations that they are computed from.
    shows_job = re.search(r" (--cfg|-c)[ =]job\b", " ".join(sys.argv))
    if shows_job and "--resolve" not in sys.argv:
        sys.argv.append("--resolve")
    # scale=64,128 means scale=64gpu,128gpu.
    for position, argument in enumerate(sys.argv):
        if argument.startswith("scale="):
            sys.argv[position] = re.sub(r"(?<=[=,])(\d+)(?=,|$)", r"\1gpu", argument)


def composition_error(error: Exception, schema: type | None) -> str:
    """Return Hydra's or OmegaConf's error as one message, with names that are close to a mistyped one."""
    whole = f"{error}\n{error.__cause__ or ''}"
    if missing := re.search(r"Could not find '([^']+)/([^'/]+)'", whole):
        return _unknown_option(missing[1], missing[2], whole)
    if "is not in struct" in whole or re.search(r"Key '\S+' not in '", whole):
        unknown = re.search(r"Could not override '([^']+)'", whole) or re.search(r"full_key: (\S+)", whole)
        if unknown and schema is not None:
            return _unknown_key(unknown[1], schema)
    lines = [line.strip() for line in whole.splitlines()]
    override = getattr(error, "override", None)  # Hydra's OverrideParseException
    if override is not None:
        key, _, value = str(override).partition("=")
        lines.insert(0, f"cannot read the override {override}")
        lines.append(f"a value that holds one of = , : [ ] {{ }} or a blank needs quotes: \"{key}='{value}'\"")
    lines = [line for line in dict.fromkeys(lines) if line and not line.startswith(_NOISE)]  # the cause often repeats
    return "\n  ".join(lines)


def _unknown_option(group: str, option: str, message: str) -> str:
    if (group, option) == ("hydra/launcher", "submitit_local"):
        return (
            "hydra/launcher=submitit_local no longer exists: leave it out; -m runs the points of a sweep in turn, "
            "in the foreground\n  hydra/launcher=submitit_slurm submits them to Slurm"
        )
    options = re.findall(r"^\t(?!provider=)(\S+)$", message, re.MULTILINE)
    options.sort(key=lambda name: [int(part) if part.isdigit() else 0 for part in re.split(r"(\d+)", name)])
    return f"{group}={option}: there is no such {group}\n  valid: {', '.join(options)}"


def _unknown_key(key: str, schema: type) -> str:
    fields: dict[str, Any] = {name: str(setting.type) for name, _, setting in settings(schema())}
    for dictionary in (key, key.rpartition(".")[0]):
        if fields.get(dictionary, "").startswith("dict"):
            return f"unknown key: {key}\n  {dictionary} takes any key: add one with +{dictionary}.<key>=<value>"
    valid = [*fields, *(GROUPS_ONLY if "trainer" in fields else ())]
    parent, _, name = key.rpartition(".")
    last_word = {other: other.rpartition(".")[2] for other in valid}
    # A long path in common says little about the last word, which is the one that was mistyped.
    close = [
        other
        for other in difflib.get_close_matches(key, valid, n=3, cutoff=0.6)
        if difflib.SequenceMatcher(None, name, last_word[other]).ratio() >= 0.6
    ]
    close += [other for other in valid if name in last_word[other] and other not in close][:3]
    if close:
        return f"unknown key: {key}\n  did you mean: {', '.join(close)}"
    siblings = [other for other in valid if other.rpartition(".")[0] == parent]
    return f"unknown key: {key}\n  valid here: {', '.join(siblings or [other for other in valid if '.' not in other])}"
