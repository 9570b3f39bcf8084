"""The parts of a stage folder: what is left alone, enroot's failures, tokenizer files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_bench.config import EntrypointConfig
from nemo_bench.errors import BenchError
from nemo_bench.stage.config import StageConfig
from nemo_bench.stage.image import enroot_uri, image_part
from nemo_bench.stage.stage import Stage, fill


@pytest.mark.parametrize(
    ("reference", "uri"),
    [
        ("nvcr.io/nvidia/nemo:25.11", "docker://nvcr.io#nvidia/nemo:25.11"),
        ("nvcr.io/nvidia/nemo", "docker://nvcr.io#nvidia/nemo"),
        ("nvidia/cuda:12.6.0-base", "docker://nvidia/cuda:12.6.0-base"),
        ("ubuntu", "docker://ubuntu"),
        ("localhost/nemo:1", "docker://localhost#nemo:1"),
        ("localhost:5000/team/nemo:1", "docker://localhost:5000#team/nemo:1"),
        ("docker://$oauthtoken@nvcr.io#nvidia/nemo:25.11", "docker://$oauthtoken@nvcr.io#nvidia/nemo:25.11"),
        ("dockerd://nemo:mine", "dockerd://nemo:mine"),
    ],
)
def test_references_in_enroots_spelling(reference: str, uri: str) -> None:
    assert enroot_uri(reference) == uri
    for bad in ("", "nemo 25", "https://nvcr.io/nvidia/nemo", "nemo@sha256:12", "nemo:"):
        with pytest.raises(BenchError, match=r"nvcr\.io/nvidia/nemo:25\.11"):
            enroot_uri(bad)


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    (tmp_path / "stage").mkdir()
    return Stage(tmp_path / "stage")


@pytest.fixture
def import_image(tmp_path: Path, stage: Stage) -> Callable[..., None]:
    """Return a function that fills the image, by an enroot that is a shell script; `$3` is the file it makes."""

    def run(
        script: str = 'echo layers > "$3"', container: str = "nvcr.io/nvidia/nemo:25.11", image: str = "nemo.sqsh"
    ) -> None:
        enroot = tmp_path / "enroot"
        enroot.write_text(f'#!/bin/sh\n[ "$1" = version ] && {{ echo 3.5.0; exit; }}\n{script}\n')
        enroot.chmod(0o755)
        entrypoint = EntrypointConfig(container=container, image=image)
        cfg = StageConfig(entrypoint=entrypoint, enroot=str(enroot), image_gib=0.001)
        fill(stage, image_part(cfg, stage.folder))

    return run


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ('printf hsqsHALF > "$3"; exit 137', "exit status 137"),
        ('printf hsqsHALF > "$3"; kill -9 $$', "exit status -9"),
        ("exit 0", "exit status 0"),
        ("exit 1", r"\.credentials\) must hold[^\0]*nvcr\.io login \$oauthtoken"),
    ],
)
def test_a_failed_import_leaves_nothing(
    stage: Stage, import_image: Callable[..., None], script: str, message: str
) -> None:
    with pytest.raises(BenchError, match=message):
        import_image(script)
    assert [path.name for path in stage.folder.iterdir()] == [".stage-image.lock"]
    import_image()
    assert (stage.folder / "nemo.sqsh").read_text() == "layers\n"


def test_what_exists_is_never_replaced(stage: Stage, import_image: Callable[..., None]) -> None:
    image = stage.folder / "nemo.sqsh"
    image.write_text("mine")
    with pytest.raises(BenchError, match=r"was not made by setup_stage\.py\nIt is left alone: move it away \(`mv "):
        import_image()
    assert image.read_text() == "mine"
    image.unlink()
    import_image()
    import_image(container="nvcr.io/nvidia/nemo:24.09", image="nemo2409.sqsh")
    assert set(stage.entries()) == {"nemo.sqsh", "nemo2409.sqsh"}
    with pytest.raises(BenchError, match=r"entrypoint\.container=nvcr\.io/nvidia/nemo:25\.11, not .*24\.09"):
        import_image(container="nvcr.io/nvidia/nemo:24.09")
    image.write_text("mine")
    with pytest.raises(BenchError, match=r"has changed since it was recorded: nemo\.sqsh\nIt is left alone"):
        import_image()


def test_a_damaged_manifest_is_named(stage: Stage, import_image: Callable[..., None]) -> None:
    import_image()
    content = json.loads(stage.manifest.read_text())
    del content["entries"]["nemo.sqsh"]["settings"]
    older = {**content, "version": 1}
    for text in (stage.manifest.read_text()[:100], "[]", "{}", json.dumps(content), json.dumps(older)):
        stage.manifest.write_text(text)
        with pytest.raises(BenchError, match=r"stage\.json is damaged[^\0]*`mv \S+stage\.json \S+stage\.json\.old`"):
            import_image()
