"""`python prepare_data.py` as a user runs it: downloads that break, kills, company, full disks, bad files."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from backports import zstd

from benchmarks.fork_server import ForkServer
from nemo_bench.data.corpus import collect
from nemo_bench.data.indexed_dataset import bin_path, idx_path
from tests.conftest import PROJECT, started
from tests.httpserver import FileServer
from tests.integration.conftest import wait_for


class Stage:
    """A stage folder with a tokenizer, and the command on it."""

    def __init__(self, folder: Path, tokenizer: Path, scripts: ForkServer) -> None:
        self.folder, self.scripts = folder, scripts
        self.data = folder / "llama3.1-dataset"
        shutil.copytree(tokenizer, self.data / "llama")
        env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "HYDRA_", "HF_"))}
        self.environment = {**env, "STAGE_PATH": str(folder), "HF_HUB_OFFLINE": "1"}

    def command(self, *overrides: str) -> list[str]:
        return [sys.executable, str(PROJECT / "prepare_data.py"), *overrides]

    def start(self, *overrides: str) -> subprocess.Popen[str]:
        return started(self.command(*overrides), self.folder, self.environment)

    def run(self, *overrides: str, code: int = 0) -> str:
        """What it printed; its exit status must be `code`."""
        done = self.scripts.run(self.command(*overrides), cwd=self.folder, env=self.environment)
        output = done.stdout + done.stderr
        assert done.returncode == code, output
        assert "Traceback" not in output
        return output

    def prefix(self, number: int = 0) -> Path:
        return self.data / f"my-llama_{number:02d}_text_document"

    def dataset(self, number: int = 0) -> tuple[bytes, bytes]:
        return bin_path(self.prefix(number)).read_bytes(), idx_path(self.prefix(number)).read_bytes()

    def leftovers(self) -> list[str]:
        """Files that are neither a dataset nor a download nor a lock."""
        names = [path.name for path in self.data.iterdir()]
        return [name for name in names if name.startswith(".") and not name.endswith(".lock")]


@pytest.fixture
def stage(tmp_path: Path, small_tokenizer: Path, scripts: ForkServer) -> Stage:
    (tmp_path / "stage").mkdir()
    return Stage(tmp_path / "stage", small_tokenizer, scripts)


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer() as server:
        yield server


@pytest.fixture(scope="module")
def shards() -> list[bytes]:
    """Two shards of real text, as JSON Lines."""
    texts = list(collect(3_000_000).values())
    halves = (texts[::2], texts[1::2])
    return ["".join(json.dumps({"text": text}) + "\n" for text in half).encode() for half in halves]


@pytest.fixture(scope="module")
def expected(
    shards: list[bytes], small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory, scripts: ForkServer
) -> Stage:
    """The datasets of both shards, made from plain files in one go."""
    stage = Stage(tmp_path_factory.mktemp("expected"), small_tokenizer, scripts)
    for number, data in enumerate(shards):
        (stage.folder / f"{number}.jsonl").write_bytes(data)
    stage.run("sources=[0.jsonl,1.jsonl]")
    return stage


def serve(server: FileServer, shards: list[bytes], piece_bytes: int = 65536, pause_s: float = 0.0) -> str:
    """Both shards as the Pile's are served; returns the `url` override."""
    for number, data in enumerate(shards):
        server.put(f"/train/{number:02d}.jsonl.zst", zstd.compress(data), piece_bytes, pause_s)
    return f"url='{server.url('/train/')}{{shard:02d}}.jsonl.zst'"


def test_the_recipes_dataset(stage: Stage, server: FileServer, shards: list[bytes], expected: Stage) -> None:
    url = serve(server, shards)
    out = stage.run(url)
    assert [stage.dataset(0), stage.dataset(1)] == [expected.dataset(0), expected.dataset(1)]
    assert "made, read back and verified" in out and "2 datasets" in out and "train.py data=pile" in out
    manifest = json.loads(Path(f"{stage.prefix()}.json").read_bytes())
    assert manifest["inputs"]["source"].endswith("/00.jsonl.zst") and manifest["encoder"] == "gigatoken"
    validation = round(0.01 * manifest["documents"])
    train = manifest["documents"] - validation
    assert f"data.split=99,1,0 gives {train:,} to train, {validation} to validation, 0 to test" in out

    requests = len(server.requests)
    out = stage.run(url, "data.split='9999,1,0'")
    assert "made before" in out and len(server.requests) == requests and stage.leftovers() == []
    assert "train.py refuses that, since validation would get none" in out
    assert stage.run("check", url, "shards=[0]").count(": whole (from ") == 2  # all that are in the folder

    with open(bin_path(stage.prefix(1)), "r+b") as file:
        file.seek(1000)
        file.write(b"\0\1")
    out = stage.run("check", url, code=2)
    assert "my-llama_01_text_document.bin has changed since it was made" in out and "1 missing or damaged:" in out


@pytest.mark.parametrize("downloading", [True, False])
def test_killed_at_any_moment(
    stage: Stage, server: FileServer, shards: list[bytes], expected: Stage, downloading: bool
) -> None:
    """SIGKILL: what is left is finished, or not there at all, and the next command completes it."""
    (stage.folder / "0.jsonl").write_bytes(shards[0])
    source = serve(server, shards, 20_000, 0.02) if downloading else "sources=[0.jsonl]"
    started = time.monotonic()
    stage.run(source, "shards=[0]")
    whole_s, moments = time.monotonic() - started, random.Random(7)
    for _ in range(12):
        shutil.rmtree(stage.data / "downloads", ignore_errors=True)
        for suffix in (".idx", ".json", ".bin"):
            Path(f"{stage.prefix()}{suffix}").unlink(missing_ok=True)
        process = stage.start(source, "shards=[0]")
        time.sleep((1 + whole_s) * moments.uniform(0.3, 1.0))
        process.kill()
        process.communicate()
        if idx_path(stage.prefix()).exists():
            assert stage.dataset() == expected.dataset()
        stage.run(source, "shards=[0]")
        assert stage.dataset() == expected.dataset() and stage.leftovers() == []


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_nothing_half_made_is_left(stage: Stage, signum: signal.Signals) -> None:
    (stage.folder / "a.jsonl").write_text((json.dumps({"text": "some words, " * 5000}) + "\n") * 1000)
    process = stage.start("sources=[a.jsonl]", "encoder=tokenizers")  # takes a minute
    wait_for(lambda: stage.leftovers(), "a half-written dataset")
    process.send_signal(signum)
    _, err = process.communicate(timeout=30)
    assert stage.leftovers() == [] and process.returncode == 128 + signum
    assert "the same command continues from here" in err


def test_two_at_once(stage: Stage, server: FileServer, shards: list[bytes], expected: Stage) -> None:
    url = serve(server, shards)
    both = [stage.start(url), stage.start(url)]
    outs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], outs
    assert [stage.dataset(0), stage.dataset(1)] == [expected.dataset(0), expected.dataset(1)]
    assert len(server.seen("GET", "/train/00.jsonl.zst")) == 1 and stage.leftovers() == []


def test_secrets_in_urls_stay_out_of_records(stage: Stage, server: FileServer) -> None:
    server.put("/x.jsonl", b'{"text": "a"}\n')
    url = server.url("/x.jsonl").replace("http://", "http://user:passw0rd@") + "?signature=s3cret"
    said = stage.run(f"sources=['{url}']") + stage.run("check", f"sources=['{url}']") + stage.run(f"sources=['{url}']")
    said += stage.run(f"sources=['{url}']", "launch=dry")
    assert "made before" in said and "exists already" in said
    said += "".join(path.read_bytes().decode("latin-1") for path in stage.folder.rglob("*") if path.is_file())
    assert "passw0rd" not in said and "s3cret" not in said
    other = url.replace("s3cret", "another")
    assert "made from something else (source:" in stage.run(f"sources=['{other}']", code=2)


def test_another_source_or_tokenizer_is_noticed(stage: Stage) -> None:
    source = stage.folder / "a.jsonl"
    source.write_text('{"text": "one"}\n')
    stage.run("sources=[a.jsonl]")
    os.utime(source, ns=(1, 1))
    assert "made before" in stage.run("sources=[a.jsonl]")  # the same bytes
    source.write_text('{"text": "two"}\n')
    assert "was made from something else (source_mtime_ns" in stage.run("sources=[a.jsonl]", code=2)
    stage.run("sources=[a.jsonl]", "overwrite=true")
    path = stage.data / "llama" / "tokenizer.json"
    tokenizer = path.read_bytes()
    path.write_bytes(tokenizer + b"\n")
    assert "was made from something else (tokenizer_sha256:" in stage.run("sources=[a.jsonl]", code=2)
    path.write_bytes(tokenizer)
    Path(f"{stage.prefix()}.json").write_text('{"format": "nemo-bench dataset"}')
    for verb in ("check", "prepare"):
        assert "does not describe a dataset, or is damaged" in stage.run(verb, "sources=[a.jsonl]", code=2)
    Path(f"{stage.prefix()}.json").unlink()
    assert "was not made by prepare_data.py" in stage.run("sources=[a.jsonl]", code=2)
    stage.run("sources=[a.jsonl]", "overwrite=true")
    source.unlink()
    assert "made before" in stage.run("sources=[a.jsonl]")  # no longer needed


def test_sources_of_every_kind(stage: Stage, server: FileServer, shards: list[bytes]) -> None:
    import pyarrow
    import pyarrow.parquet

    texts = [json.loads(line)["text"] for line in shards[0].splitlines()]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), stage.folder / "a.parquet")
    (stage.folder / "b.jsonl").write_bytes(shards[0])
    for path in ("/c/c.jsonl.zst", "/d/c.jsonl.zst"):
        server.put(path, zstd.compress(shards[0]))
    urls = [server.url("/c/c.jsonl.zst"), server.url("/d/c.jsonl.zst")]
    out = stage.run(f"sources=[a.parquet,b.jsonl,{','.join(urls)}]")
    assert stage.dataset(0) == stage.dataset(1) == stage.dataset(2) == stage.dataset(3)
    assert "data.paths=[" in out and "data.weights=[]" in out


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk takes root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk(
    small_disk: Path, small_tokenizer: Path, scripts: ForkServer, shards: list[bytes], tmp_path: Path
) -> None:
    stage = Stage(small_disk, small_tokenizer, scripts)
    source = tmp_path / "0.jsonl"
    source.write_bytes(shards[0] * 3)
    out = stage.run(f"sources=[{source}]", code=2)
    assert "No space left in" in out and "free it, and run the same command again" in out
    assert stage.leftovers() == []
    subprocess.run(["mount", "-o", "remount,size=60m", str(small_disk)], check=True)
    stage.run(f"sources=[{source}]")


def test_bad_documents(stage: Stage) -> None:
    good = json.dumps({"text": "a good document"}) + "\n"
    (stage.folder / "a.jsonl").write_text(good * 5 + '{"text": "broken\n' + good * 4 + '{"body": "none"}\n')
    out = stage.run("sources=[a.jsonl]", code=2)
    for words in ("2 of 11 documents", "1 x broken JSON", "line 6: broken JSON", "line 11: no 'text'", "max_bad_share"):
        assert words in out
    assert not bin_path(stage.prefix()).exists()
    out = stage.run("sources=[a.jsonl]", "max_bad_share=0.2")
    assert "9 documents" in out and "left out: 1 x broken JSON, 1 x no 'text'" in out


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["shards=[]"], ["there is nothing to prepare"]),
        (["shards=[-1]"], ["shards=-1", "must be at least 0"]),
        (["sources=[missing.jsonl]"], ["not found: ", "missing.jsonl"]),
        (["sources=[a.txt]"], [".jsonl.zst, .jsonl.gz, .parquet"]),
        (["url=http://127.0.0.1:9/x.jsonl"], ["must hold {shard}"]),
        (["max_bad_share=2"], ["max_bad_share=2.0", "must be at least 0 and at most 1"]),
        (["text_key="], ["text_key=", "not empty"]),
        (["encoder=fast"], ["auto, tokenizers"]),
        (["shard=1"], ["unknown key: shard", "did you mean: shards"]),
        (["tokenizer_folder=none"], ["There is no tokenizer", "setup_stage.py"]),
        (["data.split='nan,1,0'"], ["data.split=nan,1,0: must be three numbers"]),
        (["chek"], ["not a verb", "check"]),
        (["check", "hydra/launcher=submitit_slurm"], ["needs no job"]),
        (["hydra/launcher=submitit_slurm", "cluster.time=abc"], ["cluster.time=abc", "such as 90 (minutes)"]),
    ],
)
def test_bad_input(stage: Stage, overrides: list[str], words: list[str]) -> None:
    out = stage.run(*overrides, code=2)
    assert all(word in out for word in words), out
    assert sorted(path.name for path in stage.folder.iterdir()) == ["llama3.1-dataset"]


def test_dry(stage: Stage) -> None:
    out = stage.run("launch=dry")
    assert "monology/pile-uncopyrighted/resolve/main/train/01.jsonl.zst" in out and "nothing was started" in out
    out = stage.run("launch=dry", "hydra/launcher=submitit_slurm")
    assert out.count("#SBATCH --job-name=nemo-bench-my-llama_0") == 2 and "nothing was submitted" in out
    assert sorted(path.name for path in stage.folder.iterdir()) == ["llama3.1-dataset"]


def test_mock_and_local(stage: Stage) -> None:
    assert "nothing to prepare" in stage.run("data=mock")
    assert "does not exist" in stage.run("check", "data=local", "data.corpus_bytes=300000", code=2)
    assert "documents" in stage.run("data=local", "data.corpus_bytes=300000")
    assert ": whole" in stage.run("check", "data=local", "data.corpus_bytes=300000")
    assert len(list((stage.folder / "data").glob("local-*/my-llama_00_text_document.json"))) == 1
