"""The parts of a stage folder: what is replaced and what is left alone, enroot's failures, tokenizer files."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_bench.config import EntrypointConfig
from nemo_bench.errors import BenchError
from nemo_bench.stage import code
from nemo_bench.stage.config import StageConfig
from nemo_bench.stage.image import enroot_uri, image_part
from nemo_bench.stage.stage import Stage, fill
from nemo_bench.stage.tokenizer import verify
from tests.squashfs import squashfs

DIGEST = "sha256:" + "0123456789abcdef" * 4
GOOD_ENROOT = 'cp "$(dirname "$0")/prepared.sqsh" "$3"'


@pytest.mark.parametrize(
    ("reference", "uri"),
    [
        ("nvcr.io/nvidia/nemo:25.11", "docker://nvcr.io#nvidia/nemo:25.11"),
        ("nvcr.io/nvidia/nemo", "docker://nvcr.io#nvidia/nemo"),
        ("nvidia/cuda:12.6.0-base", "docker://nvidia/cuda:12.6.0-base"),
        ("ubuntu", "docker://ubuntu"),
        ("localhost/nemo:1", "docker://localhost#nemo:1"),
        ("localhost:5000/team/nemo:1", "docker://localhost:5000#team/nemo:1"),
        (f"nvcr.io/nvidia/nemo@{DIGEST}", f"docker://nvcr.io#nvidia/nemo:{DIGEST}"),
        (f"nvcr.io/nvidia/nemo:25.11@{DIGEST}", f"docker://nvcr.io#nvidia/nemo:{DIGEST}"),
        ("docker://$oauthtoken@nvcr.io#nvidia/nemo:25.11", "docker://$oauthtoken@nvcr.io#nvidia/nemo:25.11"),
        ("dockerd://nemo:mine", "dockerd://nemo:mine"),
    ],
)
def test_references_in_enroots_spelling(reference: str, uri: str) -> None:
    assert enroot_uri(reference) == uri


@pytest.mark.parametrize("reference", ["", "nemo 25", "https://nvcr.io/nvidia/nemo", "nemo@sha256:12", "nemo:"])
def test_bad_references_are_refused(reference: str) -> None:
    with pytest.raises(BenchError, match=r"nvcr\.io/nvidia/nemo:25\.11"):
        enroot_uri(reference)


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    (tmp_path / "stage").mkdir()
    return Stage(tmp_path / "stage")


@pytest.fixture
def import_image(tmp_path: Path, stage: Stage) -> Callable[..., None]:
    """Return a function that fills the image, by an enroot that is a shell script; `$3` is the file it makes."""

    def run(script: str = GOOD_ENROOT, container: str = "nvcr.io/nvidia/nemo:25.11", image: str = "nemo.sqsh") -> None:
        enroot = tmp_path / "enroot"
        enroot.write_text(f'#!/bin/sh\n[ "$1" = version ] && {{ echo 3.5.0; exit; }}\n{script}\n')
        enroot.chmod(0o755)
        (tmp_path / "prepared.sqsh").write_bytes(squashfs())
        entrypoint = EntrypointConfig(container=container, image=image)
        cfg = StageConfig(entrypoint=entrypoint, enroot=str(enroot), image_gib=0.001)
        fill(stage, image_part(cfg, stage.folder))

    return run


def hidden(stage: Stage) -> list[Path]:
    return [path for path in stage.folder.rglob(".*") if path.suffix != ".lock"]


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ('printf hsqsHALF > "$3"; exit 137', "exit status 137"),
        ('printf hsqsHALF > "$3"; kill -9 $$', "exit status -9"),
        ("exit 0", "left no file"),
        ("printf '<html>' > \"$3\"", "not a squash file"),
        ('head -c 110 "$(dirname "$0")/prepared.sqsh" > "$3"', "truncated: 110 of 118 bytes"),
        ("exit 1", r"\.credentials\) must hold[^\0]*nvcr\.io login \$oauthtoken"),
    ],
)
def test_a_failed_import_leaves_nothing(
    stage: Stage, import_image: Callable[..., None], script: str, message: str
) -> None:
    with pytest.raises(BenchError, match=message):
        import_image(script)
    assert not (stage.folder / "nemo.sqsh").exists() and hidden(stage) == []
    import_image()
    assert (stage.folder / "nemo.sqsh").read_bytes() == squashfs()


def test_credentials_are_those_of_the_host_without_its_port(import_image: Callable[..., None]) -> None:
    with pytest.raises(BenchError, match=r"must hold\s+machine registry\.example\.org login <user>"):
        import_image("exit 1", container="registry.example.org:5000/nvidia/nemo:25.11")


def test_only_what_setup_stage_made_is_accepted(stage: Stage, import_image: Callable[..., None]) -> None:
    image = stage.folder / "nemo.sqsh"
    image.write_bytes(squashfs())
    with pytest.raises(BenchError, match=r"was not made by setup_stage\.py\nIt is left alone: move it away"):
        import_image()
    image.unlink()
    import_image()
    image.write_bytes(b"hsqs, another")
    with pytest.raises(BenchError, match=r"has changed since it was recorded: nemo\.sqsh\nIt is left alone"):
        import_image()
    assert image.read_bytes() == b"hsqs, another"


def test_a_stage_folder_holds_several_images(stage: Stage, import_image: Callable[..., None]) -> None:
    import_image()
    import_image(container="nvcr.io/nvidia/nemo:24.09", image="nemo2409.sqsh")
    assert set(stage.entries()) == {"nemo.sqsh", "nemo2409.sqsh"}
    with pytest.raises(BenchError, match=r"entrypoint\.container=nvcr\.io/nvidia/nemo:25\.11, not .*24\.09"):
        import_image(container="nvcr.io/nvidia/nemo:24.09")


def test_a_damaged_manifest_is_named(stage: Stage, import_image: Callable[..., None]) -> None:
    import_image()
    content = json.loads(stage.manifest.read_text())
    del content["entries"]["nemo.sqsh"]["settings"]
    older = {**content, "version": 1}
    for text in (stage.manifest.read_text()[:100], "[]", "{}", json.dumps(content), json.dumps(older)):
        stage.manifest.write_text(text)
        with pytest.raises(BenchError, match=r"stage\.json is damaged[^\0]*`mv \S+stage\.json \S+stage\.json\.old`"):
            import_image()


def test_code_follows_the_project(tmp_path: Path, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tmp_path / "project"
    (project / "conf").mkdir(parents=True)
    (project / "pyproject.toml").write_text('[project]\nname = "p"\nversion = "9.9"\ndependencies = []\n')
    (project / "train.py").write_text("# one\n")
    monkeypatch.setattr(code, "PROJECT", project)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0))
    copy = stage.folder / "nemo_bench"
    fill(stage, code.code_part())
    (project / "conf" / "mine.yaml").write_text("name: mine\n")
    (copy / "__pycache__").mkdir()
    (copy / "__pycache__" / "train.pyc").touch()  # Python's, not the user's
    fill(stage, code.code_part())
    assert (copy / "conf" / "mine.yaml").exists() and hidden(stage) == []
    (copy / "train.py").unlink()
    fill(stage, code.code_part())
    assert (copy / "train.py").read_text() == "# one\n"
    (copy / "conf" / "users.yaml").write_text("name: users\n")
    (project / "train.py").write_text("# two\n")
    with pytest.raises(BenchError, match="It is left alone"):
        fill(stage, code.code_part())
    assert (copy / "conf" / "users.yaml").exists() and (copy / "train.py").read_text() == "# one\n"


def test_a_tokenizer_is_verified(small_tokenizer: Path, tmp_path: Path) -> None:
    size = verify(small_tokenizer, None)
    assert verify(small_tokenizer, size) == size
    with pytest.raises(BenchError, match=r"1,000 tokens, and tokenizer\.vocab_size=128256"):
        verify(small_tokenizer, 128256)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "unknown"}}')
    with pytest.raises(BenchError, match="the `tokenizers` library cannot use"):
        verify(tmp_path, None)
