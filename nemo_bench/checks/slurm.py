"""Rules about the request that is made of Slurm, which accepts much of what it cannot run."""

from __future__ import annotations

import re

from nemo_bench.config import TrainConfig
from nemo_bench.errors import Need
from nemo_bench.fields import settings
from nemo_bench.project import PROJECT

# sbatch's options that follow from other settings of the configuration.
OURS = (
    *("array", "chdir", "error", "export", "gpus", "gpus-per-task", "input", "job-name", "mem-per-cpu", "mem-per-gpu"),
    *("nodes", "no-requeue", "ntasks", "ntasks-per-gpu", "ntasks-per-node", "open-mode", "output", "parsable"),
    *("requeue", "signal", "test-only", "wait", "wrap"),
)
# Variables that srun or the ranks' launcher sets for each rank.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK")
_TIME = re.compile(
    r"(?:(?P<days>\d+)-(?P<day_hours>\d+)(?::(?P<day_minutes>\d+)(?::(?P<day_seconds>\d+))?)?"
    r"|(?P<hours>\d+):(?P<hour_minutes>\d+):(?P<hour_seconds>\d+)"
    r"|(?P<minutes>\d+)(?::(?P<seconds>\d+))?)"
)


def slurm_rules(cfg: TrainConfig, need: Need) -> None:
    """Check what is asked of Slurm."""
    c = cfg.cluster
    for key, owner, setting in settings(c, "cluster."):
        value = getattr(owner, setting.name)
        if isinstance(value, str):
            one_line = value.strip() and "\n" not in value
            need(one_line, key, "must be one line that is not empty", "use null to leave the option out")
    need(c.mem is None or re.fullmatch(r"\d+[KMGT]?", c.mem, re.IGNORECASE), "cluster.mem",
         "must be a size in sbatch's words", "such as 0 (all of a node's memory), 512G or null")  # fmt: skip
    _time_limit(cfg, need)
    _gpus(cfg, need)
    for name in c.additional_parameters:
        rule, fix = "follows from other settings of the configuration", "leave it out"
        key = f"cluster.additional_parameters.{name}"
        need(name.replace("_", "-") not in OURS, key, rule, fix, value=c.additional_parameters[name])
    for name, value in c.env.items():
        key, fix = f"cluster.env.{name}", "leave it out"
        need(re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII), key, "is not a variable's name", fix, value=value)
        ours = name in RANK_VARIABLES or name.startswith(("SLURM_", "PMI_", "PMIX_"))
        need(not ours, key, "is set for each rank by srun or by the launcher", fix, value=value)
    _paths(cfg, need)


def limit_s(time: str) -> float | None:
    """Return a time limit in sbatch's words in seconds; None if it is not one."""
    match = _TIME.fullmatch(time)
    if match is None:
        return None
    value = {name: int(text) for name, text in match.groupdict(default="0").items()}
    hours = 24 * value["days"] + value["day_hours"] + value["hours"]
    minutes = value["day_minutes"] + value["hour_minutes"] + value["minutes"]
    return 3600 * hours + 60 * minutes + value["day_seconds"] + value["hour_seconds"] + value["seconds"]


def _time_limit(cfg: TrainConfig, need: Need) -> None:
    c = cfg.cluster
    if c.time is None:
        return
    limit = limit_s(c.time)
    rule, fix = "must be a time limit above 0 in sbatch's words", "such as 90 (minutes), 01:30:00, 2-12 or null"
    need(limit, "cluster.time", rule, fix)
    if limit and cfg.checkpoint.every_n_steps is not None:
        rule = f"must be less than the time limit, cluster.time={c.time}: the job would only checkpoint and requeue"
        need(c.signal_s < limit, "cluster.signal_s", rule, "use a longer limit, or signal later")


def _gpus(cfg: TrainConfig, need: Need) -> None:
    c, devices = cfg.cluster, cfg.trainer.devices
    if cfg.gpu.device != "cuda":
        return
    if c.gres is not None:
        counts = [int(count or 1) for count in re.findall(r"\bgpu(?::[A-Za-z]\w*)?(?::(\d+))?(?=,|\(|$)", c.gres)]
        rule = f"gives a node {sum(counts)} GPUs, and it has trainer.devices={devices} ranks"
        need(not counts or sum(counts) >= devices, "cluster.gres", rule, f"such as gpu:{devices}")
        return
    requested = c.requested_gpus_per_node
    if requested is None:
        return
    count = requested.rpartition(":")[2]
    if not count.isdecimal():
        rule = "must be a number of GPUs, with or without a type"
        need(False, "cluster.gpus_per_node", rule, "such as 8, h100:8 or null")
    else:
        nodes = -(-cfg.world_size // max(1, int(count)))
        rule = f"ranks on a node, and a node has cluster.gpus_per_node={requested} GPUs"
        fix = f"as many GPUs: trainer.devices={count} trainer.num_nodes={nodes}"
        need(int(count) >= devices, "trainer.devices", rule, fix)


def _paths(cfg: TrainConfig, need: Need) -> None:
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
