"""`setup_stage.py`'s verbs on a composed configuration, here or as a Slurm job."""

from __future__ import annotations

import shlex
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich import filesize

from nemo_bench.cluster import jobs
from nemo_bench.cluster.processes import explained_signals
from nemo_bench.config import ComposedPoint, typed_as
from nemo_bench.errors import BenchError
from nemo_bench.files import dated_name
from nemo_bench.stage.bundle import install, pack
from nemo_bench.stage.code import code_part
from nemo_bench.stage.config import PARTS, StageConfig
from nemo_bench.stage.image import image_part
from nemo_bench.stage.stage import Part, Stage, fill, print_line
from nemo_bench.stage.tokenizer import tokenizer_part


@explained_signals("nothing half-made was left; run it again to continue")
def run_stage(raw: DictConfig) -> None:
    """Fill, check, pack or install the stage folder; raise BenchError if something is missing or in the way."""
    cfg = typed_as(StageConfig, raw)
    stage = Stage(Path(cfg.stage_path))
    if cfg.action in ("pack", "install") and cfg.bundle is None:
        raise BenchError(f"{cfg.action} needs a file: bundle=stage.tar, or bundle=stage.tar.zst (compressed)")
    if not cfg.parts:
        raise BenchError(f"parts=[] is empty: choose from {', '.join(PARTS)}")
    # The one that takes longest comes last.
    makers = {"tokenizer": tokenizer_part, "code": code_part, "image": image_part}
    parts = [part_of(cfg, stage.folder) for name, part_of in makers.items() if name in cfg.parts]
    bundle = Path(cfg.bundle or "")
    if cfg.action == "install":
        install(stage, bundle, dry=cfg.launch == "dry")
    elif cfg.action == "check":
        _check(stage, parts)
    elif cfg.launch == "dry":
        for part in parts:
            path, problem = stage.folder / part.place, stage.problem(part.place, part.settings, contents=False)
            print_line(f"{part.name}: {path} {problem}; {part.plan}" if problem else f"{part.name}: complete ({path})")
        print_line("launch=dry: nothing was done.")
    elif cfg.action == "pack":
        pack(stage, parts, bundle)
    else:
        problems = []
        for part in parts:  # one that cannot be made does not stop the others
            try:
                fill(stage, part)
            except BenchError as error:
                problems.append(f"{part.name}: {error}")
        if problems:
            raise BenchError("\n\n".join(problems))
        print_line(f"stage folder {stage.folder}: {', '.join(part.name for part in parts)} complete")


def submit_stage(points: list[ComposedPoint], *, wait: bool) -> None:
    """Submit the command of each point, for login nodes without enroot or room, and with `wait` follow the jobs."""
    # HF_TOKEN reaches the jobs in sbatch's environment; it is written nowhere.
    dry, scripts = False, list[tuple[str, Path]]()
    for point in points:
        cfg = typed_as(StageConfig, point.config)
        jobs.check_command(cfg)
        dry |= cfg.launch == "dry"
        folder = Path(cfg.stage_path) / "results.stage_setup" / dated_name()
        name = f"nemo-bench-setup-stage-{cfg.action}"
        scripts.append((jobs.command_script("setup_stage.py", point.overrides, cfg, name, folder), folder))
    hint, stage = "python setup_stage.py check shows what exists", scripts[0][1].parents[1]
    jobs.submit_commands(scripts, stage, hint, dry=dry, wait=wait)


def _check(stage: Stage, parts: list[Part]) -> None:
    """Read every byte of the parts, say how each is, and name the commands that repair them."""
    wrong, commands = [], []
    chosen = HydraConfig.get().overrides.task
    for part in parts:
        path, entry, settings = stage.folder / part.place, stage.entries().get(part.place), part.settings
        if part.name == "tokenizer" and entry and not any(text.startswith("tokenizer") for text in chosen):
            settings = entry.settings  # the options that it was filled with need not be given again
        problem = stage.problem(part.place, settings, contents=True)
        if problem:
            print_line(f"{part.name}: WRONG: {path} {problem}")
            wrong.append(part.name)
            commands += [shlex.join(["mv", str(path), f"{path}.old"])] if path.exists() else []
        elif entry:
            size = filesize.decimal(entry.size_bytes)
            print_line(f"{part.name}: ok: {path}, {size}, {entry.version}, {entry.made_at}")
    print_line("python prepare_data.py check verifies the datasets")
    if wrong:
        overrides = [text for text in chosen if not text.startswith(("action=", "parts=", "launch="))]
        commands.append(shlex.join(["python", "setup_stage.py", *overrides, f"parts=[{','.join(wrong)}]"]))
        raise BenchError("\n".join(["these commands make it as the options ask:", *commands]))
