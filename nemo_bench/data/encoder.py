"""Text to token ids, exactly as the Hugging Face tokenizer gives them, at many times its speed.

gigatoken encodes; `tokenizers`, which Megatron's preprocessing uses, is the reference. They differ in the version of
Unicode that says which characters are letters or digits: documents with characters that changed go to the reference, as
do all where gigatoken does not support the tokenizer. A sample of the documents is encoded by both and compared.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemo_bench.errors import BenchError, RunFailed

Encoded = tuple[Any, Any]  # arrays: ids of all texts (uint32), number of ids of each (int64)

# Texts on which implementations of the split expression and of added tokens differ.
_PROBES = (
    "",
    "It's we'RE I'll 'S 's'\u017ft  don't\n\n  x\r\n\t y \r\r\n",
    "3 12 123 1234567 \u0661\u0662\u0663\u0664 \u00bd\u2167 3.14e-10 0x1F",
    " \u00e9 e\u0301 \u4f60\u597d\uff0c\u4e16\u754c \u0928\u092e\u0938\u094d\u0924\u0947",
    "\U0001f468\u200d\U0001f469 \U0001d518",
    "a\u00a0b\u2003c\u3000d\u2028e\u0085f\u200bg\ufeffh",
    "def f(x):\n    return {'a': [1,2,3]}  # !?*&^%$\n\n\n\tpass   ",
    "\x00\x01\x7f \ufffd " + "x" * 300 + " " * 300 + "\n" * 50 + "-" * 200,
)

# Characters of another kind in Unicode 17 (gigatoken 0.10) than in 16 (tokenizers 0.22), by benchmarks/unicode17.py:
# ranges, each as "first-last".
_ASTRAL = "\U00010000"
_CHANGED: list[str] = json.loads(Path(__file__).with_name("unicode17.json").read_bytes())
_NEWER = re.compile(f"[{''.join(_CHANGED)}]")
_SUSPECT = re.compile(f"[{''.join(pair for pair in _CHANGED if pair < _ASTRAL)}{_ASTRAL}-{chr(sys.maxunicode)}]")

# The first documents of a shard, and one in so many, but none of more characters: the reference takes a second a MB.
SAMPLE_FIRST, SAMPLE_EVERY, SAMPLE_LONGEST = 16, 8192, 50_000


class Encoder:
    """The tokenizer of a Hugging Face folder; BenchError if that holds no usable one.

    `vocab_size` counts added tokens too; `eod` is the id of the folder's `eos_token`, which Megatron's --append-eod
    appends; `fingerprint` is the SHA-256 of tokenizer.json; `library` is the one that encodes, gigatoken where it can.
    """

    def __init__(self, folder: Path, library: str = "auto") -> None:
        from tokenizers import Tokenizer

        content, self.fingerprint = read_tokenizer(folder)
        try:
            self._reference: Any = Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # tokenizers raises a bare Exception
            raise BenchError(f"{folder / 'tokenizer.json'} is not a Hugging Face tokenizer: {error}") from None
        self._reference.no_truncation()  # a document keeps all its tokens
        self._reference.no_padding()
        self.vocab_size: int = self._reference.get_vocab_size(with_added_tokens=True)
        self.eod = _end_of_document(folder, self._reference)
        self.library = library
        if library == "auto":
            self.library = "gigatoken"
            if reason := self._load_gigatoken(content):
                self.library = "tokenizers"
                print(f"encoding with Hugging Face tokenizers, which is slower: {reason}", flush=True)

    def _load_gigatoken(self, content: bytes) -> str:
        """Load gigatoken's tokenizer and prove it on difficult texts; return why it cannot be used, or ""."""
        try:
            import gigatoken

            self._fast = gigatoken.Tokenizer.from_json(content)
            added = [str(token["content"]) for token in json.loads(content).get("added_tokens", ())]
            probes = [*_PROBES, "".join(f"{token} a{token}b" for token in added[:64])]
            ids, lengths = self._encode_fast(probes)
        except Exception as error:  # it is not installed, or anything, depending on tokenizer.json
            return f"gigatoken does not support this tokenizer, or is not installed ({str(error).splitlines()[0]})"
        if differing := self._differing(probes, ids, lengths, range(len(probes))):
            return f"gigatoken encodes {probes[differing[0]][:40]!r} differently"
        return ""

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Return the ids of all texts, one after another, and the number of ids of each text.

        No special tokens are added, but text that looks like one becomes it, as with Hugging Face and Megatron.
        Several threads may call this at once; they run in parallel.
        """
        if self.library == "tokenizers" or not texts:
            encodings = self._reference.encode_batch_fast(texts, add_special_tokens=False)
            rows: list[Any] = [encoding.ids for encoding in encodings]
        else:
            ids, lengths = self._encode_fast(texts)
            newer = [number for number, text in enumerate(texts) if _may_differ(text)]
            if not newer:
                return ids, lengths
            rows = np.split(ids, np.cumsum(lengths)[:-1])
            for number in newer:
                rows[number] = self._reference_ids(texts[number])
        joined = np.concatenate([np.asarray(row, np.uint32) for row in [(), *rows]])
        return joined, np.asarray([len(row) for row in rows], np.int64)

    def check(self, texts: Sequence[str], before: int, ids: Any, lengths: Any) -> None:
        """Compare a sample of what `encode` returned, after `before` documents, with the reference (RunFailed)."""
        if self.library == "tokenizers":
            return
        numbers = range(before, before + len(texts))
        sample = [place for place, number in enumerate(numbers) if number < SAMPLE_FIRST or number % SAMPLE_EVERY == 0]
        short = [place for place in sample if len(texts[place]) <= SAMPLE_LONGEST]
        for place in self._differing(texts, ids, lengths, short):
            raise RunFailed(
                f"gigatoken and Hugging Face tokenizers encode document {before + place + 1:,} differently "
                f"({texts[place][:40]!r}...): nothing was written. Use encoder=tokenizers, which is slower."
            )

    def _reference_ids(self, text: str) -> Any:
        return self._reference.encode(text, add_special_tokens=False).ids

    def _differing(self, texts: Sequence[str], ids: Any, lengths: Any, places: Iterable[int]) -> list[int]:
        """Return at which of these places in `texts` the reference gives other ids."""
        ends = lengths.cumsum()
        starts = ends - lengths
        return [n for n in places if ids[starts[n] : ends[n]].tolist() != self._reference_ids(texts[n])]

    def _encode_fast(self, texts: Sequence[str]) -> Encoded:
        # parallel=False: on this thread, with the interpreter lock released. The threads are the caller's.
        layout = self._fast.encode_batch(list(texts), parallel=False).layout
        offsets = np.asarray(layout.offsets.data)
        return np.asarray(layout.content.data)[offsets[0] : offsets[-1]], np.diff(offsets)


def _may_differ(text: str) -> bool:
    """Return whether the two libraries' versions of Unicode disagree about a character of the text."""
    # A quick look first: the expression of all ranges tries every range on every character.
    suspect = None if text.isascii() else _SUSPECT.search(text)
    return suspect is not None and _NEWER.search(text, suspect.start()) is not None


def read_tokenizer(folder: Path) -> tuple[bytes, str]:
    """Return the folder's tokenizer.json and its SHA-256; raise BenchError if there is none."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise BenchError(
            f"There is no tokenizer: {path}: No such file or directory.\n`python setup_stage.py 'parts=[tokenizer]'` "
            "downloads Llama's; with tokenizer=local it trains one that needs no account; tokenizer_folder=... names "
            "another folder"
        )
    content = path.read_bytes()
    return content, hashlib.sha256(content).hexdigest()


def _end_of_document(folder: Path, reference: Any) -> int:
    path = folder / "tokenizer_config.json"
    try:
        token = json.loads(path.read_bytes()).get("eos_token")
    except (OSError, ValueError) as error:
        raise BenchError(f"Cannot read {path}: {error}. Download the tokenizer's files again.") from None
    text = token.get("content") if isinstance(token, dict) else token
    number = None if text is None else reference.token_to_id(text)
    if number is None:
        raise BenchError(f"{path} must name a token of tokenizer.json as eos_token, and names {text}.")
    return int(number)
