"""The fast encoder gives what Hugging Face tokenizers gives, or is not used."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_bench.data import encoder as module
from nemo_bench.data.encoder import Encoder, _may_differ
from nemo_bench.errors import BenchError, RunFailed


@pytest.fixture(scope="module")
def fast(small_tokenizer: Path) -> Encoder:
    encoder = Encoder(small_tokenizer)
    assert (encoder.library, encoder.eod, encoder.vocab_size) == ("gigatoken", 999, 1000)
    return encoder


@pytest.fixture(scope="module")
def slow(small_tokenizer: Path) -> Encoder:
    return Encoder(small_tokenizer, "tokenizers")


@pytest.fixture
def folder(small_tokenizer: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(small_tokenizer, tmp_path / "tokenizer"))


def assert_same(fast: Encoder, slow: Encoder, texts: list[str]) -> None:
    ids, lengths = fast.encode(texts)
    expected_ids, expected_lengths = slow.encode(texts)
    assert lengths.tolist() == expected_lengths.tolist()
    assert ids.tolist() == expected_ids.tolist()


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.text(max_size=60),
            st.text(
                "aAzZ'\u2019sStTrReEvVmMlLdD \n\r\t0123456789.,-_\u00a0\u2028\u0085é\u0301你\U0001f600", max_size=60
            ),
            st.sampled_from(["<|end_of_text|>", "a<|begin_of_text|> b", "<|end_of", "x" * 1000, " " * 999, "\n" * 99]),
        ),
        max_size=8,
    )
)
def test_any_text_is_encoded_alike(fast: Encoder, slow: Encoder, texts: list[str]) -> None:
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    assert_same(fast, slow, texts)


def test_every_character_is_encoded_alike(fast: Encoder, slow: Encoder) -> None:
    """Each between letters, digits, punctuation and spaces; of the planes without assigned characters one in 256."""
    texts = []
    for block in range(0, sys.maxunicode + 1, 256):
        codes = range(block, block + 256) if block < 0x40000 or block >> 12 == 0xE0 else [block]
        characters = [chr(code) for code in codes if not 0xD800 <= code <= 0xDFFF]
        # One that goes to the reference would take the others along.
        kept = [character for character in characters if not _may_differ(character)]
        texts.append("".join(f"a{c}1 {c}!{c}\n {c}'s" for c in kept))
    assert_same(fast, slow, texts)


def test_characters_of_another_kind(fast: Encoder, slow: Encoder) -> None:
    """4,804 by the Unicode versions of the two libraries."""
    newer = [chr(code) for pair in module._CHANGED for code in range(ord(pair[0]), ord(pair[2]) + 1)]
    assert len(newer) == 4804 and all(map(_may_differ, newer))
    assert not any(map(_may_differ, ["plain", "é 你好", "\U0001f600", "\ufffe", "\U0010ffff", "\u0378"]))
    texts = [f" {c}1 {c}" for c in newer]
    assert_same(fast, slow, texts)


@pytest.mark.parametrize(("before", "number"), [(0, 0), (0, 15), (0, 8192), (8192 - 2, 2)])
def test_a_difference_stops_the_work(fast: Encoder, before: int, number: int) -> None:
    """Whatever makes it: here one id is another. Only the sample is looked at."""
    texts = [f"document {n}" for n in range(8200)]
    ids, lengths = fast.encode(texts)
    fast.check(texts, before, ids, lengths)
    wrong = ids.copy()
    wrong[int(np.cumsum(lengths)[number]) - 1] += 1
    with pytest.raises(RunFailed, match=f"encode document {before + number + 1:,} differently.*encoder=tokenizers"):
        fast.check(texts, before, wrong, lengths)
    fast.check(texts, before + 17, wrong, lengths)


def test_gigatoken_is_used_where_it_is_installed_and_right(
    small_tokenizer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = Encoder._encode_fast
    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "_encode_fast", lambda *call: (honest(*call)[0] + 1, honest(*call)[1]))
        assert Encoder(small_tokenizer).library == "tokenizers"
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    assert Encoder(small_tokenizer).library == "tokenizers"
    differently, absent = capsys.readouterr().out.splitlines()
    assert "differently" in differently and "is not installed" in absent


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, r"There is no tokenizer: [^\n]*\n.*setup_stage\.py"),
        ("tokenizer.json", "{}", "is not a Hugging Face tokenizer"),
        ("tokenizer_config.json", '{"eos_token": "<nobody>"}', "must name a token .* as eos_token, and names <nobody>"),
        ("tokenizer_config.json", "[", "Cannot read .*tokenizer_config.json"),
        ("tokenizer_config.json", "{}", "as eos_token, and names None"),
    ],
)
def test_bad_folders(folder: Path, name: str, content: str | None, message: str) -> None:
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(BenchError, match=message):
        Encoder(folder)
