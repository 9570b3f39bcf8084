"""`setup_stage.py` as a user runs it: real files, processes and HTTP; only enroot, the Hub and the index are fakes."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_bench.stage.stage import Stage
from tests.datasets import make_dataset
from tests.httpserver import COMMIT, GOOD_TOKEN, FileServer, Twist
from tests.integration.conftest import wait_for
from tests.stage_setup import IMAGE as CONTENT
from tests.stage_setup import Setup, copy_project

IMAGE = "nvidia+nemo+25.11.sqsh"
LLAMA = "meta-llama/Meta-Llama-3-8B"
TOKENIZER = "llama3.1-dataset/llama"
LOCAL = ("tokenizer=local", "tokenizer.corpus_bytes=60000", "image_gib=0.001")
FILES = {"special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"}
LLAMA_ONLY = ("parts=[tokenizer]", "tokenizer.vocab_size=384", f"tokenizer.files=[{','.join(sorted(FILES))}]")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy_project(folder := tmp_path_factory.mktemp("project"))
    return folder


@pytest.fixture
def setup(project: Path, tmp_path: Path) -> Setup:
    return Setup(project, tmp_path)


@pytest.fixture(scope="module")
def filled(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """A complete stage folder; not to be changed."""
    setup = Setup(project, tmp_path_factory.mktemp("filled"))
    assert "tokenizer, code, image complete" in setup(*LOCAL)[0]
    return setup


@pytest.fixture
def copied(filled: Setup, setup: Setup) -> Setup:
    """A complete stage folder of the test's own."""
    shutil.copytree(filled.stage, setup.stage)
    return setup


@pytest.fixture
def hub(filled: Setup) -> Iterator[FileServer]:
    """A hub with a gated repository of Llama's name, whose tokenizer is a small one."""
    with FileServer() as server:
        for name in FILES:
            data = (filled.stage / TOKENIZER / name).read_bytes()
            server.put_hub(LLAMA, name, data, lfs=name == "tokenizer.json", gated=True)
        yield server


def test_fills_everything(filled: Setup) -> None:
    (call,) = filled.enroot_calls()
    assert re.fullmatch(rf"import --output {filled.stage}/\.\S+/\S+ docker://nvcr\.io#nvidia/nemo:25\.11", call)
    assert (filled.stage / IMAGE).read_bytes() == CONTENT
    assert {path.name for path in (filled.stage / TOKENIZER).iterdir()} == FILES
    assert filled.leftovers() == []
    entries = Stage(filled.stage).entries()
    assert entries[IMAGE].settings == {"entrypoint.container": "nvcr.io/nvidia/nemo:25.11"}
    assert entries[IMAGE].version == "nvcr.io/nvidia/nemo:25.11"
    assert entries[IMAGE].size_bytes == len(CONTENT)
    assert entries[TOKENIZER].version == "trained here, 384 tokens"


def test_a_second_run_does_nothing(filled: Setup) -> None:
    before = filled.snapshot()
    out, err = filled(*LOCAL, "enroot=nowhere", PATH="/nowhere", HF_HUB_OFFLINE="1")
    assert out.count("complete (") == 3 and err == ""
    assert filled.snapshot() == before and len(filled.enroot_calls()) == 1


def test_dry_says_what_would_be_done_and_does_nothing(setup: Setup, filled: Setup) -> None:
    out, _ = setup("launch=dry")
    for text in ("enroot import docker://nvcr.io#nvidia/nemo:25.11", f"/{IMAGE} does not exist", LLAMA, "25 GiB"):
        assert text in out
    assert not setup.stage.exists() and setup.enroot_calls() == []
    assert filled("launch=dry", *LOCAL, "stage_path=stage")[0].count("complete (") == 3


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["parts=[imag]"], "image, tokenizer, code"),
        (["parts=[]"], "image, tokenizer, code"),
        (["image_gib=nan"], "must be at least 0"),
        (["action=chek"], "fill, check, pack, install"),
        (["entrypoint.container=Nemo 25"], "not an image reference"),
        (["entrypoint.image=../x.sqsh"], "entrypoint.image=../x.sqsh must lie inside the stage folder"),
        (["pack"], "bundle=stage.tar"),
        (["install", "bundle=none.tar"], "none.tar does not exist"),
    ],
)
def test_bad_input_gets_one_message(setup: Setup, args: list[str], text: str) -> None:
    assert text in setup(*args, code=2)[1]
    assert not setup.stage.exists()


def test_full_and_read_only_disks(setup: Setup) -> None:
    setup.stage.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", setup.stage], check=False).returncode:
        pytest.skip("may not mount")
    try:
        assert "no space left" in setup("parts=[image]", "image_gib=0.001", FAKE="full", code=2)[1]
        assert setup.leftovers() == []
        subprocess.run(["dd", "if=/dev/zero", f"of={setup.stage}/filler"], capture_output=True, check=False)
        assert "No space left" in setup("parts=[tokenizer]", *LOCAL, code=2)[1]
        assert setup.leftovers() == [] and not (setup.stage / TOKENIZER).exists()
        (setup.stage / "filler").unlink()
        setup("parts=[image]", "image_gib=0.001")
        subprocess.run(["mount", "-o", "remount,ro", setup.stage], check=True)
        assert "Cannot write in" in setup("parts=[tokenizer]", *LOCAL, code=2)[1]
        setup("check", "parts=[image]")
    finally:
        subprocess.run(["umount", setup.stage], check=True)


def test_check_names_what_is_wrong_and_the_commands_that_repair_it(copied: Setup) -> None:
    (copied.stage / TOKENIZER / "tokenizer_config.json").unlink()
    (copied.stage / "nemo_bench" / "train.py").unlink()
    image = copied.stage / IMAGE
    image.write_bytes(image.read_bytes()[:-1] + b"!")  # only its contents tell
    out, err = copied("check", *LOCAL, code=2)
    assert "nemo_bench lacks nemo_bench/train.py" in out and f"{image} has changed since it was recorded" in out
    *moves, again = err.splitlines()[1:]
    assert len(moves) == 3 and f"mv {image} {image}.old" in moves
    for move in moves:
        subprocess.run(shlex.split(move), check=True)
    copied(*shlex.split(again.rpartition("setup_stage.py ")[2]))
    before = copied.snapshot()
    out, err = copied("check", *LOCAL)
    assert "image: ok: " in out and "trained here, 384 tokens" in out and err == "" and copied.snapshot() == before
    copied("check")  # the options that it was filled with need not be given again
    assert "was made with tokenizer.source=local, not huggingface" in copied("check", "tokenizer=llama", code=2)[0]


def test_downloads_the_tokenizer(setup: Setup, hub: FileServer, filled: Setup) -> None:
    setup(*LLAMA_ONLY, HF_ENDPOINT=hub.endpoint, HF_TOKEN=GOOD_TOKEN)
    for name in FILES:
        assert (setup.stage / TOKENIZER / name).read_bytes() == (filled.stage / TOKENIZER / name).read_bytes()
    assert {path.name for path in (setup.stage / TOKENIZER).iterdir()} == FILES and setup.leftovers() == []
    entry = Stage(setup.stage).entries()[TOKENIZER]
    assert entry.version == f"{LLAMA} {COMMIT}, 384 tokens"
    # All files are of one commit.
    assert {request.path.split("/")[4] for request in hub.seen("GET") if "resolve" in request.path} == {COMMIT}
    count = len(hub.seen())
    assert "complete (" in setup(*LLAMA_ONLY, HF_ENDPOINT=hub.endpoint)[0]
    assert len(hub.seen()) == count
    _, err = setup("parts=[tokenizer]", *LOCAL, code=2)
    assert "not local" in err and "It is left alone: move it away" in err


def test_no_access_to_the_tokenizer(setup: Setup, hub: FileServer) -> None:
    out, err = setup(*LLAMA_ONLY, HF_ENDPOINT=hub.endpoint, code=2)
    for text in (f"https://huggingface.co/{LLAMA}", "licence", "take a day", "HF_TOKEN", "tokenizer=local"):
        assert text in err
    assert "without a connection this takes 30 s" in out
    token = "hf_" + "secret" * 5
    printed = [*setup(*LLAMA_ONLY, HF_ENDPOINT=hub.endpoint, HF_TOKEN=token, code=2)]
    elsewhere = {"Location": hub.url("/nowhere?token=signature")}
    hub.script(f"/{LLAMA}/resolve/main/special_tokens_map.json", Twist(method="HEAD", status=302, headers=elsewhere))
    printed += setup(*LLAMA_ONLY, HF_ENDPOINT=hub.endpoint, HF_TOKEN=token, code=2)
    assert token not in "".join(printed) and "signature" not in "".join(printed)
    for path in setup.tmp_path.rglob("*"):
        assert not path.is_file() or token.encode() not in path.read_bytes()
    assert not (setup.stage / TOKENIZER).exists() and setup.leftovers() == []


def test_killed_while_enroot_works(setup: Setup) -> None:
    """enroot may outlive a killed setup_stage.py: the next one waits for its end, and starts over."""
    args = ("parts=[image]", "image_gib=0.001")
    first = setup.start(*args, FAKE="slow")
    wait_for((setup.bin / "started").exists, "enroot")
    first.kill()
    first.wait()  # its output stays open: enroot has it too
    assert not (setup.stage / IMAGE).exists()
    second = setup.start(*args)
    assert second.stdout is not None
    assert "Waiting for another process that fills the part image" in second.stdout.readline()
    (setup.bin / "release").touch()
    out, err = second.communicate(timeout=60)
    assert second.returncode == 0, out + err
    assert len(setup.enroot_calls()) == 2 and setup.leftovers() == []
    setup("check", "parts=[image]")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_ended_while_enroot_works(setup: Setup, signum: int, code: int) -> None:
    process = setup.start("parts=[image]", "image_gib=0.001", FAKE="slow")
    wait_for((setup.bin / "started").exists, "enroot")
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in err
    assert setup.leftovers() == [] and not (setup.stage / IMAGE).exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int((setup.bin / "started").read_text()), 0)


def test_from_one_cluster_to_another(copied: Setup, project: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Fill and pack; there, install with the program and the packages of the bundle alone."""
    bundle = copied.tmp_path / "stage.tar"
    (copied.stage / IMAGE).unlink()
    assert f"{IMAGE} does not exist; nothing was packed" in copied("pack", f"bundle={bundle}", *LOCAL, code=2)[1]
    assert not bundle.exists()
    prefix = "llama3.1-dataset/my-llama_00_text_document"
    make_dataset(copied.stage / prefix, copied.stage / TOKENIZER)
    copied(*LOCAL)
    assert f"packed {TOKENIZER}, nemo_bench, {IMAGE}" in copied("pack", *LOCAL, f"bundle={bundle}")[0]
    setup = Setup(project, tmp_path_factory.mktemp("other"))
    subprocess.run(["tar", "xf", bundle, "nemo_bench"], cwd=setup.tmp_path, check=True)
    wheels = list(setup.tmp_path.glob("nemo_bench/wheels/*.whl"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--target", "packages"]
    subprocess.run([*pip, *map(str, wheels)], cwd=setup.tmp_path, env=setup.environment, check=True)
    assert [wheel.name for wheel in wheels] == ["needed-1.0-py3-none-any.whl"]  # the pinned one
    setup.project = setup.tmp_path / "nemo_bench"
    setup("install", f"bundle={bundle}", "launch=dry")
    assert not setup.stage.exists()
    assert "installed " in setup("install", f"bundle={bundle}")[0]
    assert setup.enroot_calls() == [] and setup.leftovers() == []
    before = setup.snapshot()
    assert setup("install", f"bundle={bundle}")[0].count("there already, and kept") == 4
    assert setup("check", *LOCAL)[1] == "" and setup.snapshot() == before
