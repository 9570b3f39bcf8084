"""`check_machine.py`: from the composed configuration to ranks on this machine, or to a Slurm job."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from nemo_bench.checks.problems import problems
from nemo_bench.cluster import jobs, processes
from nemo_bench.config import ComposedPoint, TrainConfig, typed
from nemo_bench.errors import BenchError, ConfigurationRefused, RunFailed
from nemo_bench.files import dated_name, write_text
from nemo_bench.launch import batch_script, point
from nemo_bench.machine.findings import text
from nemo_bench.machine.node import READ_FILE
from nemo_bench.project import PROJECT
from nemo_bench.record.folder import CONFIG, read_object
from nemo_bench.record.machine import CHECK, CHECKS
from nemo_bench.report.terminal import make_console

READ_BYTES = 64 << 20
END_S = 180.0
# Sections of the configuration that have no part in a check.
_UNUSED = ("data", "checkpoint", "profile", "gpu.memory_gib")


def run_check(raw: DictConfig) -> None:
    """Check this machine; raise RunFailed where there are findings."""
    cfg = _checked(raw, here=True)
    if cfg.launch == "dry":
        print("each rank ", shlex.join(rank_command(cfg, Path("<folder>"), sys.executable)))
        print("launch=dry: nothing was started.")
        return
    folder = new_folder(cfg)
    print(f"folder: {folder}", flush=True)
    command, environment = rank_command(cfg, folder, sys.executable), point.rank_environment(cfg)
    end_s = time.monotonic() + END_S
    with processes.termination_raises(), processes.started(command, environment, folder, cfg.trainer.devices) as ranks:
        while (outcome := ranks.poll()) is None and time.monotonic() < end_s:
            time.sleep(0.05)
    (folder / READ_FILE).unlink(missing_ok=True)
    if not (folder / CHECK).is_file():
        rank = outcome.failed_rank if outcome and outcome.failed_rank else 0
        raise RunFailed(f"the check did not end: rank {rank} failed or is silent; its log: {folder}/rank{rank}.out")
    content = read_object(folder / CHECK)
    print(text(content))
    if content["findings"]:
        raise RunFailed(f"{len(content['findings'])} findings")


def submit_checks(points: list[ComposedPoint], *, wait: bool) -> None:
    """Submit a job for each configuration, and with `wait` follow them; RunFailed, then, where there are findings."""
    configs = [_checked(each.config, here=False) for each in points]
    if any(cfg.launch == "dry" for cfg in configs):
        jobs.show_commands([_script(cfg, Path(cfg.stage_path) / CHECKS / "<folder>") for cfg in configs])
        return
    jobs.require_sbatch()
    submitted = []
    for cfg in configs:
        folder = new_folder(cfg)
        job = jobs.submit(_script(cfg, folder), folder)
        print(f"job {job.job_id}: {job.name}, log {job.log}", flush=True)
        submitted.append(job)
    if wait:
        jobs.follow(make_console(), submitted)


def _checked(raw: DictConfig, *, here: bool) -> TrainConfig:
    cfg = typed(raw)
    if here and cfg.cluster.scheduler != "none":
        raise BenchError(
            f"cluster={cfg.cluster.name}: add hydra/launcher=submitit_slurm to check it in a job.\n"
            "scale=local checks this machine's CPU; cluster=local its GPUs"
        )
    if not here:
        jobs.require_slurm(cfg.cluster)
    dry = cfg.launch == "dry"
    kept = [each for each in problems(cfg) if not each.key.startswith(_UNUSED) and not (dry and each.missing)]
    if kept:
        raise ConfigurationRefused(kept)
    return cfg


def new_folder(cfg: TrainConfig) -> Path:
    """Make the check's folder; what reads runs takes it for none."""
    folder = Path(cfg.stage_path) / CHECKS / dated_name()
    folder.mkdir(parents=True)
    write_text(folder / CONFIG, OmegaConf.to_yaml(OmegaConf.structured(cfg)))
    (folder / READ_FILE).write_bytes(bytes(READ_BYTES))
    return folder


def rank_command(cfg: TrainConfig, folder: Path, python: str) -> list[str]:
    """Return what each rank runs with the interpreter `python`."""
    return [python, "-u", str(PROJECT / "nemo_bench" / "machine" / "rank.py"), str(folder)]


def _script(cfg: TrainConfig, folder: Path) -> str:
    return batch_script.batch_script(cfg, folder, rank_command)
