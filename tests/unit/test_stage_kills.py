"""Filling, packing and installing, killed at each of the moments when they change something on the disk."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_bench.config import EntrypointConfig
from nemo_bench.stage import bundle, code
from nemo_bench.stage.config import PartName, StageConfig, TokenizerConfig, TokenizerSource
from nemo_bench.stage.image import ImagePart
from nemo_bench.stage.manifest import NAME, Entry, Stage
from nemo_bench.stage.part import Part
from nemo_bench.stage.tokenizer import TokenizerPart
from tests.datasets import make_dataset
from tests.squashfs import squashfs

DATASET = "llama3.1-dataset/wiki.en_03_content_document"

_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")


def killed(task: Callable[[], object], below: Path, at: int) -> bool:
    """Runs `task` in a process that is killed at its `at`-th change below a folder; whether it came to that."""
    pid = os.fork()
    if pid == 0:
        left = at

        def hook(event: str, args: tuple[object, ...]) -> None:
            nonlocal left
            changes = event in _CHANGES or (event == "open" and isinstance(args[2], int) and args[2] & 3)
            if changes and isinstance(args[0], (str, os.PathLike)) and str(args[0]).startswith(str(below)):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.addaudithook(hook)
            task()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL)
    return os.WIFSIGNALED(status)


def hidden(folder: Path) -> list[str]:
    """Hidden files there, but for locks."""
    return [str(path) for path in folder.rglob(".*") if path.suffix != ".lock"]


def contents(folder: Path) -> dict[str, bytes]:
    """All files that are not hidden, but for the manifest."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if "/." not in f"/{name}" and name != NAME}


@pytest.fixture
def small_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of three files, with one package to bring along."""
    root = tmp_path / "project"
    for name in ("train.py", "nemo_bench/config.py", "conf/train.yaml"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"# {name}\n")
    (root / "pyproject.toml").write_text('version = "9.9"\n')
    monkeypatch.setattr(code, "PROJECT", root)
    monkeypatch.setattr(code, "_PACKAGES", ("mdurl",))
    return root


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StageConfig:
    """A configuration with an enroot that makes a squash file in two steps."""
    enroot = tmp_path / "enroot"
    (tmp_path / "prepared.sqsh").write_bytes(squashfs())
    in_two_steps = 'head -c 100 "$prepared" > "$3"; tail -c +101 "$prepared" >> "$3"'
    enroot.write_text(f'#!/bin/sh\n[ "$1" = version ] && exit 1\nprepared={tmp_path}/prepared.sqsh\n{in_two_steps}\n')
    enroot.chmod(0o755)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    return StageConfig(
        entrypoint=EntrypointConfig(container="nvcr.io/nvidia/nemo:25.11", image="nemo.sqsh"),
        tokenizer=TokenizerConfig(
            source=TokenizerSource.local, folder=str(tmp_path / "stage" / "llama"), vocab_size=300, corpus_bytes=9999
        ),
        enroot=str(enroot),
        image_gib=0.001,
    )


def check_all_points(part: Part, stage: Stage, prepare: Callable[[], object], fewest: int) -> None:
    """Kills `part.fill` everywhere; each time what there is afterwards is whole, and the next run completes it."""
    at = 0
    while True:
        at += 1
        shutil.rmtree(stage.folder, ignore_errors=True)
        prepare()
        before = contents(stage.folder)
        if not killed(lambda: part.fill(stage), stage.folder, at):
            break
        present = contents(stage.folder)
        part.fill(stage)
        whole = contents(stage.folder)
        assert present in ({}, before, whole), at
        assert part.state(stage, contents=True).ok and hidden(stage.folder) == [], at
    assert at > fewest


def test_image(tmp_path: Path, config: StageConfig) -> None:
    stage = Stage(tmp_path / "stage")
    check_all_points(ImagePart(config, stage.folder), stage, lambda: None, 5)


def test_tokenizer(tmp_path: Path, config: StageConfig) -> None:
    stage = Stage(tmp_path / "stage")
    check_all_points(TokenizerPart(config, stage.folder), stage, lambda: None, 10)


def test_code(tmp_path: Path, small_project: Path) -> None:
    stage = Stage(tmp_path / "stage")
    check_all_points(code.CodePart(), stage, lambda: None, 10)


def test_code_that_is_replaced(tmp_path: Path, small_project: Path) -> None:
    stage = Stage(tmp_path / "stage")

    def older() -> None:
        (small_project / "train.py").write_text("# older\n")
        code.CodePart().fill(stage)
        (small_project / "train.py").write_text("# newer\n")

    check_all_points(code.CodePart(), stage, older, 10)


def packable(stage: Stage, config: StageConfig) -> dict[PartName, dict[str, Entry]]:
    """Fills image and code; returns what was recorded."""
    entries = {}
    for part in (ImagePart(config, stage.folder), code.CodePart()):
        part.fill(stage)
        entry = stage.entry(part.kind, part.place)
        assert entry is not None
        entries[part.kind] = {part.place: entry}
    return entries


def test_pack_and_install(tmp_path: Path, config: StageConfig, small_project: Path, small_tokenizer: Path) -> None:
    stage, other = Stage(tmp_path / "stage"), Stage(tmp_path / "other")
    make_dataset(stage.folder / DATASET, small_tokenizer)
    entries, packed = packable(stage, config), tmp_path / "out" / "stage.tar"
    at = 0
    while True:
        at += 1
        shutil.rmtree(packed.parent, ignore_errors=True)
        if not killed(lambda: bundle.pack(stage, entries, packed), packed.parent, at):
            break
        if not packed.exists():
            bundle.pack(stage, entries, packed)
        assert hidden(packed.parent) == []
    assert at > 3
    at, seen = 0, set()
    while True:
        at += 1
        shutil.rmtree(other.folder, ignore_errors=True)
        if not killed(lambda: bundle.install(other, packed), other.folder, at):
            break
        for place in ("nemo.sqsh", "nemo_bench"):  # each whole, or not there
            present = {name for name in contents(other.folder) if name.startswith(place)}
            assert present in (set(), {name for name in contents(stage.folder) if name.startswith(place)}), at
        # The index last: with it, the dataset is complete.
        suffixes = [s for s in (".json", ".bin", ".idx") if (other.folder / f"{DATASET}{s}").exists()]
        assert suffixes in ([], [".json"], [".json", ".bin"], [".json", ".bin", ".idx"]), at
        seen.add(len(suffixes))
        bundle.install(other, packed)
        assert contents(other.folder) == contents(stage.folder) and hidden(other.folder) == [], at
        assert other.read()["parts"].keys() == stage.read()["parts"].keys()
    assert at > 15 and seen == {0, 1, 2, 3}
