"""The local dataset: what it holds, when it is built, and that neither kills nor crowds damage it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from nemo_bench.config import DataConfig
from nemo_bench.data import corpus, tokenizer
from nemo_bench.data.indexed_dataset import DatasetInfo, bin_path
from nemo_bench.data.local import prepare_local
from nemo_bench.data.shard import verify
from nemo_bench.errors import BenchError
from tests.kills import killed

VOCAB = 400
SMALLER = 300
BYTES = 60_000


def prepare(parent: Path, vocab_size: int = VOCAB) -> DatasetInfo:
    return prepare_local(DataConfig(folder=str(parent), corpus_bytes=BYTES), vocab_size)[0]


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
    monkeypatch.setattr(corpus, "LIBRARY", root)
    monkeypatch.setattr(corpus, "MINIMUM_BYTES", 1000)
    return root


def test_built_once_for_each_input(
    tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = prepare(tmp_path / "data")
    assert dataset.documents == 40 and verify(dataset.prefix)[0] == dataset and "Training" in capsys.readouterr().out
    assert dataset.prefix.name == "my-llama_00_text_document"
    assert prepare(tmp_path / "data") == dataset and capsys.readouterr().out == ""
    assert leftovers(tmp_path / "data") == []

    folders = {dataset.prefix.parent, prepare(tmp_path / "data", vocab_size=SMALLER).prefix.parent}
    (library / "package0" / "module0.py").write_text("x = 'something else'\n")
    folders.add(prepare(tmp_path / "data").prefix.parent)
    monkeypatch.setattr("platform.python_version", lambda: "3.99.0")
    folders.add(prepare(tmp_path / "data").prefix.parent)
    assert len(folders) == 4 and verify(dataset.prefix)[0] == dataset


def test_damage_is_named(tmp_path: Path, library: Path) -> None:
    dataset = prepare(tmp_path / "data")
    data = bin_path(dataset.prefix).read_bytes()
    bin_path(dataset.prefix).write_bytes(data[:-2])
    with pytest.raises(BenchError, match=r"damaged: it should have [^\0]*Delete the folder"):
        prepare(tmp_path / "data")


def test_tokenizer_and_tokens(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    dataset = prepare(tmp_path / "data")
    auto = transformers.AutoTokenizer.from_pretrained(dataset.prefix.parent / "tokenizer")
    assert auto.is_fast and len(auto) == verify(dataset.prefix)[1]["vocab_size"] == VOCAB
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
        assert verify(prepare(folder).prefix) and (complete or leftovers(folder) == [])
        shutil.rmtree(folder)
        at += 1
    assert at > 10
