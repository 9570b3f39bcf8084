"""The parts of a stage folder, one by one: references, folders of enroot's, the hub's answers, packages."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.file_download
import pytest
from huggingface_hub.utils._http import reset_sessions

from nemo_bench.config import EntrypointConfig
from nemo_bench.data import tokenizer as local_tokenizer
from nemo_bench.errors import BenchError
from nemo_bench.files import size_text
from nemo_bench.stage import code, image
from nemo_bench.stage.code import CodePart
from nemo_bench.stage.config import StageConfig, TokenizerConfig, TokenizerSource
from nemo_bench.stage.files import Room, require_room
from nemo_bench.stage.image import ImagePart, enroot_folders, enroot_uri
from nemo_bench.stage.manifest import Stage
from nemo_bench.stage.tokenizer import _has_checksum, download, verify
from tests.httpserver import GOOD_TOKEN, UNGRANTED_TOKEN, FileServer, Twist
from tests.squashfs import PAYLOAD, squashfs

DIGEST = "sha256:" + "0123456789abcdef" * 4


# --- image --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "uri"),
    [
        ("nvcr.io/nvidia/nemo:25.11", "docker://nvcr.io#nvidia/nemo:25.11"),
        ("nvcr.io/nvidia/nemo", "docker://nvcr.io#nvidia/nemo"),
        ("nvidia/cuda:12.6.0-base", "docker://nvidia/cuda:12.6.0-base"),
        ("ubuntu:24.04", "docker://ubuntu:24.04"),
        ("ubuntu", "docker://ubuntu"),
        ("localhost/nemo:1", "docker://localhost#nemo:1"),
        ("localhost:5000/team/nemo:1", "docker://localhost:5000#team/nemo:1"),
        ("registry:5000/nemo", "docker://registry:5000#nemo"),
        (f"nvcr.io/nvidia/nemo@{DIGEST}", f"docker://nvcr.io#nvidia/nemo:{DIGEST}"),
        (f"nvcr.io/nvidia/nemo:25.11@{DIGEST}", f"docker://nvcr.io#nvidia/nemo:{DIGEST}"),
        ("docker://$oauthtoken@nvcr.io#nvidia/nemo:25.11", "docker://$oauthtoken@nvcr.io#nvidia/nemo:25.11"),
        ("dockerd://nemo:mine", "dockerd://nemo:mine"),
    ],
)
def test_references_as_enroot_spells_them(reference: str, uri: str) -> None:
    assert enroot_uri(reference) == uri


@pytest.mark.parametrize("reference", ["", "nemo 25", "https://nvcr.io/nvidia/nemo", "nemo@sha256:12", "nemo:"])
def test_what_is_no_reference(reference: str) -> None:
    with pytest.raises(BenchError, match=r"nvcr\.io/nvidia/nemo:25\.11"):
        enroot_uri(reference)


def test_enroots_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ENROOT_CACHE_PATH", "ENROOT_TEMP_PATH", "XDG_CACHE_HOME", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    conf = tmp_path / "enroot.conf"
    monkeypatch.setattr(image, "_ENROOT_CONF", conf)
    cache, temp = "ENROOT_CACHE_PATH", "ENROOT_TEMP_PATH"
    assert enroot_folders() == {cache: Path("/home/me/.cache/enroot"), temp: Path("/tmp")}
    conf.write_text(f"#{temp}  /commented\n{cache}  /raid/cache/user-$(id -u)\n{temp}=/raid/$UNKNOWN\n")
    assert enroot_folders() == {cache: Path("/raid/cache/user-"), temp: Path("/raid")}
    conf.write_text(f"{cache} ${{HOME}}/cache\n")
    monkeypatch.setenv(temp, "/scratch")
    assert enroot_folders() == {cache: Path("/home/me/cache"), temp: Path("/scratch")}


# What `sh` does as enroot; "$3" is the file to be made.
GOOD_ENROOT = 'cp "$(dirname "$0")/prepared.sqsh" "$3"'


def fake_enroot(tmp_path: Path, script: str = GOOD_ENROOT) -> StageConfig:
    """A configuration whose enroot does this when asked to import."""
    enroot = tmp_path / "enroot"
    enroot.write_text(f'#!/bin/sh\n[ "$1" = version ] && {{ echo 3.5.0; exit; }}\n{script}\n')
    enroot.chmod(0o755)
    (tmp_path / "prepared.sqsh").write_bytes(squashfs())
    entrypoint = EntrypointConfig(container="nvcr.io/nvidia/nemo:25.11", image="nemo.sqsh")
    return StageConfig(entrypoint=entrypoint, enroot=str(enroot), image_gib=0.001)


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path / "stage")


def hidden(stage: Stage) -> list[Path]:
    return [path for path in stage.folder.rglob(".*") if path.suffix != ".lock"]


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("printf hsqsHALF > \"$3\"; echo 'Child died' >&2; exit 137", r"exit status 137[^\0]*  \| Child died$"),
        ('printf hsqsHALF > "$3"; kill -9 $$', r"exit status -9"),
        ("exit 0", r"left no file: `\S+/enroot import"),
        ("printf '<html>' > \"$3\"", "no squash file"),
        ('head -c 50 "$(dirname "$0")/prepared.sqsh" > "$3"', "truncated: 50 of at least 96 bytes"),
        ('head -c 110 "$(dirname "$0")/prepared.sqsh" > "$3"', "truncated: 110 of 118 bytes"),
        ("echo 'error code: 403' >&2; exit 1", r"\$oauthtoken"),
        ("echo 'progress 1%\rprogress 99%\rgave up' >&2; exit 1", r"  \| gave up$"),
        ("seq 100 >&2; exit 1", r"Its last lines:\n  \| 89\n"),
    ],
)
def test_an_import_that_fails(tmp_path: Path, stage: Stage, script: str, message: str) -> None:
    with pytest.raises(BenchError, match=message):
        ImagePart(fake_enroot(tmp_path, script), stage.folder).fill(stage)
    assert not (stage.folder / "nemo.sqsh").exists() and hidden(stage) == []
    ImagePart(fake_enroot(tmp_path), stage.folder).fill(stage)
    assert (stage.folder / "nemo.sqsh").read_bytes() == squashfs()


def test_an_image_made_by_hand_is_taken_over(tmp_path: Path, stage: Stage) -> None:
    cfg = fake_enroot(tmp_path, "exit 1")
    stage.folder.mkdir()
    (stage.folder / "nemo.sqsh").write_bytes(squashfs(b"of the recipe's own setup.sh"))
    part = ImagePart(cfg, stage.folder)
    assert part.state(stage, contents=False).name == "unrecorded"
    part.fill(stage)
    assert part.state(stage, contents=True).ok
    cfg.entrypoint.image = "other.sqsh"
    (stage.folder / "other.sqsh").write_bytes(b"PK of something else")
    with pytest.raises(BenchError, match=r"no squash file[^\0]*It is left alone: move it away"):
        ImagePart(cfg, stage.folder).fill(stage)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (squashfs(b"x" * 100_000)[:50_000], r"truncated: 50,000 of 100,096 bytes"),
        (squashfs()[:28] + b"\x03\0" + squashfs()[30:], "no squash file of version 4, but of version 3"),
    ],
)
def test_half_an_image_is_not_taken_over(tmp_path: Path, stage: Stage, data: bytes, message: str) -> None:
    stage.folder.mkdir()
    (stage.folder / "nemo.sqsh").write_bytes(data)
    with pytest.raises(BenchError, match=message):
        ImagePart(fake_enroot(tmp_path), stage.folder).fill(stage)
    assert (stage.folder / "nemo.sqsh").read_bytes() == data and stage.read()["parts"] == {}


def test_padding_is_none_of_the_images_bytes(tmp_path: Path, stage: Stage) -> None:
    stage.folder.mkdir()
    (stage.folder / "nemo.sqsh").write_bytes(squashfs()[: 96 + len(PAYLOAD)])  # mksquashfs -nopad
    part = ImagePart(fake_enroot(tmp_path), stage.folder)
    part.fill(stage)
    assert part.state(stage, contents=True).ok


def test_a_stage_folder_holds_several_images(tmp_path: Path, stage: Stage) -> None:
    cfg = fake_enroot(tmp_path)
    ImagePart(cfg, stage.folder).fill(stage)
    cfg.entrypoint = EntrypointConfig(container="nvcr.io/nvidia/nemo:24.09", image="nemo2409.sqsh")
    ImagePart(cfg, stage.folder).fill(stage)
    assert set(stage.read()["parts"]["image"]) == {"nemo.sqsh", "nemo2409.sqsh"}
    cfg.entrypoint.image = "nemo.sqsh"
    with pytest.raises(
        BenchError, match=r"nemo\.sqsh is nvcr\.io/nvidia/nemo:25\.11, not .*24\.09[^\0]*entrypoint\.image="
    ):
        ImagePart(cfg, stage.folder).fill(stage)


def test_what_changed_is_left_alone(tmp_path: Path, stage: Stage) -> None:
    part = ImagePart(fake_enroot(tmp_path), stage.folder)
    part.fill(stage)
    (stage.folder / "nemo.sqsh").write_bytes(b"hsqs, another")
    with pytest.raises(
        BenchError, match=r"has changed since it was recorded: nemo\.sqsh\nIt is left alone: move it away"
    ):
        part.fill(stage)
    assert (stage.folder / "nemo.sqsh").read_bytes() == b"hsqs, another"


def test_a_new_date_is_looked_into_once(tmp_path: Path, stage: Stage) -> None:
    part = ImagePart(fake_enroot(tmp_path), stage.folder)
    part.fill(stage)
    os.utime(stage.folder / "nemo.sqsh", ns=(1, 1))
    assert part.state(stage, contents=False).touched is not None
    part.fill(stage)
    assert part.state(stage, contents=False).touched is None


def test_a_damaged_manifest_is_named(tmp_path: Path, stage: Stage) -> None:
    part = ImagePart(fake_enroot(tmp_path), stage.folder)
    part.fill(stage)
    content = json.loads(stage.manifest.read_text())
    del content["parts"]["image"]["nemo.sqsh"]["container"]
    for text in (stage.manifest.read_text()[:100], "[]", "{}", json.dumps(content)):
        stage.manifest.write_text(text)
        with pytest.raises(BenchError, match=r"stage\.json is damaged[^\0]*`mv \S+stage\.json \S+stage\.json\.old`"):
            part.fill(stage)
    stage.manifest.unlink()
    part.fill(stage)  # recorded anew
    assert part.state(stage, contents=True).ok


def test_needs_on_one_file_system_add_up(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    require_room([Room(tmp_path / "not" / "yet", free // 3, "one"), Room(tmp_path, free // 3, "two")])
    with pytest.raises(BenchError, match=r"for one, .* for two"):
        require_room([Room(tmp_path / "not" / "yet", free * 2 // 3, "one"), Room(tmp_path, free * 2 // 3, "two")])


@pytest.mark.parametrize(
    ("size", "text"), [(14, "14 bytes"), (1500, "1.5 kB"), (9_100_000, "9.1 MB"), (2**40, "1.1 TB")]
)
def test_sizes_in_words(size: int, text: str) -> None:
    assert size_text(size) == text


# --- tokenizer ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """A small tokenizer, as the hub has them."""
    trained = local_tokenizer.train(["def answer():\n    return 42\n"] * 9, vocab_size=270)
    rendered = {name: text.encode() for name, text in local_tokenizer.render(trained).items()}
    return {"config.json": b'{"vocab_size": 270}\n', **rendered}


@pytest.fixture
def folder(tmp_path: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def test_a_tokenizer_folder_is_looked_into(folder: Path, files: dict[str, bytes]) -> None:
    assert verify(folder, files, None) == verify(folder, files, 270) == 270
    with pytest.raises(BenchError, match=r"270 tokens, and tokenizer\.vocab_size=128256"):
        verify(folder, files, 128256)
    with pytest.raises(BenchError, match=r"lacks merges\.txt"):
        verify(folder, [*files, "merges.txt"], 270)
    (folder / "config.json").write_bytes(b'{"vocab_size": 2')
    with pytest.raises(BenchError, match=r"config\.json of the tokenizer is damaged"):
        verify(folder, files, 270)
    (folder / "config.json").write_bytes(files["config.json"])
    content = json.loads(files["tokenizer.json"])
    content["model"]["type"] = "unknown"
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(BenchError, match="cannot be used by the `tokenizers` library"):
        verify(folder, files, 270)


def test_the_hubs_checksums(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"what is up, doc?")
    # git's documentation has this blob.
    assert _has_checksum(path, "bd9dbf5aae1a3862dd1526723246b20206e5fc37")
    assert _has_checksum(path, hashlib.sha256(b"what is up, doc?").hexdigest())
    assert _has_checksum(path, "a-mirrors-own") and _has_checksum(path, None)
    assert not _has_checksum(path, "0" * 40) and not _has_checksum(path, "0" * 64)


REPO = "meta-llama/Meta-Llama-3-8B"


@pytest.fixture
def hub(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FileServer]:
    """A hub in place of huggingface.co, whose pauses between attempts take no time."""
    with FileServer() as server:
        for name, data in files.items():
            server.put_hub(REPO, name, data, lfs=name == "tokenizer.json", gated=True)
        template = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE
        at_server = template.replace(huggingface_hub.constants.ENDPOINT, server.endpoint)
        for module in (huggingface_hub.constants, huggingface_hub.file_download):
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", at_server, raising=False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr("time.sleep", lambda _: None)
        yield server


def config(**changes: object) -> TokenizerConfig:
    settings: dict[str, object] = {
        "source": TokenizerSource.huggingface,
        "repo": REPO,
        "files": ["config.json", "tokenizer.json", "tokenizer_config.json"],
        "optional_files": ["special_tokens_map.json", "generation_config.json"],
    }
    return TokenizerConfig(**{**settings, **changes})  # type: ignore[arg-type]


def fetched(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("token", "changes", "texts"),
    [
        ("", {}, [f"https://huggingface.co/{REPO}", "licence", "take a day", "export HF_TOKEN", "there is none"]),
        (UNGRANTED_TOKEN, {}, ["refused this token", "403", "licence", "take a day"]),
        ("mistyped", {}, ["refused this token", "401", "huggingface.co/settings/tokens"]),
        (GOOD_TOKEN, {"repo": "meta-lama/Llama"}, ["tokenizer.repo=meta-lama/Llama", "correct the name"]),
        ("", {"repo": "meta-lama/Llama"}, ["tokenizer.repo=meta-lama/Llama", "not logged in"]),
        (GOOD_TOKEN, {"repo": "a/b/c"}, ["ORGANISATION/NAME"]),
        (GOOD_TOKEN, {"revision": "v9"}, ["tokenizer.revision=v9", "/commits"]),
        (GOOD_TOKEN, {"files": ["vocab.txt"]}, ["no file vocab.txt", "tokenizer.files"]),
    ],
)
def test_what_the_hub_refuses(
    hub: FileServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    token: str,
    changes: dict[str, object],
    texts: list[str],
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(BenchError) as error:
        download(tmp_path, config(**changes))
    for text in texts:
        assert text in str(error.value)


def test_broken_connections_are_mended(
    hub: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes]
) -> None:
    monkeypatch.setenv("HF_TOKEN", GOOD_TOKEN)
    cdn = f"/cdn/{hashlib.sha256(files['tokenizer.json']).hexdigest()}"
    hub.script(f"/{REPO}/resolve/main/config.json", Twist(method="HEAD", status=503))
    hub.script(cdn, Twist(cut_after=100), Twist(status=502), Twist(cut_after=50))
    download(tmp_path, config())
    assert fetched(tmp_path) == files
    assert [request.headers.get("range") for request in hub.seen("GET", cdn)] == [
        None,
        "bytes=100-",
        "bytes=100-",
        "bytes=150-",
    ]


def test_an_unreachable_hub_is_said(
    hub: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes]
) -> None:
    monkeypatch.setenv("HF_TOKEN", GOOD_TOKEN)
    path = f"/{REPO}/resolve/main/config.json"
    for twist in (Twist(method="HEAD", drop=True), Twist(method="HEAD", status=503)):
        hub.script(path, *[twist] * 6)
        with pytest.raises(BenchError, match=r"cannot be reached, or gives no good answer .*bundle=FILE"):
            download(tmp_path, config())
    cdn = f"/cdn/{hashlib.sha256(files['tokenizer.json']).hexdigest()}"
    hub.script(cdn, *[Twist(drop=True)] * 6)
    with pytest.raises(BenchError, match="cannot be reached") as error:
        download(tmp_path, config())
    assert "signature" not in str(error.value)  # of the signed URL


def test_offline_mode_is_named(hub: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    reset_sessions()
    try:
        with pytest.raises(BenchError, match="HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set"):
            download(tmp_path, config())
    finally:
        reset_sessions()


def test_damage_on_the_way_is_seen(
    hub: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes]
) -> None:
    """Of the same length, so that only the hub's checksum tells."""
    monkeypatch.setenv("HF_TOKEN", GOOD_TOKEN)
    cdn = f"/cdn/{hashlib.sha256(files['tokenizer.json']).hexdigest()}"
    hub.script(cdn, Twist(status=200, body=files["tokenizer.json"].replace(b"begin_of", b"begin_0f")))
    with pytest.raises(BenchError, match=r"tokenizer\.json of \S+ was damaged on its way"):
        download(tmp_path, config())


# --- code ---------------------------------------------------------------------------------------------------


def test_packages_are_copied_without_what_is_of_this_installation(tmp_path: Path) -> None:
    assert code._vendor("PyYAML", tmp_path) == distribution("PyYAML").version
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert "yaml/__init__.py" in names and any(name.endswith("/METADATA") for name in names)
    assert not any(name.endswith((".so", ".pyc", "direct_url.json", "INSTALLER")) for name in names)


def test_packages_that_cannot_be_copied_are_named(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"tokenizers is compiled.*--no-binary tokenizers"):
        code._vendor("tokenizers", tmp_path)
    with pytest.raises(BenchError, match="no-such-package is not installed here"):
        code._vendor("no-such-package", tmp_path)


def test_all_that_the_packages_need_is_among_them() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    listed = {canonicalize_name(name) for name in code._PACKAGES}
    for name in code._PACKAGES:
        for line in distribution(name).requires or []:
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                assert canonicalize_name(needed.name) in listed, f"{name} needs {needed}"


@pytest.fixture
def small_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "project"
    (root / "conf").mkdir(parents=True)
    (root / "pyproject.toml").write_text('version = "9.9"\n')
    (root / "train.py").write_text("# one\n")
    monkeypatch.setattr(code, "PROJECT", root)
    monkeypatch.setattr(code, "_PACKAGES", ("mdurl",))
    return root


def test_code_follows_the_project(small_project: Path, stage: Stage) -> None:
    part = CodePart()
    part.fill(stage)
    copy = stage.folder / "nemo_bench"
    (copy / "conf").mkdir()
    (copy / "__pycache__").mkdir()
    (copy / "__pycache__" / "train.pyc").touch()  # Python's, not the user's
    (small_project / "conf" / "mine.yaml").write_text("name: mine\n")
    assert part.state(stage, contents=False).detail.startswith("is another state of this project")
    part.fill(stage)
    assert (copy / "conf" / "mine.yaml").exists() and part.state(stage, contents=True).ok and hidden(stage) == []
    (copy / "train.py").unlink()
    part.fill(stage)
    assert (copy / "train.py").read_text() == "# one\n"


def test_what_the_user_wrote_there_is_kept(small_project: Path, stage: Stage) -> None:
    part = CodePart()
    part.fill(stage)
    (small_project / "train.py").write_text("# two\n")
    mine = stage.folder / "nemo_bench" / "conf" / "mine.yaml"
    mine.parent.mkdir()
    mine.write_text("name: mine\n")
    with pytest.raises(BenchError, match=r"conf/mine\.yaml\nIt is left alone"):
        part.fill(stage)
    mine.unlink()
    (stage.folder / "nemo_bench" / "train.py").write_text("# mine\n")
    with pytest.raises(BenchError, match=r"recorded: nemo_bench/train\.py\nIt is left alone"):
        part.fill(stage)
    shutil.rmtree(stage.folder / "nemo_bench")
    (stage.folder / "nemo_bench").mkdir()
    stage.manifest.unlink()
    with pytest.raises(BenchError, match=r"nemo_bench was not put there by setup_stage\.py\nIt is left alone"):
        part.fill(stage)


def test_the_project_is_known_by_its_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "a.yaml").write_text("a: 1\n")
    first = code._fingerprint(tmp_path)
    os.utime(tmp_path / "conf" / "a.yaml", ns=(0, 0))
    assert code._fingerprint(tmp_path) == first
    (tmp_path / "conf" / "a.yaml").rename(tmp_path / "conf" / "b.yaml")
    assert code._fingerprint(tmp_path) != first
