"""`check_machine.py`: from the composed configuration to ranks on this machine, or to a Slurm job."""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from nemo_bench.checks.problems import problems
from nemo_bench.cluster import jobs, processes
from nemo_bench.config import ComposedPoint, TrainConfig, typed
from nemo_bench.errors import BenchError, ConfigurationRefused, RunFailed
from nemo_bench.files import dated_name, explained_disk_errors, write_text
from nemo_bench.launch.batch_script import batch_script, rank_environment
from nemo_bench.machine.findings import text
from nemo_bench.project import PROJECT
from nemo_bench.record.folder import CONFIG, read_object
from nemo_bench.record.machine import CHECK, CHECKS, READ_FILE

# Sections of the configuration that have no part in a check.
_UNUSED = ("data", "checkpoint", "profile", "gpu.memory_gib")


def run_check(raw: DictConfig) -> None:
    """Check this machine; raise RunFailed where there are findings."""
    cfg = _checked(raw)
    if cfg.cluster.scheduler != "none":
        raise BenchError(
            f"cluster={cfg.cluster.name}: add hydra/launcher=submitit_slurm to check it in a job.\n"
            "scale=local checks this machine's CPU; cluster=local its GPUs"
        )
    if cfg.launch == "dry":
        command = shlex.join(rank_command(cfg, Path("<folder>"), sys.executable))
        print(f"each rank  {command}\nlaunch=dry: nothing was started.")
        return
    folder = new_folder(cfg)
    rank = rank_command(cfg, folder, sys.executable)
    ranks = processes.started(rank, rank_environment(cfg, os.environ), folder, cfg.trainer.devices)
    with processes.explained_signals("all ranks were ended, and nothing was found"), ranks as group:
        while group.processes[0].poll() is None:  # it tells of the others
            time.sleep(0.05)
    if not (folder / CHECK).is_file():
        raise RunFailed(f"the check did not end; the ranks' logs are in {folder}")
    content = read_object(folder / CHECK)
    print(text(content))
    if content["findings"]:
        raise RunFailed("the machine has findings")


def submit_checks(points: list[ComposedPoint], *, wait: bool) -> None:
    """Submit a job for each configuration, and with `wait` follow them; RunFailed, then, where there are findings."""
    configs = [_checked(each.config) for each in points]
    for cfg in configs:
        jobs.require_slurm(cfg)
    if any(cfg.launch == "dry" for cfg in configs):
        folder = Path(configs[0].stage_path, CHECKS, "<folder>")
        jobs.show_scripts([batch_script(cfg, folder, rank_command) for cfg in configs])
        return
    submitted = []
    for cfg in configs:
        folder = new_folder(cfg)
        submitted.append(jobs.submit(batch_script(cfg, folder, rank_command), folder))
        print(f"job {submitted[-1].job_id}: python jobs.py log {submitted[-1].job_id} shows what it finds", flush=True)
    if wait:
        try:
            jobs.follow(submitted)
        except RunFailed as failed:
            # Ranks that were ended have greater exit codes than the one that names the findings.
            raise RunFailed(str(failed)) from None


def _checked(raw: DictConfig) -> TrainConfig:
    cfg = typed(raw)
    dry = cfg.launch == "dry"
    if broken := [p for p in problems(cfg) if not p.key.startswith(_UNUSED) and not (dry and p.missing)]:
        raise ConfigurationRefused(broken)
    return cfg


def new_folder(cfg: TrainConfig) -> Path:
    """Make a check's folder; what reads runs takes it for none."""
    folder = Path(cfg.stage_path, CHECKS, dated_name())
    with explained_disk_errors(folder, "a check needs 64 MiB: choose another stage folder (STAGE_PATH=...)"):
        folder.mkdir(parents=True)
        write_text(folder / CONFIG, OmegaConf.to_yaml(OmegaConf.structured(cfg)))
        (folder / READ_FILE).write_bytes(bytes(64 << 20))
    return folder


def rank_command(cfg: TrainConfig, folder: Path, python: str) -> list[str]:
    """Return what each rank runs with the interpreter `python`."""
    return [python, "-u", str(PROJECT / "nemo_bench" / "machine" / "rank.py"), str(folder)]
