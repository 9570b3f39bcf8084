"""What the entrypoint (conf/entrypoint) decides about a run: its command, environment, files, and what it cannot do."""

from __future__ import annotations

from pathlib import Path

from nemo_bench.cluster import nsys
from nemo_bench.config import TrainConfig
from nemo_bench.entrypoints import nemo_24_09
from nemo_bench.errors import Problem
from nemo_bench.files import write_text
from nemo_bench.project import PROJECT

NEMO2 = "nemo2"


def problems(cfg: TrainConfig) -> list[Problem]:
    """What the entrypoint cannot do of what the configuration asks for."""
    if cfg.entrypoint.name == nemo_24_09.NAME:
        return nemo_24_09.problems(cfg)
    if cfg.entrypoint.name != NEMO2:
        rule = "is no program that this project can start"
        return [Problem("entrypoint.name", cfg.entrypoint.name, rule, f"valid: {NEMO2}, {nemo_24_09.NAME}")]
    return []


def machine_problems(cfg: TrainConfig) -> list[Problem]:
    """What this machine lacks to run the entrypoint's program here."""
    return nemo_24_09.machine_problems(cfg) if cfg.entrypoint.name == nemo_24_09.NAME else []


def rank_command(cfg: TrainConfig, run_dir: Path, python: str) -> list[str]:
    """What each rank runs with the interpreter `python`."""
    if cfg.entrypoint.name == nemo_24_09.NAME:
        recorded = [python, "-u", str(PROJECT / "nemo_bench" / "launch" / "program_rank.py"), str(run_dir)]
        if cfg.profile.kind == "nsys":
            ranks = ",".join(map(str, cfg.profile.ranks))
            recorded += ["--on-ranks", ranks, *nsys.command(cfg.profile, run_dir, "{rank}"), "--"]
        return recorded + nemo_24_09.command(cfg, run_dir, python)
    return [python, "-u", "-m", "nemo_bench.training.rank", str(run_dir)]


def environment(cfg: TrainConfig) -> dict[str, str]:
    """Variables of every rank; `cluster.env` and, on this machine, the user's own stand over them."""
    follows = nemo_24_09.environment(cfg) if cfg.entrypoint.name == nemo_24_09.NAME else {}
    return {**cfg.entrypoint.env, **follows}


def srun_options(cfg: TrainConfig) -> list[str]:
    """Options of srun that the program needs; `cluster.srun_args` stand after them."""
    return nemo_24_09.srun_options(cfg) if cfg.entrypoint.name == nemo_24_09.NAME else []


def uses_own_import_path(cfg: TrainConfig) -> bool:
    """Whether the program keeps the PYTHONPATH of its image: it needs nothing of this project where there is a GPU."""
    return cfg.entrypoint.name == nemo_24_09.NAME and cfg.gpu.device == "cuda"


def write_files(cfg: TrainConfig, run_dir: Path) -> None:
    """Writes what the ranks read besides `config.yaml`."""
    if cfg.entrypoint.name == nemo_24_09.NAME:
        write_text(run_dir / nemo_24_09.CONFIG_FILE, nemo_24_09.yaml_text(cfg, run_dir))


def files(cfg: TrainConfig, run_dir: Path) -> str:
    """For launch=dry: what `write_files` would write, with its place; empty where it writes nothing."""
    if cfg.entrypoint.name != nemo_24_09.NAME:
        return ""
    return f"# {run_dir / nemo_24_09.CONFIG_FILE}\n{nemo_24_09.yaml_text(cfg, run_dir)}"
