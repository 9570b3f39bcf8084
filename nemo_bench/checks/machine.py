"""What a machine lacks to run a point: GPUs, files, programs. Also what its files say against the configuration."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from omegaconf import OmegaConf

from nemo_bench.checks.datasets import NO_FILES, dataset_problems
from nemo_bench.config import TrainConfig
from nemo_bench.errors import Need, Problem
from nemo_bench.record.folder import CONFIG, RunFolder


def machine_problems(cfg: TrainConfig) -> list[Problem]:
    """Return what this machine lacks to run `cfg` itself, or the stage folder for a job on a cluster."""
    need = Need(cfg, missing=True)
    if cfg.cluster.scheduler == "slurm":
        container = cfg.cluster.container
        present = container is None or not container.image.endswith(".sqsh") or Path(container.image).is_file()
        command = f"`python setup_stage.py entrypoint={cfg.entrypoint.name} 'parts=[image]'`"
        fix = f"{command} imports it; cluster.container=null runs without a container"
        need(present, "cluster.container.image", "the container image is not there", fix)
    else:
        fix = "install NVIDIA Nsight Systems, or add its folder to PATH; profile=torch needs nothing"
        profiler = cfg.profile.kind != "nsys" or shutil.which("nsys")
        need(profiler, "profile.kind", "there is no `nsys` on PATH here", fix)
        gpus = count_gpus()
        fix = "scale=local runs without a GPU; launch=dry checks a point and runs nothing"
        enough = cfg.gpu.device == "cpu" or gpus >= cfg.trainer.devices
        need(enough, "trainer.devices", f"this machine has {gpus} NVIDIA GPUs", fix)
    stage = Path(cfg.stage_path)
    existing = next(folder for folder in (stage, *stage.parents) if folder.exists())
    writable = existing.is_dir() and os.access(existing, os.W_OK)
    fix = "set STAGE_PATH to a folder that you can write; for jobs, of the shared file system"
    need(writable, "stage_path", f"{existing} cannot be written, and results go there", fix)
    need.problems += dataset_problems(cfg)
    tokenizer = cfg.data.tokenizer if cfg.data.kind == "megatron" else None
    present = tokenizer is None or (Path(tokenizer) / "tokenizer.json").is_file()
    fix = f"`python setup_stage.py 'parts=[tokenizer]'` brings it; {NO_FILES}"
    need(present, "data.tokenizer", "holds no tokenizer.json (Hugging Face's format)", fix)
    for name in ("resume_from", "weights_from"):
        if (folder := getattr(cfg.checkpoint, name)) is not None:
            _checkpoint(cfg, need, f"checkpoint.{name}", Path(folder))
    return need.problems


def count_gpus() -> int:
    """Return how many NVIDIA GPUs this machine has, without loading CUDA."""
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def _checkpoint(cfg: TrainConfig, need: Need, key: str, folder: Path) -> None:
    need.missing = True
    checkpoint = RunFolder(folder).last_checkpoint()
    rule = "holds no finished checkpoint" if folder.is_dir() else "is not a folder"
    need(checkpoint, key, rule, "give the folder of a run with checkpoint.every_n_steps set, or of one checkpoint")
    need.missing = False
    for record in (path for path in (folder / CONFIG, folder.parent.parent / CONFIG) if path.is_file()):
        written = OmegaConf.select(OmegaConf.load(record), "model", default={})
        sizes = vars(cfg.architecture).items()
        other = ", ".join(f"{name}={written[name]}" for name, size in sizes if written.get(name) != size)
        need(not other, key, f"was written by a model of other sizes: {other}", "give the model the same sizes")
    if checkpoint is None or key != "checkpoint.resume_from":
        return
    done, steps = int(checkpoint.name.partition("=")[2]) + 1, cfg.trainer.max_steps
    rule = f"its last checkpoint is of step {done}, and trainer.max_steps={steps}"
    need(done < steps, key, rule, "use a larger trainer.max_steps, or one of its earlier checkpoints")
    profiled = cfg.profile.kind == "none" or cfg.profile.start_step > done
    rule = f"the run continues at step {done} (checkpoint.resume_from), and a step before warms the profiler up"
    need(profiled, "profile.start_step", rule, f"nearest that works: {done + 1}")
