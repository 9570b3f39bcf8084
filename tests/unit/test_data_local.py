"""The local dataset: what it holds, when it is built, and that neither kills nor crowds damage it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from nemo_bench.data import corpus, tokenizer
from nemo_bench.data.indexed_dataset import bin_path, inspect
from nemo_bench.data.local import LocalDataset, prepare_local
from nemo_bench.errors import BenchError
from tests.kills import killed

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


def test_built_once_for_each_input(tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    dataset = prepare(tmp_path / "data", lines)
    assert dataset.documents == 40 and is_good(dataset) and "Training" in lines[0]
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


def test_damage_is_named(tmp_path: Path, library: Path) -> None:
    dataset = prepare(tmp_path / "data")
    data = bin_path(dataset.prefix).read_bytes()
    bin_path(dataset.prefix).write_bytes(data[:-2])
    with pytest.raises(BenchError, match=r"damaged: it should have [^\0]*Delete the folder"):
        prepare(tmp_path / "data")


def test_tokenizer_and_tokens(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    dataset = prepare(tmp_path / "data")
    auto = transformers.AutoTokenizer.from_pretrained(dataset.tokenizer_folder)
    assert auto.is_fast and len(auto) == dataset.vocab_size == VOCAB
    assert (auto.bos_token, auto.eos_token) == (tokenizer.BOS_TOKEN, tokenizer.EOS_TOKEN)
    assert auto.vocab_size == VOCAB - 2 and {auto.bos_token_id, auto.eos_token_id} == {VOCAB - 2, VOCAB - 1}
    assert auto("a").input_ids[0] == auto.bos_token_id  # as Llama's own
    ids = np.fromfile(bin_path(dataset.prefix), dtype=np.uint16)
    ends = np.flatnonzero(ids == auto.eos_token_id)
    files = corpus.collect(BYTES)
    assert len(ends) == len(files) == dataset.documents
    for text, document in zip(files.values(), np.split(ids, ends + 1), strict=False):
        assert auto.decode(document[:-1]) == text


def test_killed_at_every_change(tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    folder, at = tmp_path / "data", 1
    while killed(lambda: prepare(folder), folder, at):
        complete = any(folder.glob("local-*"))
        assert is_good(prepare(folder)) and (complete or leftovers(folder) == [])
        shutil.rmtree(folder)
        at += 1
    assert at > 10
