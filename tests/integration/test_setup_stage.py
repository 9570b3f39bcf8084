"""`setup_stage.py` as a user runs it: real files, processes and HTTP; only enroot, the Hub and the index are fakes."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_bench.data import tokenizer as local_tokenizer
from nemo_bench.stage.stage import Stage
from tests.datasets import make_dataset
from tests.httpserver import COMMIT, GOOD_TOKEN, FileServer, Twist
from tests.squashfs import squashfs

PROJECT = Path(__file__).resolve().parents[2]
IMAGE = "nvidia+nemo+25.11.sqsh"
LLAMA = "meta-llama/Meta-Llama-3-8B"
TOKENIZER = "llama3.1-dataset/llama"
LOCAL = ("tokenizer=local", "tokenizer.corpus_bytes=60000", "image_gib=0.001")
LLAMA_ONLY = ("parts=[tokenizer]", "tokenizer.vocab_size=384")
FILES = {
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
}

# Records its arguments, and copies a prepared image. $FAKE says how it goes wrong.
ENROOT = """#!/bin/sh
here=$(dirname "$0")
if [ "$1" = version ]; then echo 3.5.0; exit 0; fi
echo "$@" >> "$here/calls"
case "$FAKE" in
  unauthorized) echo "[ERROR] URL https://nvcr.io/proxy_auth returned error code: 401 Unauthorized" >&2; exit 1 ;;
  full) head -c 8000000 /dev/zero > "$3" || exit 1 ;;
  slow)
    head -c 100 "$here/prepared.sqsh" > "$3"; echo $$ > "$here/started"
    while [ ! -e "$here/release" ]; do sleep 0.02; done ;;
esac
cp "$here/prepared.sqsh" "$3"
"""

# Takes every job, and runs none.
SBATCH = """#!/bin/sh
if [ "$1" = --test-only ]; then echo "sbatch: Job 1 to start at once" >&2; exit 0; fi
case " $* " in *" --parsable "*) echo $$ ;; *) echo "Submitted batch job $$" ;; esac
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this project that needs one package, which a folder of wheels provides instead of an index."""
    copy = tmp_path_factory.mktemp("project")
    for name in ("nemo_bench", "hydra_plugins", "conf"):
        shutil.copytree(PROJECT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup_stage.py", "jobs.py", "train.py", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(PROJECT / name, copy)
    text = (copy / "pyproject.toml").read_text()
    text = re.sub(r"^dependencies = \[.*?^\]", 'dependencies = ["needed"]', text, flags=re.MULTILINE | re.DOTALL)
    (copy / "pyproject.toml").write_text(text)
    (copy / "constraints.txt").write_text("needed==1.0\n")
    for version in ("1.0", "2.0"):
        about = f"needed-{version}.dist-info"
        with zipfile.ZipFile(copy / f"needed-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr("needed.py", f"VERSION = {version!r}\n")
            wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: needed\nVersion: {version}\n")
            wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{about}/RECORD", "")
    return copy


class Setup:
    """`setup_stage.py` with a stage folder and an enroot of the test's own."""

    def __init__(self, project: Path, tmp_path: Path) -> None:
        self.project, self.tmp_path, self.stage = project, tmp_path, tmp_path / "stage"
        self.bin = tmp_path / "bin"
        self.bin.mkdir()
        self.put("enroot", ENROOT)
        (self.bin / "prepared.sqsh").write_bytes(squashfs())
        dropped = ("SLURM_", "SBATCH_", "HYDRA_", "HF_", "ENROOT_", "XDG_", "PIP_")
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(dropped)},
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "STAGE_PATH": str(self.stage),
            "HOME": str(tmp_path / "home"),
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(project),
            "PIP_CONFIG_FILE": os.devnull,
            "HF_ENDPOINT": "http://127.0.0.1:9",  # discard: no test reaches the real one
        }

    def put(self, name: str, script: str) -> None:
        """Add a program that is found before the machine's own."""
        (self.bin / name).write_text(script)
        (self.bin / name).chmod(0o755)

    def start(self, *args: str, script: str = "setup_stage.py", **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(self.project / script), *args],
            cwd=self.tmp_path,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A test suite in the background of a shell ignores Ctrl-C, and would pass that on.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def __call__(
        self, *args: str, code: int = 0, script: str = "setup_stage.py", **environment: str
    ) -> tuple[str, str]:
        process = self.start(*args, script=script, **environment)
        out, err = process.communicate(timeout=120)
        assert process.returncode == code, out + err
        assert "Traceback" not in err
        return out, err

    def enroot_calls(self) -> list[str]:
        path = self.bin / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def wait_for(self, name: str) -> None:
        """Return once the fake enroot has made this file next to itself."""
        deadline = time.monotonic() + 60
        while not (self.bin / name).exists():
            assert time.monotonic() < deadline, f"no {name}"
            time.sleep(0.02)

    def leftovers(self) -> list[str]:
        """Return the hidden files, except locks."""
        return [str(path) for path in self.stage.rglob(".*") if path.suffix != ".lock"]

    def snapshot(self) -> dict[str, tuple[int, int]]:
        """Return inode and date of everything in the stage folder."""
        paths = sorted(self.stage.rglob("*"))
        return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


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


# --- filling ------------------------------------------------------------------------------------------------


def test_fills_everything(filled: Setup) -> None:
    (call,) = filled.enroot_calls()
    assert re.fullmatch(rf"import --output {filled.stage}/\.\S+/\S+ docker://nvcr\.io#nvidia/nemo:25\.11", call)
    assert (filled.stage / IMAGE).read_bytes() == squashfs()
    assert {path.name for path in (filled.stage / TOKENIZER).iterdir()} == FILES
    assert filled.leftovers() == []
    entries = Stage(filled.stage).entries()
    assert entries[IMAGE].made_with == {"entrypoint.container": "nvcr.io/nvidia/nemo:25.11"}
    assert entries[IMAGE].details["enroot"] == "3.5.0" and entries[IMAGE].size_bytes == len(squashfs())
    assert entries[TOKENIZER].details["vocab_size"] == 384


def test_a_second_run_does_nothing(filled: Setup) -> None:
    before = filled.snapshot()
    out, err = filled(*LOCAL, "enroot=nowhere", PATH="/nowhere", HF_HUB_OFFLINE="1")
    assert out.count("complete (") == 3 and err == ""
    assert filled.snapshot() == before and len(filled.enroot_calls()) == 1


def test_dry_says_what_would_be_done_and_does_nothing(setup: Setup, filled: Setup) -> None:
    out, _ = setup("launch=dry", "bundle=stage.tar")
    for text in (f"/{IMAGE} 'docker://nvcr.io#nvidia/nemo:25.11'", LLAMA, "26.8 GB", "pip wheel", "nothing was done"):
        assert text in out
    assert not setup.stage.exists() and setup.enroot_calls() == []
    assert filled("launch=dry", *LOCAL, "stage_path=stage")[0].count("complete (") == 3


def test_the_local_tokenizer_is_the_one_that_train_uses(filled: Setup) -> None:
    from tokenizers import Tokenizer

    from nemo_bench.data import corpus

    folder = filled.stage / TOKENIZER
    trained = local_tokenizer.train((file.text for file in corpus.collect(60000)), vocab_size=384)
    assert (folder / "tokenizer.json").read_text() == local_tokenizer.render(trained)["tokenizer.json"]
    loaded = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = json.loads((folder / "config.json").read_text())
    assert config["vocab_size"] == loaded.get_vocab_size() == 384
    assert loaded.id_to_token(config["eos_token_id"]) == "<|end_of_text|>"


def test_the_code_runs_from_its_folder_with_the_pinned_wheels(filled: Setup) -> None:
    code = filled.stage / "nemo_bench"
    assert [path.name for path in (code / "wheels").iterdir()] == ["needed-1.0-py3-none-any.whl"]
    shown = subprocess.run(
        [sys.executable, str(code / "train.py"), "--cfg", "job", "scale=128gpu"],
        env={"PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=code,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "num_nodes: 16" in shown.stdout


def test_filling_imports_nothing_heavy(filled: Setup) -> None:
    shown = subprocess.run(
        [sys.executable, "-X", "importtime", str(filled.project / "setup_stage.py"), *LOCAL],
        cwd=filled.tmp_path,
        env=filled.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in shown.stderr.splitlines()}
    assert "hydra" in imported
    assert imported & {"torch", "nemo", "transformers", "huggingface_hub", "tokenizers", "requests", "numpy"} == set()


# --- what goes wrong ----------------------------------------------------------------------------------------


def test_a_part_that_fails_does_not_stop_the_others(setup: Setup) -> None:
    _, err = setup("enroot=enroot-of-nowhere", *LOCAL, "parts=[image,tokenizer]", code=2)
    for text in ("enroot-of-nowhere is not installed", "hydra/launcher=submitit_slurm", "bundle=FILE"):
        assert text in err
    assert set(Stage(setup.stage).entries()) == {TOKENIZER}


def test_pip_without_an_index_is_explained(setup: Setup) -> None:
    _, err = setup("parts=[code]", code=2, PIP_FIND_LINKS="/nowhere")
    for text in ("pip could not download", "ERROR: ", "PIP_INDEX_URL"):
        assert text in err
    assert setup.leftovers() == [] and not (setup.stage / "nemo_bench").exists()


def test_an_import_that_the_registry_refuses(setup: Setup) -> None:
    _, err = setup("parts=[image]", "image_gib=0.001", FAKE="unauthorized", code=2)
    for text in ("[ERROR] URL https://nvcr.io", "exit status 1", ".config/enroot/.credentials", "login $oauthtoken"):
        assert text in err
    assert not (setup.stage / IMAGE).exists() and setup.leftovers() == []


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
        (["check", "bundle=none.tar"], "check reads the stage folder"),
    ],
)
def test_bad_input_gets_one_message(setup: Setup, args: list[str], text: str) -> None:
    assert text in setup(*args, code=2)[1]
    assert not setup.stage.exists()


@pytest.mark.parametrize("place", ["file", "file/stage", "/proc/nemo"])
@pytest.mark.parametrize("args", [["parts=[image]"], ["parts=[image]", "hydra/launcher=submitit_slurm"]])
def test_a_stage_path_that_cannot_be_a_folder(setup: Setup, place: str, args: list[str]) -> None:
    (setup.tmp_path / "file").write_text("mine")
    setup.put("sbatch", SBATCH)
    stage = str(setup.tmp_path / place)
    out, err = setup(*args, STAGE_PATH=stage, code=2)
    assert err.startswith(f"{stage} cannot be used") and "\nSTAGE_PATH (or stage_path=...) must name" in err
    assert len(err.splitlines()) == 2 and out == ""
    if place == "file":
        assert "cannot be used" in setup("check", STAGE_PATH=stage, code=2)[1]


def test_space_is_checked_before_the_import(setup: Setup) -> None:
    _, err = setup("image_gib=9e5", "parts=[image]", code=2)
    assert "not enough disk space" in err and "image_gib" in err and setup.enroot_calls() == []


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


# --- check --------------------------------------------------------------------------------------------------


def test_check_takes_what_is_recorded_unless_told_otherwise(copied: Setup) -> None:
    before = copied.snapshot()
    for args in ((), LOCAL):
        out, err = copied("check", *args, COLUMNS="250")
        for text in ("nvcr.io/nvidia/nemo:25.11", "trained here, 384 tokens", "4.1 kB"):
            assert text in out
        assert err == "" and copied.snapshot() == before
    _, err = copied("check", "tokenizer=llama", code=2)
    assert "was made with tokenizer.source=local, not huggingface" in err
    _, err = copied("check", "entrypoint=nemo_24_09", code=2)
    assert "nemo+24.09.sqsh does not exist" in err


def test_check_names_what_is_missing_and_the_command_that_brings_it(copied: Setup) -> None:
    (copied.stage / TOKENIZER / "config.json").unlink()
    (copied.stage / IMAGE).unlink()
    (copied.stage / "nemo_bench" / "train.py").unlink()
    _, err = copied("check", "image_gib=0.001", code=2)
    assert "nemo_bench lacks nemo_bench/train.py" in err
    commands = [shlex.split(line) for line in err.splitlines() if line.startswith("  ")]
    assert [command[-1] for command in commands] == ["parts=[tokenizer]", "parts=[code]", "parts=[image]"]
    assert "tokenizer.source=local" in commands[0] and "tokenizer.vocab_size=384" in commands[0]
    for command in commands:
        copied(*command[2:])
    copied("check")


def test_check_reads_contents(copied: Setup) -> None:
    image = copied.stage / IMAGE
    data = bytearray(image.read_bytes())
    data[-1] ^= 1
    image.write_bytes(data)
    _, err = copied("check", code=2)
    assert f"{image} has changed since it was recorded" in err
    assert f"  mv {image} {image}.old && python setup_stage.py 'parts=[image]'" in err


# --- Hugging Face -------------------------------------------------------------------------------------------


def test_downloads_the_tokenizer(setup: Setup, hub: FileServer, filled: Setup) -> None:
    setup(*LLAMA_ONLY, HF_ENDPOINT=hub.endpoint, HF_TOKEN=GOOD_TOKEN)
    for name in FILES:
        assert (setup.stage / TOKENIZER / name).read_bytes() == (filled.stage / TOKENIZER / name).read_bytes()
    assert {path.name for path in (setup.stage / TOKENIZER).iterdir()} == FILES and setup.leftovers() == []
    entry = Stage(setup.stage).entries()[TOKENIZER]
    assert (entry.made_with["tokenizer.repo"], entry.details["commit"]) == (LLAMA, COMMIT)
    # All files are of one commit.
    assert {request.path.split("/")[4] for request in hub.seen("GET") if "resolve" in request.path} == {COMMIT}
    count = len(hub.seen())
    assert "complete (" in setup(*LLAMA_ONLY, HF_ENDPOINT=hub.endpoint)[0]
    assert len(hub.seen()) == count
    _, err = setup("parts=[tokenizer]", *LOCAL, code=2)
    assert "not local" in err and "tokenizer.folder" in err


def test_the_token_appears_nowhere(setup: Setup, hub: FileServer) -> None:
    token = "hf_" + "secret" * 5
    printed = [*setup(*LLAMA_ONLY, HF_ENDPOINT=hub.endpoint, HF_TOKEN=token, code=2)]
    elsewhere = {"Location": hub.url("/nowhere?token=signature")}
    hub.script(f"/{LLAMA}/resolve/main/config.json", Twist(method="HEAD", status=302, headers=elsewhere))
    printed += setup(*LLAMA_ONLY, HF_ENDPOINT=hub.endpoint, HF_TOKEN=token, code=2)
    assert token not in "".join(printed) and "signature" not in "".join(printed)
    for path in setup.tmp_path.rglob("*"):
        assert not path.is_file() or token.encode() not in path.read_bytes()


def test_no_access_to_the_tokenizer(setup: Setup, hub: FileServer) -> None:
    out, err = setup(*LLAMA_ONLY, HF_ENDPOINT=hub.endpoint, code=2)
    for text in (f"https://huggingface.co/{LLAMA}", "licence", "take a day", "HF_TOKEN", "tokenizer=local"):
        assert text in err
    assert "without a connection this gives up" in out
    assert not (setup.stage / TOKENIZER).exists() and setup.leftovers() == []


# --- kills and crowds ---------------------------------------------------------------------------------------


def test_killed_while_enroot_works(setup: Setup) -> None:
    """enroot may outlive a killed setup_stage.py: the next one waits for its end, and starts over."""
    args = ("parts=[image]", "image_gib=0.001")
    first = setup.start(*args, FAKE="slow")
    setup.wait_for("started")
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
    setup.wait_for("started")
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in err
    assert setup.leftovers() == [] and not (setup.stage / IMAGE).exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int((setup.bin / "started").read_text()), 0)


def test_several_at_once_do_the_work_once(setup: Setup) -> None:
    args = (*LOCAL, "parts=[image,tokenizer]")
    first = setup.start(*args, FAKE="slow")
    setup.wait_for("started")
    setup(*LOCAL, "parts=[tokenizer]")  # does not wait for the image
    second = setup.start(*args)
    (setup.bin / "release").touch()
    for process in (first, second):
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, out + err
    assert len(setup.enroot_calls()) == 1 and setup.leftovers() == []
    setup("check", "parts=[image,tokenizer]")


# --- as a Slurm job, with a fake sbatch ---------------------------------------------------------------------

SUBMIT = ("hydra/launcher=submitit_slurm", "parts=[image]", "image_gib=0.001")


@pytest.fixture
def login_node(setup: Setup) -> Setup:
    """Where jobs are submitted."""
    setup.put("sbatch", SBATCH)
    return setup


def scripts(stage: Path) -> list[Path]:
    return sorted(stage.glob("results.stage_setup/*/job.sbatch"))


@pytest.mark.parametrize("given", ["absolute", "relative", "override"])
def test_a_job_fills_the_folder_whatever_its_environment(login_node: Setup, given: str) -> None:
    name = 'it\'s a \\ "stage", $HOME=b {c} [d] (e): é%!'
    stage = login_node.tmp_path / name
    elsewhere = login_node.tmp_path / "elsewhere"
    elsewhere.mkdir()
    quoted = name.replace("'", "\\'")
    overrides = ["enroot=bin/enroot", "bundle='out, =.tar'"]
    if given == "override":
        overrides.append(f"stage_path='{quoted}'")
    path = {"absolute": str(stage), "relative": name}.get(given, "/nowhere")
    login_node(*SUBMIT, *overrides, STAGE_PATH=path)
    (script,) = scripts(stage)
    done = subprocess.run(["env", "-i", "bash", script], cwd=elsewhere, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (stage / IMAGE).read_bytes() == squashfs() and list(elsewhere.iterdir()) == []
    assert (login_node.tmp_path / "out, =.tar").exists()
    assert json.loads((script.parent / "exit.json").read_text())["exit_code"] == 0


def test_a_dry_submission_leaves_nothing(login_node: Setup) -> None:
    temporary = login_node.tmp_path / "tmp"
    temporary.mkdir()
    out, _ = login_node(*SUBMIT, "launch=dry", TMPDIR=str(temporary))
    (command,) = [line for line in out.splitlines() if "setup_stage.py" in line]
    assert f"stage_path={login_node.stage}" in shlex.split(command)
    assert "sbatch --test-only: accepted" in out and "nothing was submitted" in out
    assert not login_node.stage.exists() and list(temporary.iterdir()) == []


# --- bundles ------------------------------------------------------------------------------------------------


def test_from_one_cluster_to_another(copied: Setup, project: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Fill and pack in one call; there, install with the program and the packages of the bundle alone."""
    bundle = copied.tmp_path / "stage.tar"
    prefix = "llama3.1-dataset/my-llama_00_text_document"
    make_dataset(copied.stage / prefix, copied.stage / TOKENIZER)
    assert f"packed {TOKENIZER}, nemo_bench, {IMAGE}" in copied(*LOCAL, f"bundle={bundle}")[0]
    setup = Setup(project, tmp_path_factory.mktemp("other"))
    subprocess.run(["tar", "xf", bundle, "nemo_bench"], cwd=setup.tmp_path, check=True)
    wheels = list(setup.tmp_path.glob("nemo_bench/wheels/*.whl"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--target", "packages"]
    subprocess.run([*pip, *map(str, wheels)], cwd=setup.tmp_path, env=setup.environment, check=True)
    assert (setup.tmp_path / "packages" / "needed.py").exists()
    setup.project = setup.tmp_path / "nemo_bench"
    assert "installed " in setup("install", f"bundle={bundle}")[0]
    assert setup.enroot_calls() == [] and setup.leftovers() == []
    setup("check")
    before = setup.snapshot()
    assert "is already in" in setup(f"bundle={bundle}")[0]  # the file exists: install
    assert setup("check")[1] == "" and setup.snapshot() == before


def test_an_incomplete_folder_is_not_packed(copied: Setup) -> None:
    (copied.stage / IMAGE).unlink()
    _, err = copied("pack", "bundle=stage.tar", *LOCAL, code=2)
    assert "cannot be packed" in err and "parts=[image]" in err
    assert not (copied.tmp_path / "stage.tar").exists()
