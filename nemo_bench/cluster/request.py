"""Rules about the request that is made of Slurm, which accepts much of what it cannot run."""

from __future__ import annotations

import math
import re
from typing import Any

from nemo_bench.config import TrainConfig
from nemo_bench.errors import Need
from nemo_bench.fields import settings
from nemo_bench.project import PROJECT

# sbatch's options that follow from other settings of the configuration.
OURS = (
    *("array", "gpus-per-task", "job-name", "nodes", "no-requeue", "ntasks", "ntasks-per-gpu", "ntasks-per-node"),
    *("open-mode", "output", "parsable", "requeue", "signal", "test-only", "wrap"),
)
# Variables that differ by rank, or that the ranks agree on.
RANK_VARIABLES = (
    *("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS", "SLURM_JOB_ID"),
)


def slurm_rules(cfg: Any, need: Need) -> None:
    """Check what is asked of Slurm by any configuration that has a `cluster`."""
    c = cfg.cluster
    for key, owner, setting in settings(c, "cluster."):
        if isinstance(value := getattr(owner, setting.name), str):
            one_line = value.strip() and "\n" not in value
            need(one_line, key, "must be one line that is not empty", "use null to leave the option out")
    size = c.mem is None or re.fullmatch(r"\d+([KMGT](i?B)?)?", c.mem, re.IGNORECASE)
    fix = "such as 0 (all of a node's memory), 512G or null"
    need(size, "cluster.mem", "must be a size in sbatch's words", fix)
    limit_s = math.inf if c.time is None else _limit_s(c.time)
    rule, fix = "must be a time limit in sbatch's words", "such as 90 (minutes), 01:30:00, 2-12 or null"
    need(limit_s, "cluster.time", rule, fix)
    if limit_s and isinstance(cfg, TrainConfig) and cfg.checkpoint.every_n_steps is not None:
        rule = f"must be less than the time limit, cluster.time={c.time}: the job would only checkpoint and requeue"
        need(c.signal_s < limit_s, "cluster.signal_s", rule, "use a longer limit, or signal later")
    _gpus(cfg, need)
    for name, value in c.additional_parameters.items():
        key, option = f"cluster.additional_parameters.{name}", name.replace("_", "-")
        ours = option in OURS or (option in ("mem-per-cpu", "mem-per-gpu") and c.mem is not None)
        need(not ours, key, "follows from other settings of the configuration", "leave it out")
        need(not isinstance(value, (list, dict)), key, "must be one value", "write it as sbatch reads it")
    for name, value in c.env.items():
        key, fix = f"cluster.env.{name}", "leave it out"
        need(name.isascii() and name.isidentifier(), key, "is not a variable's name", fix, value=value)
        need(name not in RANK_VARIABLES, key, "is set for each rank by srun or by the launcher", fix)
    _paths(cfg, need)


def _limit_s(time: str) -> float | None:
    """Return a time limit in sbatch's words in seconds; None if it is not one. 0 means no limit."""
    if time.upper() in ("INFINITE", "UNLIMITED", "-1"):
        return math.inf
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if match is None:
        return None
    days, *numbers = (int(number) if number else None for number in match.groups())
    from_hours = days is not None or numbers[-1] is not None  # else minutes, or minutes:seconds
    units_s = (3600, 60, 1) if from_hours else (60, 1)
    return 86400 * (days or 0) + sum((number or 0) * unit_s for number, unit_s in zip(numbers, units_s)) or math.inf


def _gpus(cfg: Any, need: Need) -> None:
    c = cfg.cluster
    devices = cfg.trainer.devices if isinstance(cfg, TrainConfig) and cfg.gpu.device == "cuda" else 0
    if c.gres is not None:
        counts = [int(count or 1) for count in re.findall(r"\bgpu(?::[A-Za-z]\w*)?(?::(\d+))?(?=,|\(|$)", c.gres)]
        rule = f"gives a node {sum(counts)} GPUs, and it has trainer.devices={devices} ranks"
        need(not counts or sum(counts) >= devices, "cluster.gres", rule, f"such as gpu:{devices}")
    elif c.gpus_per_node is not None:
        count = re.fullmatch(r"(?:\w+:)?([1-9]\d{0,3})", c.gpus_per_node)
        rule = "must be a number of GPUs, with or without a type"
        need(count, "cluster.gpus_per_node", rule, "such as 8, h100:8 or null")
        if count and devices > int(count[1]):
            rule = f"ranks on a node, and a node has cluster.gpus_per_node={c.gpus_per_node} GPUs"
            nodes = math.ceil(cfg.world_size / int(count[1]))
            need(False, "trainer.devices", rule, f"as many: trainer.devices={count[1]} trainer.num_nodes={nodes}")


def _paths(cfg: Any, need: Need) -> None:
    """Check the paths that the batch script and the container's mounts hold."""
    paths = [("this project's folder", str(PROJECT))]
    for key, owner, setting in settings(cfg):
        value = getattr(owner, setting.name) if setting.metadata.get("path") else None
        paths += [(key, path) for path in (value if isinstance(value, list) else [value] if value else [])]
    for key, path in paths:
        need("\\" not in path, key, "holds a backslash, which Slurm changes", "use another path", value=path)
        if cfg.cluster.container is not None:
            rule = "holds a comma, a colon or a blank, which --container-mounts cannot"
            need(not re.search(r"[,:\s]", path), key, rule, "use another path; cluster.container=null", value=path)
