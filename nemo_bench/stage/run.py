"""`setup_stage.py`'s verbs on a composed configuration."""

from __future__ import annotations

import math
import shlex
from pathlib import Path

from omegaconf import DictConfig

from nemo_bench.cluster.processes import Terminated, termination_raises
from nemo_bench.config import Launch, typed_as
from nemo_bench.errors import BenchError, RunFailed
from nemo_bench.files import size_text
from nemo_bench.stage import bundle, datasets
from nemo_bench.stage.code import CodePart
from nemo_bench.stage.config import Action, PartName, StageConfig
from nemo_bench.stage.files import require_room, require_stage_folder, say
from nemo_bench.stage.image import ImagePart
from nemo_bench.stage.manifest import Entry, Stage
from nemo_bench.stage.part import Part, State
from nemo_bench.stage.tokenizer import TokenizerPart

_OWN_KEYS = ("action", "parts", "bundle", "launch")


def run_stage(raw: DictConfig) -> None:
    """Fills, checks, packs or installs the stage folder (or, with launch=dry, says what would be done).

    Raises:
        BenchError: something is missing or in the way; says what mends it. What could be done is done.
        RunFailed: it was ended from outside.
    """
    cfg = typed_as(StageConfig, raw)
    stage = Stage(Path(cfg.stage_path).absolute())
    packed = None if cfg.bundle is None else Path(cfg.bundle).absolute()
    require_stage_folder(stage.folder)
    try:
        with termination_raises():
            _run(cfg, stage, packed)
    except Terminated as ended:
        message = f"ended by {ended}: nothing half-made was left; run it again to go on"
        raise RunFailed(message, 128 + ended.signum) from None


def _run(cfg: StageConfig, stage: Stage, packed: Path | None) -> None:
    dry = cfg.launch is Launch.dry
    if cfg.action in (Action.pack, Action.install) and packed is None:
        raise BenchError(f"{cfg.action.value} needs a file: bundle=stage.tar, or bundle=stage.tar.zst (compressed)")
    if cfg.action is Action.check and packed is not None:
        raise BenchError("check looks at the stage folder: bundle=... goes with fill, pack and install")
    if packed is not None and (cfg.action is Action.install or (cfg.action is Action.fill and packed.exists())):
        bundle.install(stage, packed, dry=dry)
        return
    parts = chosen_parts(cfg, stage)
    if cfg.action is Action.check:
        check(stage, parts)
    elif dry:
        _print_plan(cfg, stage, parts, packed)
    else:
        if cfg.action is Action.fill:
            fill(stage, parts)
        if packed is not None:
            bundle.pack(stage, _recorded(stage, parts), packed)


def chosen_parts(cfg: StageConfig, stage: Stage) -> list[Part]:
    """The parts that the configuration names; the one that takes longest comes last.

    Raises:
        BenchError: it names none, or their settings contradict themselves.
    """
    if not cfg.parts:
        raise BenchError(f"parts=[] names none of: {', '.join(kind.value for kind in PartName)}")
    if not 0 <= cfg.image_gib < math.inf:
        raise BenchError(f"image_gib={cfg.image_gib}: must be 0 or more, and finite")
    parts: list[Part] = []
    if PartName.code in cfg.parts:
        parts.append(CodePart())
    if PartName.tokenizer in cfg.parts:
        parts.append(TokenizerPart(cfg, stage.folder))
    if PartName.image in cfg.parts:
        parts.append(ImagePart(cfg, stage.folder))
    return parts


def fill(stage: Stage, parts: list[Part]) -> None:
    """Makes the parts that are not there. One that cannot be made does not keep the others from it.

    Raises:
        BenchError: with what keeps each of those from being made; or there is no room, and nothing was done.
    """
    lacking = [part for part in parts if part.state(stage, contents=False).name in ("missing", "incomplete", "other")]
    require_room([room for part in lacking for room in part.room(stage.folder / part.place)])
    problems = []
    for part in parts:
        try:
            part.fill(stage)
        except BenchError as error:
            problems.append(f"{part.kind.value}: {error}")
    if problems:
        raise BenchError("\n\n".join(problems))
    say(f"stage folder {stage.folder}: {', '.join(part.kind.value for part in parts)} complete")


def _recorded(stage: Stage, parts: list[Part]) -> dict[PartName, dict[str, Entry]]:
    """What is recorded of parts that are all there, as far as sizes and dates tell."""
    states = {part: part.state(stage, contents=False) for part in parts}
    if any(not state.ok for state in states.values()):
        raise BenchError("the stage folder cannot be packed:\n" + _mending(stage, states))
    return {part.kind: {part.place: state.entry} for part, state in states.items() if state.entry is not None}


def _print_plan(cfg: StageConfig, stage: Stage, parts: list[Part], packed: Path | None) -> None:
    say(f"stage folder: {stage.folder}")
    for part in parts if cfg.action is Action.fill else []:
        state, destination = part.state(stage, contents=False), stage.folder / part.place
        if state.ok:
            text = f"there already ({destination})"
        elif state.in_the_way:
            text = f"REFUSED: {destination} {state.detail}"
        elif state.name == "unrecorded":
            text = f"verify and record {destination}"
        else:
            text = part.plan(destination)
        say(f"{part.kind.value}: {text}")
    if packed is not None:
        say(f"then pack all of it into {packed}")
    say("launch=dry: nothing was done.")


# --- check --------------------------------------------------------------------------------------------------


def check(stage: Stage, parts: list[Part]) -> None:
    """Reads every byte of the parts and datasets, prints a table, and names the command that mends each.

    Raises:
        BenchError: a part or a dataset is not as it should be.
    """
    from rich.table import Table

    from nemo_bench.report.terminal import make_console

    states = {part: part.state(stage, contents=True) for part in parts}
    table = Table(title=f"stage folder {stage.folder}", title_justify="left")
    for name in ("part", "state", "size", "version", "made at", "place"):
        table.add_column(name, justify="right" if name == "size" else "left", overflow="fold")
    for part, state in states.items():
        entry = state.entry
        shown = (size_text(entry.size_bytes), part.version(entry), entry.made_at) if entry else ("", "", "")
        table.add_row(part.kind.value, state.name, *shown, part.place)
    found = datasets.find(stage.folder, contents=True)
    for dataset in found:
        tokens = "" if dataset.tokens is None else f"{dataset.tokens:,} tokens"
        place = dataset.prefix.relative_to(stage.folder).as_posix()
        size, made_at = size_text(dataset.size_bytes), dataset.made_at or ""
        table.add_row("dataset", _state_of(dataset), size, tokens, made_at, place)
    if not found:
        table.add_row("dataset", "not there", "", "python prepare_data.py makes it; data=mock needs none", "", "")
    make_console().print(table)

    problems = [_mending(stage, states)] if any(not state.ok for state in states.values()) else []
    problems += [
        f"dataset: {dataset.problem}\n  python prepare_data.py, with the overrides that made it"
        for dataset in found
        if dataset.problem
    ]
    if problems:
        raise BenchError("\n".join(problems))


def _state_of(dataset: datasets.StageDataset) -> str:
    if dataset.problem:
        return "damaged"
    if dataset.tokens is None:
        return "not read (numpy is not installed)"
    return "ok" if dataset.made_at else "ok (no checksums to compare)"


def _mending(stage: Stage, states: dict[Part, State]) -> str:
    """A line for each part that is not as it should be, and the command that brings it."""
    lines = []
    for part, state in states.items():
        if not state.ok:
            place = shlex.quote(str(stage.folder / part.place))
            away = f"mv {place} {place}.old && " if state.in_the_way else ""
            lines += [f"{part.kind.value}: {stage.folder / part.place} {state.detail}", f"  {away}{_command(part)}"]
    return "\n".join(lines)


def _command(part: Part) -> str:
    """The command that fills this part, with what else the user chose."""
    from hydra.core.hydra_config import HydraConfig

    overrides = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    kept = [text for text in overrides if text.lstrip("+").partition("=")[0] not in _OWN_KEYS]
    return shlex.join(["python", "setup_stage.py", *kept, f"parts=[{part.kind.value}]"])
