"""`setup_stage.py` as a user runs it: real files, processes and HTTP; only enroot and the hub are stand-ins."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_bench.data import tokenizer as local_tokenizer
from nemo_bench.data.indexed_dataset import IndexedDatasetWriter
from nemo_bench.data.shard import read_manifest
from tests.datasets import make_dataset
from tests.httpserver import COMMIT, GOOD_TOKEN, UNGRANTED_TOKEN, FileServer, Twist
from tests.squashfs import squashfs

PROJECT = Path(__file__).resolve().parents[2]
IMAGE = "nvidia+nemo+25.11.sqsh"
LLAMA = "meta-llama/Meta-Llama-3-8B"
TOKENIZER = "llama3.1-dataset/llama"
LOCAL = ("tokenizer=local", "tokenizer.corpus_bytes=60000")
FILES = {
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
}

# Records its arguments, and makes a squash file as far as its superblock goes. $FAKE says how it goes wrong.
ENROOT = """#!/bin/sh
here=$(dirname "$0")
if [ "$1" = version ]; then echo 3.5.0; exit 0; fi
printf '%s\\n' "$#" "$@" >> "$here/calls"
echo "[INFO] Querying registry for permission grant" >&2
case "$FAKE" in
  unauthorized)
    echo "[ERROR] URL https://nvcr.io/proxy_auth returned error code: 401 Unauthorized" >&2; exit 1 ;;
  full)
    head -c 8000000 /dev/zero > "$3" || { echo "mksquashfs: No space left on device" >&2; exit 1; } ;;
  slow)
    head -c 100 "$here/prepared.sqsh" > "$3"; echo $$ > "$here/started"
    while [ ! -e "$here/release" ]; do sleep 0.02; done ;;
esac
cp "$here/prepared.sqsh" "$3"
"""

# Takes every job, and runs none.
SBATCH = """#!/bin/sh
if [ "$1" = --test-only ]; then echo "sbatch: Job 1 to start at once" >&2; exit 0; fi
echo "Submitted batch job $$"
"""
# Knows each job that was ever asked for as one that was cancelled.
SQUEUE = r"""#!/bin/sh
sed -n 's/.*"id": "\([0-9]*\)".*/\1|CANCELLED/p' "$STAGE_PATH"/results.stage_setup/*/job.json
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this project, which nobody edits while the tests run."""
    copy = tmp_path_factory.mktemp("project")
    for name in ("nemo_bench", "hydra_plugins", "conf"):
        shutil.copytree(PROJECT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup_stage.py", "jobs.py", "train.py", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(PROJECT / name, copy)
    return copy


class Setup:
    """`setup_stage.py` with a stage folder and an enroot of the test's own."""

    def __init__(self, project: Path, tmp_path: Path) -> None:
        self.project, self.tmp_path, self.stage = project, tmp_path, tmp_path / "stage"
        self.bin = tmp_path / "bin"
        self.bin.mkdir()
        self.put("enroot", ENROOT)
        (self.bin / "prepared.sqsh").write_bytes(squashfs())
        dropped = ("SLURM_", "SBATCH_", "HYDRA_", "HF_", "ENROOT_", "XDG_")
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(dropped)},
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "STAGE_PATH": str(self.stage),
            "HOME": str(tmp_path / "home"),
            "HF_ENDPOINT": "http://127.0.0.1:9",  # discard: no test reaches the real one
        }

    def put(self, name: str, script: str) -> None:
        """A program of this name that is found before the machine's own."""
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
        self, *args: str, code: int | None = 0, script: str = "setup_stage.py", **environment: str
    ) -> subprocess.CompletedProcess[str]:
        process = self.start(*args, script=script, **environment)
        out, err = process.communicate(timeout=120)
        assert code in (None, process.returncode), out + err
        assert "Traceback" not in err
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def enroot_calls(self) -> list[list[str]]:
        """The arguments of each call of enroot so far."""
        path = self.bin / "calls"
        lines = iter(path.read_text().splitlines() if path.exists() else [])
        return [[next(lines) for _ in range(int(count))] for count in lines]

    def wait_for(self, name: str) -> None:
        """Returns once the stand-in has made this file beside itself."""
        deadline = time.monotonic() + 60
        while not (self.bin / name).exists():
            assert time.monotonic() < deadline, f"no {name}"
            time.sleep(0.02)

    def manifest(self) -> dict[str, Any]:
        content = json.loads((self.stage / "stage.json").read_text())
        assert isinstance(content, dict)
        return content

    def leftovers(self, folder: Path | None = None) -> list[str]:
        """Hidden files anywhere, but for the locks and vendored packages' own."""
        found = (folder or self.stage).rglob(".*")
        return [str(path) for path in found if path.suffix != ".lock" and "vendor" not in path.parts]

    def snapshot(self) -> dict[str, tuple[int, int]]:
        """Inode and date of everything in the stage folder."""
        paths = sorted(self.stage.rglob("*"))
        return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


@pytest.fixture
def setup(project: Path, tmp_path: Path) -> Setup:
    return Setup(project, tmp_path)


@pytest.fixture(scope="module")
def filled(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """A complete stage folder; not to be changed."""
    setup = Setup(project, tmp_path_factory.mktemp("filled"))
    result = setup(*LOCAL, "image_gib=0.001")
    assert "code, tokenizer, image complete" in result.stdout
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
            server.put_hub(
                LLAMA, name, (filled.stage / TOKENIZER / name).read_bytes(), lfs=name == "tokenizer.json", gated=True
            )
        yield server


LLAMA_ONLY = ("parts=[tokenizer]", "tokenizer.vocab_size=384")


# --- filling ------------------------------------------------------------------------------------------------


def test_fills_everything(filled: Setup) -> None:
    (call,) = filled.enroot_calls()
    assert call[:2] == ["import", "--output"] and call[3:] == ["docker://nvcr.io#nvidia/nemo:25.11"]
    made = Path(call[2])
    assert made.parent == filled.stage and made.name.startswith(f".{IMAGE}.") and not made.exists()
    assert (filled.stage / IMAGE).read_bytes() == squashfs()
    assert {path.name for path in (filled.stage / TOKENIZER).iterdir()} == FILES
    assert filled.leftovers() == []

    manifest = filled.manifest()
    image = manifest["parts"]["image"][IMAGE]
    assert (image["container"], image["enroot"]) == ("nvcr.io/nvidia/nemo:25.11", "3.5.0")
    assert image["files"][IMAGE]["size_bytes"] == (filled.stage / IMAGE).stat().st_size == image["size_bytes"]
    assert len(image["files"][IMAGE]["sha256"]) == 64 and image["made_at"].endswith("Z")
    tokenizer = manifest["parts"]["tokenizer"][TOKENIZER]
    assert (tokenizer["source"], tokenizer["vocab_size"]) == ("local", 384)
    code = manifest["parts"]["code"]["nemo_bench"]
    assert code["version"] == manifest["project_version"] and code["vendored"]["hydra-core"] == "1.3.2"


def test_a_second_run_does_nothing(filled: Setup) -> None:
    before = filled.snapshot()
    result = filled(*LOCAL, "enroot=nowhere", PATH="/nowhere", HF_HUB_OFFLINE="1")
    assert result.stdout.count("there already") == 3 and result.stderr == ""
    assert filled.snapshot() == before
    assert len(filled.enroot_calls()) == 1


def test_dry_does_nothing_and_says_what_it_would_do(setup: Setup, filled: Setup) -> None:
    result = setup("launch=dry", "bundle=stage.tar")
    assert f"enroot import --output {setup.stage}/{IMAGE} 'docker://nvcr.io#nvidia/nemo:25.11'" in result.stdout
    for text in (LLAMA, "26.8 GB", "12 packages", "then pack all of it into", "nothing was done"):
        assert text in result.stdout
    assert not setup.stage.exists() and not (setup.bin / "calls").exists()
    assert filled("launch=dry", *LOCAL, "stage_path=stage").stdout.count("there already") == 3


def test_the_local_tokenizer_is_the_one_that_train_uses(filled: Setup) -> None:
    from tokenizers import Tokenizer

    from nemo_bench.data import corpus

    folder = filled.stage / TOKENIZER
    texts = (file.text for file in corpus.collect(60000))
    assert (folder / "tokenizer.json").read_text() == local_tokenizer.render(
        local_tokenizer.train(texts, vocab_size=384)
    )["tokenizer.json"]
    loaded = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = json.loads((folder / "config.json").read_text())
    assert config["vocab_size"] == loaded.get_vocab_size() == 384
    assert loaded.id_to_token(config["eos_token_id"]) == "<|end_of_text|>"
    assert json.loads((folder / "generation_config.json").read_text())["bos_token_id"] == config["bos_token_id"]
    assert loaded.decode(loaded.encode("def answer(): return 42").ids) == "def answer(): return 42"


def test_the_code_works_without_any_installed_package(filled: Setup) -> None:
    code = filled.stage / "nemo_bench"
    assert [path for path in code.rglob("*") if path.suffix in (".so", ".pyd", ".pyc")] == []
    names = "hydra, omegaconf, yaml, submitit, rich.progress, nemo_bench.stage.run, nemo_bench.launch.submission"
    environment = {"PYTHONPATH": f"{code}:{code}/vendor", "PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}
    # -S: without the folder of the packages that are installed here.
    script = f"import sys, {names}; print([p for p in sys.path if 'site-packages' in p], nemo_bench.stage.__file__)"
    shown = subprocess.run(
        [sys.executable, "-S", "-c", script], env=environment, cwd=code, capture_output=True, text=True, check=True
    )
    assert shown.stdout.split() == ["[]", str(code / "nemo_bench/stage/__init__.py")]
    composed = subprocess.run(
        [sys.executable, "-S", str(code / "train.py"), "--cfg", "job", "scale=128gpu"],
        env=environment,
        cwd=code,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "num_nodes: 16" in composed.stdout


# --- what goes wrong ----------------------------------------------------------------------------------------


def test_no_enroot_does_not_keep_the_rest_from_being_done(setup: Setup) -> None:
    result = setup("enroot=enroot-of-nowhere", *LOCAL, "parts=[image,tokenizer]", code=2)
    for text in ("enroot-of-nowhere is not on this machine", "hydra/launcher=submitit_slurm", "bundle=FILE"):
        assert text in result.stderr
    assert set(setup.manifest()["parts"]) == {"tokenizer"}


def test_an_import_that_the_registry_refuses(setup: Setup) -> None:
    result = setup("parts=[image]", FAKE="unauthorized", code=2)
    assert "[INFO] Querying registry" in result.stderr  # as enroot said it
    for text in ("exit status 1", "  | [ERROR] URL", ".config/enroot/.credentials", "login $oauthtoken"):
        assert text in result.stderr
    assert not (setup.stage / IMAGE).exists() and setup.leftovers() == []


@pytest.mark.parametrize(
    ("args", "texts"),
    [
        (["parts=[imag]"], ["image, tokenizer, code"]),
        (["parts=[]"], ["image, tokenizer, code"]),
        (["image_gib=nan"], ["image_gib=nan: must be 0 or more"]),
        (["action=chek"], ["fill, check, pack, install"]),
        (["entrypoint.container=Nemo 25"], ["no image reference", "nvcr.io/nvidia/nemo:25.11"]),
        (["entrypoint.image=../x.sqsh"], ["entrypoint.image=../x.sqsh must lie inside the stage folder"]),
        (["pack"], ["bundle=stage.tar"]),
        (["install", "bundle=none.tar"], ["none.tar cannot be read: No such file"]),
    ],
)
def test_bad_input_gets_one_message(setup: Setup, args: list[str], texts: list[str]) -> None:
    result = setup(*args, code=2)
    for text in texts:
        assert text in result.stderr
    assert not setup.stage.exists()


@pytest.mark.parametrize(
    ("place", "args"),
    [
        ("file", []),
        ("file/stage", []),
        ("/proc/nemo", []),
        ("file", ["check"]),
        ("/proc/nemo", ["check"]),
        ("/proc/nemo", ["pack", "bundle=b.tar"]),
        ("file", ["install", "bundle=b.tar"]),
        ("/proc/nemo", ["launch=dry"]),
        ("file", ["hydra/launcher=submitit_slurm", "launch=dry"]),
        ("/proc/nemo", ["hydra/launcher=submitit_slurm"]),
    ],
)
def test_a_stage_path_that_is_no_folder(setup: Setup, place: str, args: list[str]) -> None:
    (setup.tmp_path / "file").write_text("mine")
    stage = str(setup.tmp_path / place)
    before = sorted(setup.tmp_path.rglob("*"))
    result = setup(*args, STAGE_PATH=stage, code=2)
    told = "is not a folder" if place == "file" else "cannot be made"
    assert result.stderr.startswith(f"{stage} {told}") and "\nSTAGE_PATH (or stage_path=...) must name" in result.stderr
    assert len(result.stderr.splitlines()) == 2 and result.stdout == ""
    assert sorted(setup.tmp_path.rglob("*")) == before


def test_space_is_looked_at_first(setup: Setup) -> None:
    result = setup("image_gib=9e9", *LOCAL, code=2)
    assert "not enough disk space; nothing was done" in result.stderr and "image_gib" in result.stderr
    assert not setup.stage.exists() and setup.enroot_calls() == []


def test_a_disk_that_gets_full(setup: Setup) -> None:
    setup.stage.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", setup.stage], check=False).returncode:
        pytest.skip("may not mount")
    try:
        assert "needed" in setup("parts=[tokenizer]", *LOCAL, code=2).stderr  # 40 MB are asked for
        result = setup("parts=[image]", "image_gib=0.001", FAKE="full", code=2)
        assert "a disk is full" in result.stderr and "ENROOT_CACHE_PATH" in result.stderr
        assert setup.leftovers() == []
        setup("parts=[image]", "image_gib=0.001")
    finally:
        subprocess.run(["umount", setup.stage], check=True)


# --- check --------------------------------------------------------------------------------------------------


def test_check_of_a_complete_folder(copied: Setup) -> None:
    with IndexedDatasetWriter(copied.stage / "llama3.1-dataset/my-llama_00_text_document", vocab_size=384) as writer:
        writer.extend(np.array([1, 2, 3], dtype=np.uint16), np.array([3]))
    before = copied.snapshot()
    result = copied("check", *LOCAL, COLUMNS="250")
    for text in ("nvcr.io/nvidia/nemo:25.11", "trained here, 384 tokens", "3 tokens", "no checksums", "4.1 kB"):
        assert text in result.stdout
    assert result.stderr == "" and copied.snapshot() == before


def test_check_names_what_is_missing_and_the_command_that_brings_it(copied: Setup) -> None:
    shutil.rmtree(copied.stage / TOKENIZER)
    (copied.stage / IMAGE).unlink()
    (copied.stage / "nemo_bench" / "train.py").unlink()
    result = copied("check", *LOCAL, "image_gib=0.001", code=2)
    commands = [line.strip() for line in result.stderr.splitlines() if line.startswith("  ")]
    assert len(commands) == 3 and "nemo_bench lacks nemo_bench/train.py" in result.stderr
    assert "not there" in result.stdout and "prepare_data.py" in result.stdout
    chosen = ["python", "setup_stage.py", *LOCAL, "image_gib=0.001"]
    assert [shlex.split(c) for c in commands] == [[*chosen, f"parts=[{p}]"] for p in ("code", "tokenizer", "image")]
    copied(*LOCAL, "image_gib=0.001")
    copied("check", *LOCAL)


def test_check_reads_contents(copied: Setup) -> None:
    """Same size, same date, another byte: only a check that reads it all can see that."""
    image = copied.stage / IMAGE
    change_in_place(image)
    result = copied("check", *LOCAL, code=2)
    assert f"{image} has changed since it was recorded" in result.stderr
    (command,) = [line.strip() for line in result.stderr.splitlines() if line.startswith("  ")]
    assert command.startswith(f"mv {image} {image}.old && python setup_stage.py ")


def change_in_place(path: Path) -> None:
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_check_reads_datasets_of_any_name(copied: Setup) -> None:
    prefix = copied.stage / "llama3.1-dataset" / "wiki.en_07_content_document"
    make_dataset(prefix, copied.stage / TOKENIZER)
    result = copied("check", *LOCAL, COLUMNS="250")
    (row,) = [line for line in result.stdout.splitlines() if "wiki.en_07" in line]
    assert " ok " in row and " tokens " in row and time.strftime("%Y-", time.gmtime()) in row
    # A token of the vocabulary still: only the checksum tells.
    change_in_place(Path(f"{prefix}.bin"))
    result = copied("check", *LOCAL, code=2)
    assert f"{prefix}.bin has changed since it was made" in result.stderr and "prepare_data.py" in result.stderr


# --- Hugging Face -------------------------------------------------------------------------------------------


def test_downloads_the_tokenizer(setup: Setup, hub: FileServer, filled: Setup) -> None:
    result = setup(*LLAMA_ONLY, HF_ENDPOINT=hub.endpoint, HF_TOKEN=GOOD_TOKEN)
    for name in FILES:
        assert (setup.stage / TOKENIZER / name).read_bytes() == (filled.stage / TOKENIZER / name).read_bytes()
    assert {path.name for path in (setup.stage / TOKENIZER).iterdir()} == FILES and setup.leftovers() == []
    entry = setup.manifest()["parts"]["tokenizer"][TOKENIZER]
    assert (entry["repo"], entry["revision"], entry["vocab_size"]) == (LLAMA, COMMIT, 384)
    # All files are of one commit, and the token goes to the hub alone.
    assert {request.path.split("/")[4] for request in hub.seen("GET") if "resolve" in request.path} == {COMMIT}
    (cdn,) = [request for request in hub.seen("GET") if request.path.startswith("/cdn/")]
    assert "authorization" not in cdn.headers
    count = len(hub.seen())
    assert "there already" in setup(*LLAMA_ONLY, HF_ENDPOINT=hub.endpoint).stdout
    assert len(hub.seen()) == count
    setup("check", *LLAMA_ONLY)

    result = setup("parts=[tokenizer]", *LOCAL, code=2)
    assert "not local" in result.stderr and "tokenizer.folder" in result.stderr


def test_the_token_appears_nowhere(setup: Setup, hub: FileServer) -> None:
    token = "hf_" + "secret" * 5
    results = [setup(*LLAMA_ONLY, HF_ENDPOINT=hub.endpoint, HF_TOKEN=token, code=2)]
    hub.script(
        f"/{LLAMA}/resolve/main/config.json",
        Twist(method="HEAD", status=302, headers={"Location": hub.url("/nowhere?token=signature")}),
    )
    results.append(setup(*LLAMA_ONLY, HF_ENDPOINT=hub.endpoint, HF_TOKEN=token, code=2))
    for result in results:
        assert token not in result.stdout + result.stderr
        assert "signature" not in result.stdout + result.stderr
    for path in setup.tmp_path.rglob("*"):
        assert not path.is_file() or token.encode() not in path.read_bytes()


def test_no_access_to_the_tokenizer(setup: Setup, hub: FileServer) -> None:
    result = setup(*LLAMA_ONLY, HF_ENDPOINT=hub.endpoint, code=2)
    for text in (f"https://huggingface.co/{LLAMA}", "licence", "take a day", "HF_TOKEN", "tokenizer=local"):
        assert text in result.stderr
    result = setup(*LLAMA_ONLY, HF_ENDPOINT=hub.endpoint, HF_TOKEN=UNGRANTED_TOKEN, code=2)
    assert "refused this token" in result.stderr and "take a day" in result.stderr
    assert not (setup.stage / TOKENIZER).exists() and setup.leftovers() == []


# --- kills and crowds ---------------------------------------------------------------------------------------


def test_killed_while_enroot_works(setup: Setup) -> None:
    """enroot may outlive a killed setup_stage.py: the next one waits for its end, and starts over."""
    first = setup.start("parts=[image]", FAKE="slow")
    setup.wait_for("started")
    first.kill()
    first.communicate()
    assert not (setup.stage / IMAGE).exists()
    second = setup.start("parts=[image]")
    assert second.stdout is not None
    assert "Waiting for another process that fills the part image" in second.stdout.readline()
    (setup.bin / "release").touch()
    out, err = second.communicate(timeout=60)
    assert second.returncode == 0, out + err
    assert len(setup.enroot_calls()) == 2 and setup.leftovers() == []
    setup("check", "parts=[image]")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_ended_while_enroot_works(setup: Setup, signum: int, code: int) -> None:
    process = setup.start("parts=[image]", FAKE="slow")
    setup.wait_for("started")
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in err
    assert setup.leftovers() == [] and not (setup.stage / IMAGE).exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int((setup.bin / "started").read_text()), 0)


def test_two_at_once_do_the_work_once(setup: Setup) -> None:
    args = (*LOCAL, "parts=[image,tokenizer]", "image_gib=0.001")
    first = setup.start(*args, FAKE="slow")
    setup.wait_for("started")
    second = setup.start(*args)
    (setup.bin / "release").touch()
    for process in (first, second):
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, out + err
    assert len(setup.enroot_calls()) == 1 and setup.leftovers() == []
    setup("check", *args)


def test_two_that_fill_different_parts_both_survive(setup: Setup) -> None:
    image = setup.start("parts=[image]", FAKE="slow")
    setup.wait_for("started")
    setup("parts=[tokenizer]", *LOCAL)  # does not wait for the image
    (setup.bin / "release").touch()
    image.communicate(timeout=60)
    assert set(setup.manifest()["parts"]) == {"image", "tokenizer"}


# --- as a Slurm job, with a stand-in of sbatch --------------------------------------------------------------

SUBMIT = ("hydra/launcher=submitit_slurm", "parts=[image]", "image_gib=0.001")


@pytest.fixture
def login_node(setup: Setup) -> Setup:
    """Where jobs are submitted."""
    setup.put("sbatch", SBATCH)
    setup.put("squeue", SQUEUE)
    setup.put("sacct", "#!/bin/sh\n")
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
    login_node(
        *SUBMIT,
        "enroot=bin/enroot",
        "bundle='out, =.tar'",
        *([f"stage_path='{quoted}'"] if given == "override" else []),
        STAGE_PATH={"absolute": str(stage), "relative": name}.get(given, "/nowhere"),
    )
    (script,) = scripts(stage)
    done = subprocess.run(["env", "-i", "bash", script], cwd=elsewhere, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (stage / IMAGE).read_bytes() == squashfs() and list(elsewhere.iterdir()) == []
    assert (login_node.tmp_path / "out, =.tar").exists()
    assert json.loads((script.parent / "exit.json").read_text())["exit_code"] == 0


def test_two_submissions_at_once(login_node: Setup) -> None:
    processes = [login_node.start(*SUBMIT) for _ in range(4)]
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, out + err
    assert len(scripts(login_node.stage)) == 4
    assert sorted(path.name for path in login_node.stage.iterdir()) == ["results.stage_setup"]


def test_a_dry_submission_leaves_nothing(login_node: Setup) -> None:
    temporary = login_node.tmp_path / "tmp"
    temporary.mkdir()
    result = login_node(*SUBMIT, "launch=dry", TMPDIR=str(temporary))
    assert f"stage_path={login_node.stage}" in shlex.split(
        next(line for line in result.stdout.splitlines() if "setup_stage.py" in line)
    )
    assert "sbatch --test-only: accepted" in result.stdout and "nothing was submitted" in result.stdout
    assert not login_node.stage.exists() and list(temporary.iterdir()) == []


def test_jobs_knows_what_cannot_be_resubmitted(login_node: Setup) -> None:
    login_node(*SUBMIT)
    (script,) = scripts(login_node.stage)
    job_id = json.loads((script.parent / "job.json").read_text())["id"]
    assert job_id in login_node(script="jobs.py").stdout
    result = login_node("resubmit", job_id, script="jobs.py", code=2)
    command = f"python {login_node.project / 'setup_stage.py'} {shlex.join(SUBMIT)}"
    assert result.stderr.splitlines() == [
        f"job {job_id} (nemo-bench-setup-stage-fill) is not a run of train.py: the same command again does what is "
        "still missing",
        f"  {command}",
    ]


# --- bundles ------------------------------------------------------------------------------------------------


def test_from_one_cluster_to_another(copied: Setup, project: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    args = ("parts=[image,tokenizer]", *LOCAL, f"bundle={copied.tmp_path / 'stage.tar.zst'}")
    prefix = "llama3.1-dataset/my-llama_00_text_document"
    make_dataset(copied.stage / prefix, copied.stage / TOKENIZER)
    assert "packed 9 files" in copied("pack", *args).stdout
    setup = Setup(project, tmp_path_factory.mktemp("other"))
    assert "installed 9 of 9 files" in setup("install", *args).stdout
    assert read_manifest(setup.stage / prefix) is not None
    assert setup.enroot_calls() == [] and setup.leftovers() == []
    setup("check", *args[:-1])
    before = setup.snapshot()
    assert "is there already" in setup(*args).stdout  # the file is there: install
    assert setup.snapshot() == before


def test_a_bundle_brings_the_program_that_installs_it(filled: Setup, setup: Setup) -> None:
    """A cluster with a Python and nothing installed in it."""
    bundle = setup.tmp_path / "stage.tar"
    filled(f"bundle={bundle}", *LOCAL)  # the file is not there: fill, then pack
    subprocess.run(["tar", "xf", bundle, "nemo_bench"], cwd=setup.tmp_path, check=True)
    for args in (["install", f"bundle={bundle}"], ["check", *LOCAL]):
        shown = subprocess.run(
            [sys.executable, "-S", "nemo_bench/setup_stage.py", *args],
            cwd=setup.tmp_path,
            env={"PYTHONPATH": "nemo_bench/vendor", "STAGE_PATH": str(setup.stage), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert shown.returncode == 0, shown.stdout + shown.stderr


def test_what_is_incomplete_is_not_packed(copied: Setup) -> None:
    (copied.stage / IMAGE).unlink()
    result = copied("pack", "bundle=stage.tar", *LOCAL, code=2)
    assert "cannot be packed" in result.stderr and "parts=[image]" in result.stderr
    assert not (copied.tmp_path / "stage.tar").exists()


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
