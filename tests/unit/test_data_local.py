"""The local dataset: what it holds, when it is built, and that neither kills nor crowds damage it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nemo_bench.data import corpus, tokenizer
from nemo_bench.data.indexed_dataset import bin_path, inspect
from nemo_bench.data.local import LocalDataset, prepare_local
from nemo_bench.errors import BenchError
from tests.conftest import PROJECT

VOCAB = 400
SMALLER = 300
BYTES = 60_000


def prepare(parent: Path, lines: list[str] | None = None, vocab_size: int = VOCAB) -> LocalDataset:
    lines = [] if lines is None else lines
    return prepare_local(parent, vocab_size=vocab_size, corpus_bytes=BYTES, report=lines.append)


def is_good(dataset: LocalDataset) -> bool:
    """Whether what is on disk agrees with `dataset`, token by token."""
    info = inspect(dataset.prefix, vocab_size=dataset.vocab_size, read_tokens=True)
    return (info.documents, info.tokens) == (dataset.documents, dataset.tokens)


def leftovers(parent: Path) -> list[str]:
    """Hidden files and folders besides the lock."""
    return [path.name for path in parent.iterdir() if path.name.startswith(".") and path.name != ".local.lock"]


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


def test_corpus_is_library_text() -> None:
    files = corpus.collect(1_500_000)
    assert 1_500_000 <= sum(file.size_bytes for file in files) < 2_000_000
    assert files == corpus.collect(1_500_000)
    fewer = corpus.collect(10_000)
    assert files[: len(fewer)] == fewer
    # The order mixes packages: neither end is of one.
    assert len({file.name.split("/")[0] for file in files[-10:]}) > 3


def test_corpus_leaves_out_what_is_not_text(tmp_path: Path) -> None:
    good = ["a.py", "json/decoder.py", "latest/contest.py"]
    bad = ["test/test_a.py", "lib2to3/tests/data.py", "site-packages/x.py", "encodings/cp437.py", "html/entities.py"]
    bad += ["_sysconfigdata__linux_.py", "config-3.11-x86_64-linux-gnu/python-config.py", "__pycache__/a.py", "a.txt"]
    for name in good + bad:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n" * 200_000)
    (tmp_path / "empty.py").write_text("\n")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    (tmp_path / "dangling.py").symlink_to(tmp_path / "nowhere")
    assert sorted(file.name for file in corpus.collect(10**9, root=tmp_path)) == good


def test_too_little_text_and_too_small_a_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    with pytest.raises(BenchError, match=r"holds only 6 bytes .* Install the whole library"):
        corpus.collect(10**6, root=tmp_path)
    with pytest.raises(BenchError, match="257 tokens is too small"):
        prepare(tmp_path / "data", vocab_size=257)


def test_built_once_for_each_input(tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    dataset = prepare(tmp_path / "data", lines)
    assert dataset.documents == 40 and is_good(dataset) and "Training" in lines[0] and "Prepared" in lines[-1]
    assert dataset.prefix.name == "my-llama_00_text_document"
    lines.clear()
    assert prepare(tmp_path / "data", lines) == dataset and lines == []
    assert leftovers(tmp_path / "data") == []

    folders = {dataset.prefix.parent, prepare(tmp_path / "data", vocab_size=SMALLER).prefix.parent}
    (library / "package0" / "module0.py").write_text("x = 'something else'\n")
    folders.add(prepare(tmp_path / "data").prefix.parent)
    monkeypatch.setattr("platform.python_version", lambda: "3.99.0")
    folders.add(prepare(tmp_path / "data").prefix.parent)
    assert len(folders) == 4 and is_good(dataset)


def test_same_inputs_give_same_bytes(tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = prepare(tmp_path / "a"), prepare(Path("b"))
    assert second.prefix.is_absolute() and second.prefix.parent.name == first.prefix.parent.name
    for name in ("my-llama_00_text_document.bin", "my-llama_00_text_document.idx", "tokenizer/tokenizer.json"):
        assert (first.prefix.parent / name).read_bytes() == (second.prefix.parent / name).read_bytes()


def test_a_small_corpus_gives_fewer_tokens(tmp_path: Path, library: Path) -> None:
    lines: list[str] = []
    dataset = prepare(tmp_path / "data", lines, vocab_size=20_000)
    assert dataset.vocab_size < 20_000 and is_good(dataset)
    assert any("too small for 20,000 tokens" in line for line in lines)


def test_damage_is_named(tmp_path: Path, library: Path) -> None:
    dataset = prepare(tmp_path / "data")
    data = bin_path(dataset.prefix).read_bytes()
    bin_path(dataset.prefix).write_bytes(data[:-2])
    with pytest.raises(BenchError, match=r"damaged \(my-llama.* bytes instead of .*delete that folder"):
        prepare(tmp_path / "data")


def test_tokenizer_and_tokens(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    dataset = prepare(tmp_path / "data")
    auto = transformers.AutoTokenizer.from_pretrained(dataset.tokenizer_folder)
    assert auto.is_fast and len(auto) == dataset.vocab_size == VOCAB
    assert (auto.bos_token, auto.eos_token) == (tokenizer.BOS_TOKEN, tokenizer.EOS_TOKEN)
    assert auto.vocab_size == VOCAB - 2 and {auto.bos_token_id, auto.eos_token_id} == {VOCAB - 2, VOCAB - 1}
    # As Llama's own does, it begins a text with bos when asked for special tokens.
    assert auto("a").input_ids[0] == auto.bos_token_id

    text = "def naïve(x):\r\n\tif x  ==  12345: return '\u4f60\u597d' # I'll\n\n\n   "
    assert auto.decode(auto(text, add_special_tokens=False).input_ids) == text

    ids = np.fromfile(bin_path(dataset.prefix), dtype=np.uint16)
    ends = np.flatnonzero(ids == auto.eos_token_id)
    files = corpus.collect(BYTES)
    assert len(ends) == len(files) == dataset.documents
    for file, document in zip(files, np.split(ids, ends + 1), strict=False):
        assert auto.decode(document[:-1]) == file.text


@pytest.mark.parametrize("call", [1, 3, 5])
def test_full_disk(tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    calls = 0

    def fsync(_: int) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fsync)
    with pytest.raises(BenchError, match=r"No space left in .*free"):
        prepare(tmp_path / "data")
    assert [path.name for path in (tmp_path / "data").iterdir()] == [".local.lock"]


def test_a_file_in_the_way(tmp_path: Path, library: Path) -> None:
    (tmp_path / "data").write_text("a file")
    for parent in (tmp_path / "data", tmp_path / "data" / "inside"):
        with pytest.raises(BenchError, match=r"Cannot write in .*data.* choose another data\.folder"):
            prepare(parent)


# Prepares the dataset; kills itself with SIGKILL at a chosen call of a function of `os`, or of `report`.
CHILD = """
import os, signal, sys
from pathlib import Path
from nemo_bench.data import local
parent, kill_at, corpus_bytes = sys.argv[1:]
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
elif what:
    setattr(os, what, killing(getattr(os, what)))
done = local.prepare_local(Path(parent), vocab_size=400, corpus_bytes=int(corpus_bytes), report=report)
print(done.tokens, flush=True)
"""


def child(parent: Path, kill_at: str = "", size: int = BYTES) -> subprocess.Popen[str]:
    """Start a process that prepares the dataset of this Python's own library."""
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(parent), kill_at, str(size)],
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    "kill_at", ["report:1", "report:2", "fsync:1", "fsync:3", "replace:2", "replace:4", "replace:5"]
)
def test_killed_while_building(tmp_path: Path, kill_at: str) -> None:
    process = child(tmp_path, kill_at=kill_at)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert list(tmp_path.glob("local-*")) == []
    assert is_good(prepare(tmp_path)) and leftovers(tmp_path) == []


def test_two_processes_at_once(tmp_path: Path) -> None:

    processes = [child(tmp_path, size=300_000) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0] and outputs[0][-1] == outputs[1][-1]
    assert len(list(tmp_path.glob("local-*"))) == 1 and leftovers(tmp_path) == []
