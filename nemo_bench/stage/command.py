"""`setup_stage.py`'s verbs on a composed configuration."""

from __future__ import annotations

import shlex
from pathlib import Path

from omegaconf import DictConfig

from nemo_bench.cli import quoted_path
from nemo_bench.cluster.processes import Terminated, termination_raises
from nemo_bench.config import Launch, typed_as
from nemo_bench.errors import BenchError, RunFailed
from nemo_bench.files import explained_disk_errors, size_text
from nemo_bench.stage.config import Action, PartName, StageConfig
from nemo_bench.stage.stage import REMEDY, Entry, Part, Stage, State, fill, print_line

# The sections of the configuration that choose a part.
_SECTIONS = {PartName.image: "entrypoint", PartName.tokenizer: "tokenizer", PartName.code: "code"}


def run_stage(raw: DictConfig) -> None:
    """Fill, check, pack or install the stage folder; with launch=dry, print what would be done.

    Raises:
        BenchError: something is missing or in the way. What could be done is done.
        RunFailed: it was ended from outside.
    """
    cfg = typed_as(StageConfig, raw)
    stage = Stage(Path(cfg.stage_path))
    bundle = None if cfg.bundle is None else Path(cfg.bundle)
    try:
        with termination_raises():
            _run(cfg, stage, bundle)
    except Terminated as ended:
        message = f"ended by {ended}: nothing half-made was left; run it again to continue"
        raise RunFailed(message, 128 + ended.signum) from None


def _run(cfg: StageConfig, stage: Stage, bundle: Path | None) -> None:
    dry = cfg.launch is Launch.dry
    if cfg.action in (Action.pack, Action.install) and bundle is None:
        raise BenchError(f"{cfg.action.value} needs a file: bundle=stage.tar, or bundle=stage.tar.zst (compressed)")
    if cfg.action is Action.check and bundle is not None:
        raise BenchError("check reads the stage folder; bundle=... goes with fill, pack and install")
    if bundle is not None and (cfg.action is Action.install or (cfg.action is Action.fill and bundle.exists())):
        from nemo_bench.stage.bundle import install

        install(stage, bundle, dry=dry)
        return
    parts = chosen_parts(cfg, stage.folder)
    if cfg.action is Action.check:
        check(stage, parts)
    elif dry:
        _print_plan(cfg, stage, parts, bundle)
    else:
        if cfg.action is Action.fill:
            fill_parts(stage, parts)
        if bundle is not None:
            from nemo_bench.stage.bundle import pack

            pack(stage, parts, bundle)


def chosen_parts(cfg: StageConfig, stage_folder: Path) -> list[Part]:
    """Return the parts that the configuration names; the one that takes longest comes last.

    Raises:
        BenchError: it names none, or a setting is wrong.
    """
    from nemo_bench.stage.code import code_part
    from nemo_bench.stage.image import image_part
    from nemo_bench.stage.tokenizer import tokenizer_part

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


def fill_parts(stage: Stage, parts: list[Part]) -> None:
    """Make the parts that do not exist; one that cannot be made does not stop the others.

    Raises:
        BenchError: why some could not be made.
    """
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


def _print_plan(cfg: StageConfig, stage: Stage, parts: list[Part], bundle: Path | None) -> None:
    print_line(f"stage folder: {stage.folder}")
    for part in parts if cfg.action is Action.fill else []:
        state = stage.state(part.place, part.settings, contents=False)
        text = part.plan
        if state.name == "ok":
            text = f"complete ({stage.folder / part.place})"
        elif state.blocked:
            text = f"REFUSED: {stage.folder / part.place} {state.detail}"
        print_line(f"{part.name.value}: {text}")
    if bundle is not None:
        print_line(f"then pack all of it into {bundle}")
    print_line("launch=dry: nothing was done.")


# --- check --------------------------------------------------------------------------------------------------


def check(stage: Stage, parts: list[Part]) -> None:
    """Read every byte of the recorded parts, print a table, and name the command that repairs each.

    A part is compared with the configuration only if the command line chooses it: else what is recorded counts.

    Raises:
        BenchError: a part is missing or wrong.
    """
    from rich.table import Table

    from nemo_bench.report.terminal import make_console

    table = Table(title=f"stage folder {stage.folder}", title_justify="left")
    for name in ("part", "state", "size", "version", "made at", "place"):
        table.add_column(name, justify="right" if name == "size" else "left", overflow="fold")
    problems = []
    entries = stage.entries()
    chosen = {_key(override).partition(".")[0] for override in _overrides()}
    for part in parts:
        asked = _SECTIONS[part.name] in chosen
        recorded = [] if asked else [place for place, entry in entries.items() if entry.part == part.name.value]
        for place in recorded or [part.place]:
            state = stage.state(place, part.settings if asked else None, contents=True)
            entry = entries.get(place)
            shown = (size_text(entry.size_bytes), entry.version, entry.made_at) if entry else ()
            table.add_row(part.name.value, state.name, *(shown or ("", "", "")), place)
            if state.name != "ok":
                problems.append(_remedy(stage, part, place, state, None if asked else entry))
    make_console().print(table)
    print_line("python prepare_data.py check verifies the datasets")
    if problems:
        raise BenchError("\n".join(problems))


def _remedy(stage: Stage, part: Part, place: str, state: State, entry: Entry | None) -> str:
    """Return what is wrong with a part, and the command that repairs it, as it was made or as the user asks for it."""
    path = stage.folder / place
    quoted = shlex.quote(str(path))
    command = f"mv {quoted} {quoted}.old && " if state.blocked else ""
    overrides = [text for text in _overrides() if _key(text) not in ("action", "parts", "bundle", "launch")]
    if entry is not None and place != part.place:
        overrides.append(f"{part.place_key}={quoted_path(path if part.name is PartName.tokenizer else place)}")
    if entry is not None:
        changed = {key: value for key, value in entry.settings.items() if part.settings.get(key) != value}
        overrides += [f"{key}={value}" for key, value in changed.items() if key.startswith(_SECTIONS[part.name])]
    command += shlex.join(["python", "setup_stage.py", *overrides, f"parts=[{part.name.value}]"])
    return f"{part.name.value}: {path} {state.detail}\n  {command}"


def _overrides() -> list[str]:
    """Return the command line's overrides."""
    from hydra.core.hydra_config import HydraConfig

    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def _key(override: str) -> str:
    return override.lstrip("+").partition("=")[0]
