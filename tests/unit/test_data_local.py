"""The local dataset: what it holds, when it is built again, and that neither kills nor crowds damage it."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nemo_bench.data import corpus, local, tokenizer
from nemo_bench.data.indexed_dataset import inspect
from nemo_bench.data.local import DATASET_NAME, MANIFEST_NAME, PreparedDataset, prepare_local
from nemo_bench.errors import BenchError

ROOT = Path(__file__).resolve().parents[2]
VOCAB = 400
SMALLER = 300
BYTES = 60_000


class Lines(list[str]):
    """A `report` that keeps its lines."""

    def __call__(self, line: str) -> None:
        self.append(line)


def prepare(folder: Path, **changes: int) -> tuple[PreparedDataset, Lines]:
    """Prepare a tiny dataset; returns it and the lines reported."""
    lines = Lines()
    sizes = {"vocab_size": VOCAB, "corpus_bytes": BYTES} | changes
    return prepare_local(folder, report=lines, **sizes), lines


def contents(folder: Path) -> dict[str, bytes]:
    """All files below `folder`."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def is_good(prepared: PreparedDataset) -> bool:
    """Whether what is on disk agrees with `prepared`, token by token."""
    info = inspect(prepared.prefixes[0], vocab_size=prepared.vocab_size, read_tokens=True)
    return (info.documents, info.tokens) == (prepared.documents, prepared.tokens)


def load_prepared(folder: Path) -> PreparedDataset:
    """What stands in `folder`, which must be whole, whatever it was made from."""
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    found = local._verify(folder, folder, manifest["inputs"])
    assert isinstance(found, PreparedDataset), found
    return found


def leftovers(folder: Path) -> list[str]:
    """What lies beside `folder` besides its lock file."""
    names = (path.name for path in folder.parent.iterdir())
    return sorted(name for name in names if name not in (folder.name, f".{folder.name}.lock"))


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A made-up standard library of 40 short modules, in place of this Python's."""
    root = tmp_path / "library"
    for number in range(40):
        module = root / f"package{number % 4}" / f"module{number}.py"
        module.parent.mkdir(parents=True, exist_ok=True)
        module.write_text(f'"""Module number {number}, in words."""\n\ndef answer():\n    return {number}\n' * 8)
    monkeypatch.setattr(corpus, "library_folder", lambda: root)
    monkeypatch.setattr(corpus, "MINIMUM_BYTES", 1000)
    return root


@pytest.fixture
def prepared(tmp_path: Path, library: Path) -> PreparedDataset:
    """A dataset of the made-up library, in tmp_path/data."""
    return prepare(tmp_path / "data")[0]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make each attempt to connect to somewhere fail the test."""

    def refuse(*_: object) -> None:
        pytest.fail("tried to use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


# --- corpus ---


def test_corpus_is_library_text() -> None:
    files = corpus.collect(1_500_000)
    size = sum(len(file.data) for file in files)
    assert 1_500_000 <= size < 2_000_000
    assert files == corpus.collect(1_500_000)
    fewer = corpus.collect(10_000)
    assert files[: len(fewer)] == fewer
    for file in files:
        parts = file.name.split("/")
        assert not {"test", "tests", "idle_test", "site-packages", "encodings", "__pycache__"} & set(parts)
        assert file.name.endswith(".py") and file.text.strip() and not file.name.startswith("/")
    # The order mixes packages: neither end is of one.
    assert len({file.name.split("/")[0] for file in files[-10:]}) > 3


def test_corpus_leaves_out_what_is_not_text(tmp_path: Path) -> None:
    good = ["a.py", "json/decoder.py", "latest/contest.py"]
    bad = [
        "test/test_a.py",
        "lib2to3/tests/data.py",
        "site-packages/x.py",
        "encodings/cp437.py",
        "html/entities.py",
        "_sysconfigdata__linux_.py",
        "config-3.11-x86_64-linux-gnu/python-config.py",
        "__pycache__/a.py",
        "a.txt",
    ]
    for name in good + bad:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n" * 200_000)
    (tmp_path / "empty.py").write_text("\n")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    (tmp_path / "dangling.py").symlink_to(tmp_path / "nowhere")
    assert sorted(file.name for file in corpus.collect(10**9, root=tmp_path)) == good


def test_too_little_text(tmp_path: Path, library: Path) -> None:
    with pytest.raises(BenchError, match="at least 1 byte"):
        prepare(tmp_path / "data", corpus_bytes=0)
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "a.py").write_text("x = 1\n")
    with pytest.raises(BenchError, match=r"holds only 6 bytes .* Install the whole library"):
        corpus.collect(10**6, root=tmp_path / "small")


# --- products ---


def test_result(prepared: PreparedDataset, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    assert prepared.prefixes == (folder / "my-llama_00_text_document",)
    assert prepared.tokenizer_dir == folder / "tokenizer"
    assert prepared.documents == 40 and not prepared.cached and is_good(prepared)
    assert leftovers(folder) == ["library"]


def test_result_for_this_python(tmp_path: Path) -> None:
    """The real library; the only test in this process that depends on it besides that of the corpus."""
    prepared, lines = prepare(tmp_path / "data")
    assert prepared.vocab_size == VOCAB and is_good(prepared)
    assert "Preparing" in lines[0] and "Prepared" in lines[-1] and not any("\n" in line for line in lines)
    again, lines = prepare(tmp_path / "data")
    assert again.cached and again.fingerprint == prepared.fingerprint and lines == []


def test_tokenizer_and_tokens(tmp_path: Path, no_network: None) -> None:
    transformers = pytest.importorskip("transformers")
    prepared, _ = prepare(tmp_path / "data")
    auto = transformers.AutoTokenizer.from_pretrained(prepared.tokenizer_dir)
    assert auto.is_fast and len(auto) == prepared.vocab_size == VOCAB
    assert (auto.bos_token, auto.eos_token) == (tokenizer.BOS_TOKEN, tokenizer.EOS_TOKEN)
    assert auto.vocab_size == VOCAB - 2 and {auto.bos_token_id, auto.eos_token_id} == {VOCAB - 2, VOCAB - 1}
    # As Llama's own does, it begins a text with bos when asked for special tokens.
    assert auto("a").input_ids[0] == auto.bos_token_id

    text = "def naïve(x):\r\n\tif x  ==  12345: return '\u4f60\u597d' # I'll\n\n\n   "
    assert auto.decode(auto(text, add_special_tokens=False).input_ids) == text

    ids = np.fromfile(f"{prepared.prefixes[0]}.bin", dtype=np.uint16)
    ends = np.flatnonzero(ids == auto.eos_token_id)
    files = corpus.collect(BYTES)
    assert len(ends) == len(files) == prepared.documents
    for file, document in zip(files, np.split(ids, ends + 1), strict=False):
        assert auto.decode(document[:-1]) == file.text


def test_tokenizer_in_nemo(prepared: PreparedDataset, no_network: None) -> None:
    module = pytest.importorskip("nemo.collections.common.tokenizers.huggingface.auto_tokenizer")
    auto = module.AutoTokenizer(pretrained_model_name=str(prepared.tokenizer_dir), use_fast=True)
    size = prepared.vocab_size
    assert (auto.vocab_size, auto.bos_id, auto.eos_id, auto.eod) == (size, size - 2, size - 1, size - 1)
    ids = auto.text_to_ids("return 1")
    assert auto.bos_id not in ids and auto.ids_to_text(ids) == "return 1"


def test_same_inputs_give_same_bytes(tmp_path: Path, library: Path) -> None:
    prepare(tmp_path / "a")
    prepare(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_small_corpus_gives_fewer_tokens(tmp_path: Path, library: Path) -> None:
    prepared, lines = prepare(tmp_path / "data", vocab_size=20_000)
    assert prepared.vocab_size < 20_000 and is_good(prepared)
    assert any("too small for 20,000 tokens" in line for line in lines)


def test_vocabulary_too_small(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="257 tokens is too small"):
        prepare(tmp_path / "data", vocab_size=257)
    assert list(tmp_path.iterdir()) == []


# --- caching ---


def test_second_call_finds_it(prepared: PreparedDataset, tmp_path: Path) -> None:
    before = contents(tmp_path / "data")
    again, lines = prepare(tmp_path / "data")
    assert again == PreparedDataset(**{**vars(prepared), "cached": True}) and lines == []
    assert load_prepared(tmp_path / "data") == again
    assert contents(tmp_path / "data") == before


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        (f"{DATASET_NAME}.bin", truncate, "bytes instead of"),
        (f"{DATASET_NAME}.bin", flip, "has changed"),
        (f"{DATASET_NAME}.bin", Path.unlink, "is missing"),
        (f"{DATASET_NAME}.idx", truncate, "bytes instead of"),
        ("tokenizer/tokenizer.json", flip, "has changed"),
        ("tokenizer/tokenizer_config.json", Path.unlink, "is missing"),
        (MANIFEST_NAME, truncate, "dataset.json is damaged"),
    ],
)
def test_damage_is_mended(
    prepared: PreparedDataset, tmp_path: Path, name: str, damage: Callable[[Path], None], reason: str
) -> None:
    folder = tmp_path / "data"
    good = contents(folder)
    damage(folder / name)
    again, lines = prepare(folder)
    assert not again.cached and reason in lines[0]
    assert contents(folder) == good and leftovers(folder) == ["library"]


def test_damaged_manifests(prepared: PreparedDataset, tmp_path: Path) -> None:
    path = tmp_path / "data" / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    for key, value, reason in [
        ("version", 99, "format version 99"),
        ("tokens", "many", "damaged"),
        ("products", [], "damaged"),
        ("products", {}, "has changed"),
        ("fingerprint", None, "damaged"),
    ]:
        path.write_text(json.dumps(manifest | {key: value}))
        again, lines = prepare(tmp_path / "data")
        assert not again.cached and reason in lines[0]


def test_changed_inputs(
    prepared: PreparedDataset, tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data"
    other, lines = prepare(folder, vocab_size=SMALLER)
    assert other.fingerprint != prepared.fingerprint and "other tokenizer settings" in lines[0]
    assert is_good(other) and other.vocab_size < prepared.vocab_size

    (library / "package0" / "module0.py").write_text("x = 'something else'\n")
    changed, lines = prepare(folder, vocab_size=SMALLER)
    assert changed.fingerprint != other.fingerprint and "from other text" in lines[0] and is_good(changed)

    monkeypatch.setattr("platform.python_version", lambda: "3.99.0")
    newer, lines = prepare(folder, vocab_size=SMALLER)
    assert not newer.cached and "3.99.0" in lines[0]
    assert prepare(folder, vocab_size=SMALLER)[0].cached
    assert leftovers(folder) == ["library"]


def test_rebuilding_drops_megatrons_index_cache(prepared: PreparedDataset, tmp_path: Path) -> None:
    cache = prepared.prefixes[0] / "cache" / "GPTDataset_indices"
    cache.mkdir(parents=True)
    (cache / "old.npy").write_bytes(b"indices of the old data")
    assert prepare(tmp_path / "data")[0].cached and cache.exists()
    assert not prepare(tmp_path / "data", vocab_size=SMALLER)[0].cached and not cache.exists()


# --- other people's files ---


@pytest.mark.parametrize("name", ["thesis.tex", f"{DATASET_NAME}.bin"])
def test_a_folder_of_the_users_is_left_alone(tmp_path: Path, library: Path, name: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / name).write_text("years of work")
    with pytest.raises(BenchError, match=f"not of a local dataset \\({name}\\).*choose another folder"):
        prepare(folder)
    assert contents(folder) == {name: b"years of work"} and leftovers(folder) == ["library"]


@pytest.mark.parametrize("text", [b'{"format": "theirs"}', b"[1]", b"not json", b""])
def test_another_programs_dataset_json_is_left_alone(tmp_path: Path, library: Path, text: bytes) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / MANIFEST_NAME).write_bytes(text)
    with pytest.raises(BenchError, match="left alone"):
        prepare(folder)
    assert contents(folder) == {MANIFEST_NAME: text}


def test_the_users_file_in_our_folder_is_not_deleted(prepared: PreparedDataset, tmp_path: Path) -> None:
    (tmp_path / "data" / "notes.txt").write_text("mine")
    with pytest.raises(BenchError, match=r"notes\.txt"):
        prepare(tmp_path / "data", vocab_size=SMALLER)
    assert (tmp_path / "data" / "notes.txt").read_text() == "mine"
    assert prepare(tmp_path / "data")[0].cached


def test_an_empty_folder_and_a_link_to_one_are_used(tmp_path: Path, library: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "data").symlink_to("real")
    prepared, _ = prepare(tmp_path / "data")
    assert prepared.prefixes[0].parent == tmp_path / "data" and (tmp_path / "data").is_symlink()
    assert is_good(prepared) and prepare(tmp_path / "real")[0].cached


def test_a_relative_folder_gives_absolute_paths(tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    prepared, _ = prepare(Path("new/parent/data"))
    assert prepared.tokenizer_dir == tmp_path / "new/parent/data/tokenizer"


# --- disks that refuse ---


def test_a_file_in_the_way(tmp_path: Path, library: Path) -> None:
    (tmp_path / "data").write_text("a file")
    with pytest.raises(BenchError, match="data is not a folder"):
        prepare(tmp_path / "data")
    with pytest.raises(BenchError, match="data"):
        prepare(tmp_path / "data" / "inside")


def test_unwritable_file_system(library: Path) -> None:
    """/proc refuses new folders even to root."""
    with pytest.raises(BenchError, match=r"/proc/nowhere/data: .* Choose a folder"):
        prepare(Path("/proc/nowhere/data"))


def test_reading_needs_no_right_to_write(
    prepared: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / ".data.building-1-0").mkdir()
    monkeypatch.setattr("fcntl.flock", refuse)
    assert prepare(tmp_path / "data")[0].cached


@pytest.mark.parametrize("call", [1, 3, 4, 6])
def test_full_disk(tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    calls = 0

    def fsync(_: int) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fsync)
    with pytest.raises(BenchError, match=r"No space left .*data.*: free \d+ MB .*another disk"):
        prepare(tmp_path / "data")
    assert leftovers(tmp_path / "data") == ["library"] and not (tmp_path / "data").exists()


def test_failure_keeps_the_old_dataset(
    prepared: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = contents(tmp_path / "data")
    rename = os.rename

    def fail(source: Path, target: Path) -> None:
        if ".building-" in str(source):
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr("os.rename", fail)
    with pytest.raises(BenchError, match="Input/output error"):
        prepare(tmp_path / "data", vocab_size=SMALLER)
    assert contents(tmp_path / "data") == good and leftovers(tmp_path / "data") == ["library"]


def test_file_system_without_locks(tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(BenchError, match="does not support file locks"):
        prepare(tmp_path / "data")


def test_mount_point(tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == tmp_path / "data")
    with pytest.raises(BenchError, match=r"mount point.*data/local"):
        prepare(tmp_path / "data")


# --- kills and crowds ---

# Prepares the dataset; kills itself with SIGKILL at a chosen call of os.fsync, os.replace, os.rename, report
# or shutil.rmtree.
CHILD = """
import os, shutil, signal, sys
from pathlib import Path
from nemo_bench.data import local
folder, vocab_size, kill_at, corpus_bytes = sys.argv[1:]
what, _, number = kill_at.partition(":")
left = int(number or 0)
def killing(function):
    def wrapper(*arguments, **options):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return wrapper
report = lambda line: print(line, flush=True)
if what == "report":
    report = killing(report)
elif what == "rmtree":
    shutil.rmtree = killing(shutil.rmtree)
elif what:
    setattr(os, what, killing(getattr(os, what)))
sizes = {"vocab_size": int(vocab_size), "corpus_bytes": int(corpus_bytes)}
done = local.prepare_local(Path(folder), report=report, **sizes)
print("cached" if done.cached else "built", done.tokens, flush=True)
"""


def child(folder: Path, vocab_size: int = VOCAB, kill_at: str = "", size: int = BYTES) -> subprocess.Popen[str]:
    """Start a process that prepares the dataset of this Python's own library."""
    arguments = [str(folder), str(vocab_size), kill_at, str(size)]
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    "kill_at",
    [
        "report:1",
        "report:2",
        "report:3",
        "report:4",
        "fsync:2",
        "replace:1",
        "replace:2",
        "fsync:6",
        "rename:1",
    ],
)
def test_killed_while_building(tmp_path: Path, kill_at: str) -> None:
    folder = tmp_path / "data"
    process = child(folder, kill_at=kill_at)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    # The last report comes after the rename; at all other moments there is nothing that looks finished.
    assert folder.exists() == (kill_at == "report:4")
    prepared, _ = prepare(folder)
    assert prepared.cached == (kill_at == "report:4")
    assert is_good(prepared) and leftovers(folder) == []


@pytest.mark.parametrize(
    ("kill_at", "remains"), [("report:2", "old"), ("rename:1", "old"), ("rename:2", ""), ("rmtree:1", "new")]
)
def test_killed_while_replacing(tmp_path: Path, kill_at: str, remains: str) -> None:
    folder = tmp_path / "data"
    old, _ = prepare(folder)
    process = child(folder, vocab_size=SMALLER, kill_at=kill_at)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert folder.exists() == bool(remains) and leftovers(folder)
    if remains:
        assert load_prepared(folder).vocab_size == (VOCAB if remains == "old" else SMALLER)
    prepared, _ = prepare(folder, vocab_size=SMALLER)
    assert prepared.cached == (remains == "new") and prepared.fingerprint != old.fingerprint
    assert is_good(prepared) and leftovers(folder) == []


def test_killed_at_a_moment_of_the_clocks_choice(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    for _ in range(3):
        process = child(folder, size=1_000_000)
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.05)
        process.kill()
        process.communicate(timeout=60)
        assert not folder.exists()
    assert is_good(prepare(folder)[0]) and leftovers(folder) == []


def test_two_processes_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    processes = [child(folder, size=300_000) for _ in range(2)]
    results = [process.communicate(timeout=60) for process in processes]
    outputs = [output.splitlines() for output, _ in results]
    assert [process.returncode for process in processes] == [0, 0], results
    assert sorted(output[-1].split()[0] for output in outputs) == ["built", "cached"]
    assert len({output[-1].split()[1] for output in outputs}) == 1
    assert is_good(load_prepared(folder)) and leftovers(folder) == []


def test_waiting_for_the_lock(tmp_path: Path) -> None:
    """One process builds; another says that it waits, and takes over when the first is killed."""
    folder = tmp_path / "data"
    first = child(folder, size=3_000_000)
    assert first.stdout is not None and "Preparing" in first.stdout.readline()
    first.send_signal(signal.SIGSTOP)
    second = child(folder)
    assert second.stdout is not None and "Waiting for another process" in second.stdout.readline()
    first.kill()
    first.communicate(timeout=60)
    output, error = second.communicate(timeout=60)
    assert second.returncode == 0 and output.splitlines()[-1].startswith("built"), error
    assert is_good(load_prepared(folder)) and leftovers(folder) == []


def test_imports_stay_light() -> None:
    """These modules run on a login node: no training library, and nothing slow until it is needed."""
    script = (
        "import sys, nemo_bench.data.local\n"
        "heavy = {'torch', 'lightning', 'megatron', 'nemo', 'transformers', 'tokenizers', 'numpy'}\n"
        "print(heavy & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.stdout.strip() == "set()", result.stderr
