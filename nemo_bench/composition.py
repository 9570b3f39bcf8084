"""Composing with Hydra: the functions that conf/ calls, what Hydra does not do by itself, its errors in our words."""

from __future__ import annotations

import difflib
import math
import os
import re
import shlex
import sys
from collections.abc import Sequence

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf

from nemo_bench.errors import BenchError
from nemo_bench.fields import absolute, settings
from nemo_bench.project import PROJECT

# Groups that are not keys of the composed configuration.
GROUPS_ONLY = ("scale", "experiment")
# Lines of Hydra's messages about its own objects, or that propose `+key=value`: the schema is closed.
_NOISE = ("To append to your", "Config search path", "provider=", "See https://hydra.cc")


def weak_scaling_batch(sequences: int, per_gpus: int, num_nodes: int, devices: int) -> int:
    """Return the global batch size (sequences) that keeps `sequences` on every `per_gpus` GPUs, rounded up."""
    return math.ceil(sequences * num_nodes * devices / per_gpus)


def default_stage_path() -> str:
    """Return `STAGE_PATH`, or `outputs` if it is not set or empty; absolute."""
    return absolute(os.environ.get("STAGE_PATH") or "outputs")


def nodes_of(gpus: int, gpus_per_node: int) -> int:
    """Return how many nodes hold so many GPUs, rounded up."""
    return math.ceil(gpus / gpus_per_node)


def recipe_profile_ranks(model: str, num_nodes: int, devices: int) -> list[int]:
    """Return the ranks that NVIDIA's recipe profiles: the first 8 of the 8B, else 16, or all."""
    return list(range(min(8 if model == "8b" else 16, num_nodes * devices)))


def first_set(*variables: str) -> str | None:
    """Return the first of these environment variables that is not empty; the recipe's "null" is no value."""
    # In a job, Slurm sets this one to what that job has.
    of_a_job = "SLURM_GPUS_PER_NODE" if "SLURM_JOB_ID" in os.environ else None
    value = next((os.environ[name] for name in variables if name != of_a_job and os.environ.get(name)), None)
    return None if value == "null" else value


for resolver in (weak_scaling_batch, nodes_of, recipe_profile_ranks, default_stage_path, first_set):
    OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)


def prepare_hydra() -> None:
    """Prepare Hydra and the command line that it is about to read."""
    # hydra-submitit-launcher registers launchers of the same names: Hydra would hold ours against their schemas.
    Plugins.instance()  # finds and registers all plugins, once
    launchers = ConfigStore.instance().repo.get("hydra", {}).get("launcher", {})
    for name in ("submitit_slurm.yaml", "submitit_local.yaml"):
        launchers.pop(name, None)
    # scale=64,128 means scale=64gpu,128gpu; scale=upto(128) all scales up to there that NVIDIA has published.
    model = next((argument[6:] for argument in reversed(sys.argv) if argument.startswith("model=")), "70b")
    for position, argument in enumerate(sys.argv):
        if argument.startswith("scale=upto("):
            argument = f"scale={_published_scales(argument, model)}"
        if argument.startswith("scale="):
            sys.argv[position] = re.sub(r"(?<=[=,])(\d+)(?=,|$)", r"\1gpu", argument)


def _published_scales(upto: str, model: str) -> str:
    """Return the GPUs of the published points of `model` that "scale=upto(128)" means: "64,128"."""
    points = (PROJECT / "conf" / "experiment").glob(f"llama31_{model}_*_*gpu.yaml")
    published = sorted({int(path.stem.rpartition("_")[2].removesuffix("gpu")) for path in points})
    most = re.fullmatch(r"scale=upto\((\d+)(?:gpu)?\)", upto)
    scales = [str(gpus) for gpus in published if most and gpus <= int(most[1])]
    if not scales:
        known = ", ".join(map(str, published)) or "none"
        raise BenchError(f"{upto}: give a number of GPUs, as in 'scale=upto(512)'\n  published for {model}: {known}")
    return ",".join(scales)


def composition_error(error: Exception, schema: type | None) -> str:
    """Return an error that Hydra or OmegaConf raised as one message, with names that are close to a mistyped one."""
    if isinstance(error, MissingConfigException) and error.options:
        return _unknown_option(error.missing_cfg_file or "", error.options)
    cause = error.__cause__ or error
    text = str(cause).partition("\n    full_key:")[0]  # OmegaConf goes on about its own objects
    full_key = getattr(cause, "full_key", None)
    if schema is not None and full_key and re.search("Key '.*' (is not in struct|not in ')", text):
        return _unknown_key(full_key, schema)
    lines = [line.strip() for line in text.splitlines()]
    if isinstance(error, OverrideParseException):
        key, _, value = error.override.partition("=")
        lines.insert(0, f"cannot read the override {error.override}")
        lines.append(f"a value with a blank, é or one of = , : [ ] {{ }} needs quotes: \"{key}='{value}'\"")
    elif error is not cause:
        lines.insert(0, str(error))
    elif full_key:
        lines.insert(0, full_key)
    elif not isinstance(error, HydraException) and (overrides := [word for word in sys.argv[1:] if "=" in word]):
        lines.insert(0, f"Hydra cannot apply {shlex.join(overrides)}")
        lines.append("a group is chosen by the name of one of its options, as in model=70b")
        lines.append("a section that is null takes no values: choose an option that has it, as in cluster=slurm")
    return "\n  ".join(line for line in lines if line and not line.startswith(_NOISE))


def _unknown_option(file: str, options: Sequence[str]) -> str:
    group, _, option = file.rpartition("/")
    if file == "hydra/launcher/submitit_local":
        there = "-m runs the points of a sweep in turn, in the foreground; submitit_slurm submits them to Slurm"
        return f"hydra/launcher=submitit_local no longer exists: leave it out\n  {there}"
    by_number = sorted(options, key=lambda name: [int(part) for part in re.findall(r"\d+", name)])
    return f"{group}={option}: there is no such {group}\n  valid: {', '.join(by_number)}"


def _unknown_key(key: str, schema: type) -> str:
    parent, _, name = key.rpartition(".")
    types = {other: str(setting.type) for other, _, setting in settings(schema())}
    if types.get(parent, "").startswith("dict"):
        return f"unknown key: {key}\n  {parent} takes any key: add one with +{parent}.<key>=<value>"
    valid = [*types, *(GROUPS_ONLY if "trainer" in types else ())]
    siblings = {other.rpartition(".")[2]: other for other in valid if other.rpartition(".")[0] == parent}
    close = [siblings[word] for word in difflib.get_close_matches(name, siblings)]
    return f"unknown key: {key}\n  {'did you mean' if close else 'valid here'}: {', '.join(close or siblings.values())}"
