"""A file of documents to a Megatron dataset: Megatron's bytes, whatever is in the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from backports import zstd

from nemo_bench.data import documents
from nemo_bench.data.corpus import collect
from nemo_bench.data.documents import Reader
from nemo_bench.data.encoder import Encoder
from nemo_bench.data.indexed_dataset import bin_path, idx_path
from nemo_bench.data.tokenize import tokenize
from nemo_bench.errors import BenchError
from tests import megatron_preprocess


@pytest.fixture(scope="module")
def encoder(small_tokenizer: Path) -> Encoder:
    return Encoder(small_tokenizer)


def write(path: Path, texts: list[str]) -> Path:
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path.write_bytes(zstd.compress(data) if path.suffix == ".zst" else data)
    return path


def files(prefix: Path) -> tuple[bytes, bytes]:
    return bin_path(prefix).read_bytes(), idx_path(prefix).read_bytes()


def test_bytes_are_megatrons(tmp_path: Path, encoder: Encoder, small_tokenizer: Path) -> None:
    pytest.importorskip("megatron.core")
    texts = list(collect(400_000).values())
    texts[3:3] = ["", "<|end_of_text|>", " ", "\U00011de0 newer than Unicode 16", "你好 \U0001f600", ""]
    source = write(tmp_path / "a.jsonl", texts)
    megatron_preprocess.preprocess(str(source), str(small_tokenizer), str(tmp_path / "megatron"), 1)
    expected = files(tmp_path / "megatron_text_document")
    counts = tokenize(Reader(source), encoder, tmp_path / "fast", threads=2)
    assert files(tmp_path / "fast") == expected
    assert counts.documents == len(texts) and not counts.bad
    slow = Encoder(small_tokenizer, "tokenizers")
    tokenize(Reader(write(tmp_path / "a.jsonl.zst", texts)), slow, tmp_path / "slow")
    assert files(tmp_path / "slow") == expected


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_and_blocks_change_nothing(
    tmp_path: Path, encoder: Encoder, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"document {number} " * (number % 50) for number in range(3000)]
    source = write(tmp_path / "a.jsonl", texts)
    tokenize(Reader(source), encoder, tmp_path / "one")
    monkeypatch.setattr(documents, "BLOCK_BYTES", 10_000)
    tokenize(Reader(source), encoder, tmp_path / "many", threads=threads)
    assert files(tmp_path / "many") == files(tmp_path / "one")


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": ""}\n'])
def test_nothing_to_write(tmp_path: Path, encoder: Encoder, content: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(BenchError, match="holds no document with text"):
        tokenize(Reader(tmp_path / "a.jsonl"), encoder, tmp_path / "a")
    assert not idx_path(tmp_path / "a").exists()
