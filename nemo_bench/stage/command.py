"""`setup_stage.py`'s verbs on a composed configuration."""

from __future__ import annotations

import shlex
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.table import Table

from nemo_bench.cluster.processes import Terminated, termination_raises
from nemo_bench.config import Launch, typed_as
from nemo_bench.errors import BenchError, RunFailed
from nemo_bench.files import explained_disk_errors, size_text
from nemo_bench.report.terminal import make_console
from nemo_bench.stage.bundle import install, pack
from nemo_bench.stage.code import code_part
from nemo_bench.stage.config import Action, PartName, StageConfig
from nemo_bench.stage.image import image_part
from nemo_bench.stage.stage import REMEDY, Part, Stage, fill, print_line
from nemo_bench.stage.tokenizer import tokenizer_part


def run_stage(raw: DictConfig) -> None:
    """Fill, check, pack or install the stage folder; with launch=dry, print what would be done.

    Raises BenchError if something is missing or in the way (what could be done is done), RunFailed if it was ended.
    """
    cfg = typed_as(StageConfig, raw)
    try:
        with termination_raises():
            _run(cfg, Stage(Path(cfg.stage_path)))
    except Terminated as ended:
        message = f"ended by {ended}: nothing half-made was left; run it again to continue"
        raise RunFailed(message, 128 + ended.signum) from None


def _run(cfg: StageConfig, stage: Stage) -> None:
    bundle = None if cfg.bundle is None else Path(cfg.bundle)
    if cfg.action in (Action.pack, Action.install) and bundle is None:
        raise BenchError(f"{cfg.action.value} needs a file: bundle=stage.tar, or bundle=stage.tar.zst (compressed)")
    if bundle is not None and (cfg.action is Action.install or (cfg.action is Action.fill and bundle.exists())):
        install(stage, bundle, dry=cfg.launch is Launch.dry)
        return
    parts = _parts(cfg, stage.folder)
    if cfg.action is Action.check:
        _check(stage, parts)
    elif cfg.launch is Launch.dry:
        _print_plan(stage, parts if cfg.action is Action.fill else [], bundle)
    else:
        if cfg.action is Action.fill:
            _fill(stage, parts)
        if bundle is not None:
            pack(stage, parts, bundle)


def _parts(cfg: StageConfig, stage_folder: Path) -> list[Part]:
    """Return the parts that the configuration names; the one that takes longest comes last."""
    if not cfg.parts:
        raise BenchError(f"parts=[] is empty: choose from {', '.join(name.value for name in PartName)}")
    parts = []
    if PartName.tokenizer in cfg.parts:
        parts.append(tokenizer_part(cfg, stage_folder))
    if PartName.code in cfg.parts:
        parts.append(code_part())
    if PartName.image in cfg.parts:
        parts.append(image_part(cfg, stage_folder))
    return parts


def _fill(stage: Stage, parts: list[Part]) -> None:
    """Make the parts that do not exist; one that cannot be made does not stop the others."""
    with explained_disk_errors(stage.folder, REMEDY):
        stage.folder.mkdir(parents=True, exist_ok=True)
    problems = []
    for part in parts:
        try:
            fill(stage, part)
        except BenchError as error:
            problems.append(f"{part.name.value}: {error}")
    if problems:
        raise BenchError("\n\n".join(problems))
    print_line(f"stage folder {stage.folder}: {', '.join(part.name.value for part in parts)} complete")


def _print_plan(stage: Stage, parts: list[Part], bundle: Path | None) -> None:
    print_line(f"stage folder: {stage.folder}")
    for part in parts:
        state, path = stage.state(part.place, part.settings, contents=False), stage.folder / part.place
        text = f"complete ({path})"
        if state.problem:
            text = f"REFUSED: {path} {state.problem}" if state.blocked else part.plan
        print_line(f"{part.name.value}: {text}")
    if bundle is not None:
        print_line(f"then pack all of it into {bundle}")
    print_line("launch=dry: nothing was done.")


def _check(stage: Stage, parts: list[Part]) -> None:
    """Read every byte of the parts, print a table, and name the commands that repair them."""
    table = Table(title=f"stage folder {stage.folder}", title_justify="left")
    for name in ("part", "state", "size", "version", "made at", "place"):
        table.add_column(name, justify="right" if name == "size" else "left", overflow="fold")
    entries, problems, moves, wrong = stage.entries(), [], [], []
    for part in parts:
        state, path = stage.state(part.place, part.settings, contents=True), stage.folder / part.place
        entry = entries.get(part.place)
        facts = (size_text(entry.size_bytes), entry.version, entry.made_at) if entry else ("", "", "")
        table.add_row(part.name.value, "wrong" if state.problem else "ok", *facts, part.place)
        if state.problem:
            problems.append(f"{part.name.value}: {path} {state.problem}")
            wrong.append(part.name.value)
        if state.blocked:
            moves.append(shlex.join(["mv", str(path), f"{path}.old"]))
    make_console().print(table)
    print_line("python prepare_data.py check verifies the datasets")
    if problems:
        chosen = HydraConfig.get().overrides.task
        overrides = [text for text in chosen if not text.startswith(("action=", "parts=", "bundle=", "launch="))]
        command = shlex.join(["python", "setup_stage.py", *overrides, f"parts=[{','.join(wrong)}]"])
        raise BenchError("\n".join([*problems, "these commands make it as the options ask:", *moves, command]))
