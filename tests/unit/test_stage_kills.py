"""Filling, packing and installing, killed at every change on disk: nothing half-done looks finished."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_bench.config import EntrypointConfig
from nemo_bench.stage import bundle, code
from nemo_bench.stage.config import StageConfig, TokenizerConfig
from nemo_bench.stage.image import image_part
from nemo_bench.stage.stage import NAME, Stage, fill
from nemo_bench.stage.tokenizer import tokenizer_part
from tests.datasets import make_dataset
from tests.kills import killed

DATASET = "llama3.1-dataset/wiki.en_03_content_document"


def hidden(folder: Path) -> list[str]:
    """Return the hidden files there, except locks."""
    return [str(path) for path in folder.rglob(".*") if path.suffix != ".lock"]


def contents(folder: Path) -> dict[str, bytes]:
    """Return all files that are not hidden, except the manifest."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if "/." not in f"/{name}" and name != NAME}


@pytest.fixture
def cfg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StageConfig:
    """A small project, an enroot that makes its file in two steps, and a Python whose pip makes one wheel."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    project = tmp_path / "project"
    for name in ("train.py", "nemo_bench/config.py", "conf/train.yaml", "constraints.txt"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(f"# {name}\n")
    (project / "pyproject.toml").write_text('[project]\nname = "p"\nversion = "9.9"\ndependencies = ["a"]\n')
    monkeypatch.setattr(code, "PROJECT", project)
    for name, script in {
        "enroot": 'echo layers > "$3"; echo more >> "$3"',
        "python": 'for last; do [ "$before" = --wheel-dir ] && mkdir "$last" && echo wheel > "$last/a.whl"; '
        "before=$last; done; true",
    }.items():
        (tmp_path / name).write_text(f'#!/bin/sh\n[ "$1" = version ] && exit\n{script}\n')
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    tokenizer = TokenizerConfig(
        source="local", folder=str(tmp_path / "stage" / "llama"), vocab_size=300, corpus_bytes=9999
    )
    image = EntrypointConfig(container="nvcr.io/nvidia/nemo:25.11", image="nemo.sqsh")
    return StageConfig(entrypoint=image, tokenizer=tokenizer, enroot=str(tmp_path / "enroot"), image_gib=0.001)


# What is killed, what must be whole or absent after it, and how many changes on disk it makes at least.
@pytest.mark.parametrize(
    ("task", "places", "fewest"),
    [
        ("image", ["nemo.sqsh"], 5),
        ("tokenizer", ["llama"], 10),
        ("code", ["nemo_bench"], 10),
        ("pack", ["stage.tar.zst"], 3),
        ("install", ["nemo.sqsh", "nemo_bench", f"{DATASET}.json", f"{DATASET}.bin", f"{DATASET}.idx"], 20),
    ],
)
def test_killed_at_every_change(
    task: str, places: list[str], fewest: int, cfg: StageConfig, tmp_path: Path, small_tokenizer: Path
) -> None:
    stage, packed = Stage(tmp_path / "stage"), tmp_path / "out" / "stage.tar.zst"
    image, made_code = image_part(cfg, stage.folder), code.code_part(cfg, stage.folder)
    if task in ("pack", "install"):
        make_dataset(stage.folder / DATASET, small_tokenizer)
        fill(stage, image)
        fill(stage, made_code)

    def pack() -> None:
        if not packed.exists():
            bundle.pack(stage, [image, made_code], packed)

    tasks: dict[str, tuple[Path, Callable[[], None]]] = {
        "image": (stage.folder, lambda: fill(stage, image)),
        "tokenizer": (stage.folder, lambda: fill(stage, tokenizer_part(cfg, stage.folder))),
        "code": (stage.folder, lambda: fill(stage, made_code)),
        "pack": (packed.parent, pack),
        "install": (tmp_path / "other", lambda: bundle.install(Stage(tmp_path / "other"), packed, dry=False)),
    }
    folder, run = tasks[task]
    if task == "install":
        pack()
    at = 0
    while True:
        at += 1
        shutil.rmtree(folder, ignore_errors=True)
        if not killed(run, folder, at):
            break
        after_kill = contents(folder)
        run()
        whole = contents(folder)
        for place in places:
            states = [
                {name: data for name, data in files.items() if name.startswith(place)} for files in (whole, after_kill)
            ]
            assert states[1] in ({}, states[0]), (at, place)
        if f"{DATASET}.idx" in after_kill:  # an index means a complete dataset
            assert {f"{DATASET}.bin", f"{DATASET}.json"} <= after_kill.keys()
        assert hidden(folder) == [], at
        entries = Stage(folder).entries()
        assert not any(Stage(folder).problem(place, entry.settings, contents=True) for place, entry in entries.items())
    assert at > fewest
