"""What a dataset's files say against the configuration that names them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nemo_bench.checks.problems import problems
from nemo_bench.data.indexed_dataset import IndexedDatasetWriter
from nemo_bench.launch.plan import plan
from nemo_bench.launch.point import prepare_data

from ..composing import composed
from ..datasets import make_dataset


def rules_broken(key: str, overrides: str) -> list[str]:
    """Return the broken rules of a key, which are wrong and not missing."""
    broken = problems(composed("scale=64gpu", "data.weights=[]", *overrides.split()))
    assert not any(problem.missing for problem in broken if problem.key == key)
    return [problem.rule for problem in broken if problem.key == key]


def write_dataset(prefix: Path, documents: int, *, vocab_size: int = 128256, token: int = 3) -> None:
    with IndexedDatasetWriter(prefix, vocab_size=vocab_size) as writer:
        writer.extend(np.full(documents * 9, token, writer.dtype), np.full(documents, 9, np.int32))


@pytest.mark.parametrize(
    ("documents", "overrides", "part"),
    [
        (50, "", "validation"),
        (51, "", ""),
        (50, "data.split='100,0,0' trainer.limit_val_batches=0", ""),
        (400, "data.split='999,1,0'", "validation"),
        (600, "data.split='999,1,0'", ""),
        (101, "data.split='98,1,1'", ""),
        (20, "data.split='98,1,1'", "validation"),
        (1, "data.split='1,99,0'", "train"),
    ],
)
def test_every_part_of_a_split_needs_a_document(tmp_path: Path, documents: int, overrides: str, part: str) -> None:
    write_dataset(tmp_path / "many", 1000)
    write_dataset(tmp_path / "few", documents)
    rules = rules_broken("data.split", f"data.paths=[{tmp_path}/many,{tmp_path}/few] {overrides}")
    assert bool(rules) is bool(part)
    assert not part or f"gives {part} none of the {documents} documents of {tmp_path}/few" in rules[0]


@pytest.mark.parametrize(
    ("dataset_vocabulary", "token", "vocab_size", "rule"),
    [
        (128256, 128255, 128256, ""),
        (128256, 128255, 128255, "holds token id 128,255"),
        (1000, 999, 128256, "ids of 16 bits"),
        (1000, 999, 65_510, "ids of 16 bits"),  # Megatron takes 32 from 65,500 on
        (1000, 999, 1000, ""),
        (128256, 999, 1000, ""),  # 32 bits for a small vocabulary
    ],
)
def test_a_dataset_of_another_tokenizer_is_refused(
    tmp_path: Path, dataset_vocabulary: int, token: int, vocab_size: int, rule: str
) -> None:
    write_dataset(tmp_path / "data", 100, vocab_size=dataset_vocabulary, token=token)
    rules = rules_broken("data.paths", f"data.paths=[{tmp_path}/data] model.vocab_size={vocab_size}")
    assert len(rules) == bool(rule) and rule in "".join(rules)


def test_a_datasets_description_names_its_tokenizer(tmp_path: Path, small_tokenizer: Path) -> None:
    make_dataset(tmp_path / "data", small_tokenizer)
    (tmp_path / "tokenizer.json").write_text("{}")
    for tokenizer, vocab_size, rule in (
        (small_tokenizer, 1000, ""),
        (tmp_path, 1000, "made with another tokenizer"),
        (small_tokenizer, 900, "vocabulary of 1,000, and the model has 900"),
    ):
        point = f"data.paths=[{tmp_path}/data] data.split='9,1,0' data.tokenizer={tokenizer}"
        rules = rules_broken("data.paths", f"{point} model.vocab_size={vocab_size}")
        assert len(rules) == bool(rule) and rule in "".join(rules)


def test_documents_without_an_end_are_said(
    tmp_path: Path, small_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No reason to refuse it: Megatron's preprocessing leaves the token out without --append-eod."""
    write_dataset(tmp_path / "without", 100, token=3)
    write_dataset(tmp_path / "with", 100, token=999)
    make_dataset(tmp_path / "ours", small_tokenizer)
    paths = ",".join(f"{tmp_path}/{name}" for name in ("without", "with", "ours"))
    cfg = composed("scale=64gpu", f"data.paths=[{paths}]", f"data.tokenizer={small_tokenizer}")
    prepare_data(cfg)
    for text in (plan(cfg), capsys.readouterr().out):
        (line,) = (line for line in text.splitlines() if "no document ends in" in line)
        assert f"{tmp_path}/without: " in line
