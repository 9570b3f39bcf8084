"""Text to token ids, exactly as the Hugging Face tokenizer gives them, at many times its speed.

gigatoken encodes (Megatron-LM offers it too); `tokenizers`, the Hugging Face library that Megatron's preprocessing
uses, is the reference. They are known to differ in one thing: the version of Unicode by which a character is a letter
or a digit. Documents with characters that are too new for this Python to know go to the reference, so do tokenizers
for which gigatoken has no support, and a sample of all documents is encoded by both and compared.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_bench.errors import BenchError, RunFailed

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# Where implementations of the split expression and of added tokens part ways.
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

#: Of each shard the first so many documents, and then one in so many, are encoded by the reference too.
SAMPLE_FIRST = 16
SAMPLE_EVERY = 8192


class Backend(Enum):
    """Which library encodes."""

    auto = "auto"  # gigatoken where it can, else tokenizers
    gigatoken = "gigatoken"
    tokenizers = "tokenizers"


class Encoder:
    """The tokenizer of a Hugging Face folder.

    Attributes:
        backend: the library that encodes.
        vocab_size: tokens, the added ones included: Hugging Face's `len(tokenizer)`.
        eod: id of the end-of-document token, the folder's `eos_token`.
        fingerprint: hexadecimal SHA-256 of tokenizer.json.
    """

    def __init__(
        self, folder: Path, *, backend: Backend = Backend.auto, report: Callable[[str], None] = lambda line: None
    ) -> None:
        """Raises BenchError: the folder holds no usable tokenizer, or gigatoken was asked for and cannot do it."""
        content, self.fingerprint = read_tokenizer(folder)
        self._reference = _reference(folder, content)
        self.vocab_size: int = self._reference.get_vocab_size(with_added_tokens=True)
        self.eod = _end_of_document(folder, self._reference)
        self.backend = Backend.tokenizers
        if backend is not Backend.tokenizers:
            self._fast, reason = self._gigatoken(content)
            if self._fast is not None:
                self.backend = Backend.gigatoken
            elif backend is Backend.gigatoken:
                raise BenchError(f"gigatoken cannot be used here: {reason}. encoder=tokenizers is slower and can.")
            else:
                report(f"encoding with Hugging Face tokenizers, which is slower: {reason}")

    def _gigatoken(self, content: bytes) -> tuple[Any, str]:
        """gigatoken's tokenizer, proven on difficult texts, or None and why not."""
        try:
            import gigatoken
        except ImportError as error:
            return None, f"gigatoken cannot be imported ({error}); `pip install gigatoken` brings it"
        try:
            fast = gigatoken.Tokenizer.from_json(content)
            self._fast = fast
            added = [str(token["content"]) for token in json.loads(content).get("added_tokens", ())]
            probes = [*_PROBES, "".join(f"{token} a{token}b" for token in added[:64])]
            ids, lengths = self._encode_fast(probes)
        except Exception as error:  # whatever a foreign tokenizer.json makes it raise
            return None, f"gigatoken does not support this tokenizer ({str(error).splitlines()[0]})"
        if (differing := self._first_difference(probes, ids, lengths)) is not None:
            return None, f"gigatoken encodes {probes[differing][:40]!r} in another way"
        return fast, ""

    def encode(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """The ids of all texts, one after another, and each text's number of ids; no special tokens are added.

        Text that looks like a special token becomes that token, as in Hugging Face's and Megatron's.
        Safe to call from several threads at once; they run in parallel.
        """
        if self.backend is Backend.tokenizers:
            return self._encode_reference(texts)
        ids, lengths = self._encode_fast(texts)
        newer = [number for number, text in enumerate(texts) if _may_differ(text)]
        return self._replace(texts, ids, lengths, newer) if newer else (ids, lengths)

    def check(self, texts: Sequence[str], before: int, ids: npt.NDArray[Any], lengths: npt.NDArray[Any]) -> None:
        """Compares a sample of what `encode` gave with the reference; `before` documents came before these.

        Raises:
            RunFailed: they differ.
        """
        if self.backend is Backend.tokenizers:
            return
        first = max(0, min(SAMPLE_FIRST - before, len(texts)))
        numbers = sorted({*range(first), *range(-before % SAMPLE_EVERY, len(texts), SAMPLE_EVERY)})
        if not numbers:
            return
        import numpy as np

        ends = np.cumsum(lengths)
        for number in numbers:
            expected = self._reference.encode(texts[number], add_special_tokens=False).ids
            if ids[ends[number] - lengths[number] : ends[number]].tolist() != expected:
                raise RunFailed(
                    f"gigatoken and Hugging Face tokenizers encode document {before + number + 1:,} differently "
                    f"({texts[number][:40]!r}...): nothing was written. encoder=tokenizers prepares it, slower"
                )

    def _encode_fast(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        import numpy as np

        if not texts:
            return np.empty(0, np.uint32), np.empty(0, np.int64)
        # parallel=False: on this thread, with the interpreter lock released. The threads are the caller's.
        layout = self._fast.encode_batch(list(texts), parallel=False).layout
        offsets = np.asarray(layout.offsets.data)
        return np.asarray(layout.content.data)[offsets[0] : offsets[-1]], np.diff(offsets)

    def _encode_reference(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        import numpy as np

        rows = [encoding.ids for encoding in self._reference.encode_batch_fast(texts, add_special_tokens=False)]
        ids = np.concatenate([np.asarray(row, np.uint32) for row in rows]) if rows else np.empty(0, np.uint32)
        return ids, np.asarray([len(row) for row in rows], np.int64)

    def _replace(
        self, texts: Sequence[str], ids: npt.NDArray[Any], lengths: npt.NDArray[Any], numbers: list[int]
    ) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """The encoding of `texts` with that of the documents `numbers` by the reference."""
        import numpy as np

        rows = np.split(ids, np.cumsum(lengths)[:-1])
        for number in numbers:
            rows[number] = np.asarray(self._reference.encode(texts[number], add_special_tokens=False).ids, np.uint32)
        return np.concatenate(rows), np.asarray([len(row) for row in rows], np.int64)

    def _first_difference(self, texts: Sequence[str], ids: Any, lengths: Any) -> int | None:
        start = 0
        for number, (text, length) in enumerate(zip(texts, lengths)):
            if ids[start : start + length].tolist() != self._reference.encode(text, add_special_tokens=False).ids:
                return number
            start += length
        return None


@functools.cache
def _unknown_characters() -> re.Pattern[str]:
    """Matches the BMP's characters that this Python's Unicode has not assigned, and everything above the BMP."""
    ranges: list[list[int]] = []
    for code in range(0x10000):
        if unicodedata.category(chr(code)) == "Cn":
            if ranges and ranges[-1][1] == code - 1:
                ranges[-1][1] = code
            else:
                ranges.append([code, code])
    unassigned = "".join(f"\\u{first:04x}-\\u{last:04x}" for first, last in ranges)
    return re.compile(f"[{unassigned}\U00010000-\U0010ffff]")


def _may_differ(text: str) -> bool:
    """Whether a character of the text may be a letter or digit by one Unicode version and nothing by another.

    Assigned characters keep their kind; so those that this Python (Unicode 13 or newer) knows are safe.
    """
    if text.isascii():
        return False
    found = _unknown_characters().search(text)
    if found is None:
        return False
    if found[0] <= "\uffff":
        return True
    # The expression cannot hold the kinds of a million characters; there are few different ones in a text.
    return any(unicodedata.category(character) == "Cn" for character in set(text[found.start() :]))


def read_tokenizer(folder: Path) -> tuple[bytes, str]:
    """The folder's tokenizer.json and its SHA-256 (hexadecimal).

    Raises:
        BenchError: it is not there.
    """
    path = folder / "tokenizer.json"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BenchError(
            f"There is no tokenizer: {path}: {error.strerror}.\n"
            "`python setup_stage.py 'parts=[tokenizer]'` brings Llama's (tokenizer=local: one that needs no account); "
            "tokenizer_folder=... names the folder of another"
        ) from None
    return content, hashlib.sha256(content).hexdigest()


def _reference(folder: Path, content: bytes) -> Any:
    from tokenizers import Tokenizer

    try:
        reference = Tokenizer.from_str(content.decode("utf-8"))
    except Exception as error:  # tokenizers raises a bare Exception
        raise BenchError(f"{folder / 'tokenizer.json'} is not a Hugging Face tokenizer: {error}") from None
    # Of a document all tokens are wanted.
    reference.no_truncation()
    reference.no_padding()
    return reference


def _end_of_document(folder: Path, reference: Any) -> int:
    """The id of `eos_token`, which Megatron's --append-eod appends."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            token = json.loads((folder / name).read_bytes()).get("eos_token")
        except FileNotFoundError:
            continue
        except (OSError, ValueError, AttributeError) as error:
            raise BenchError(f"Cannot read {folder / name}: {error}. Bring the tokenizer's files again.") from None
        if isinstance(token, dict):
            token = token.get("content")
        if token is not None:
            if (number := reference.token_to_id(token)) is None:
                raise BenchError(f"{folder / name} names {token!r} as eos_token, which tokenizer.json does not have.")
            return int(number)
    raise BenchError(
        f"{folder} names no eos_token, which ends each document: its tokenizer_config.json or "
        "special_tokens_map.json must."
    )
