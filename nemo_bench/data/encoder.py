"""Text to token ids, exactly as the Hugging Face tokenizer gives them, at many times its speed.

gigatoken encodes (Megatron-LM offers it too); `tokenizers`, the Hugging Face library that Megatron's preprocessing
uses, is the reference. They are known to differ in one thing: the version of Unicode by which a character is a letter
or a digit. Documents with characters of another kind in the newer version go to the reference, so do tokenizers for
which gigatoken has no support, and a sample of all documents is encoded by both and compared.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
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

# By Unicode 17 (gigatoken 0.10) assigned, or of another kind, than by Unicode 16 (tokenizers 0.22).
_DIFFERENT_KIND = (
    *((0x295, 0x295), (0x88F, 0x88F), (0xC5C, 0xC5C), (0xCDC, 0xCDC), (0x1ACF, 0x1ADD), (0x1AE0, 0x1AEB)),
    *((0x20C1, 0x20C1), (0x2B96, 0x2B96), (0xA7CE, 0xA7CF), (0xA7D2, 0xA7D2), (0xA7D4, 0xA7D4), (0xA7F1, 0xA7F1)),
    *((0xFBC3, 0xFBD2), (0xFD90, 0xFD91), (0xFDC8, 0xFDCE), (0x10940, 0x10959), (0x10EC5, 0x10EC7)),
    *((0x10ED0, 0x10ED8), (0x10EFA, 0x10EFB), (0x11B60, 0x11B67), (0x11DB0, 0x11DDB), (0x11DE0, 0x11DE9)),
    *((0x16EA0, 0x16EB8), (0x16EBB, 0x16ED3), (0x16FF2, 0x16FF6), (0x187F8, 0x187FF), (0x18D09, 0x18D1E)),
    *((0x18D80, 0x18DF2), (0x1CCFA, 0x1CCFC), (0x1CEBA, 0x1CED0), (0x1CEE0, 0x1CEF0), (0x1E6C0, 0x1E6DE)),
    *((0x1E6E0, 0x1E6F5), (0x1E6FE, 0x1E6FF), (0x1F6D8, 0x1F6D8), (0x1F777, 0x1F77A), (0x1F8D0, 0x1F8D8)),
    *((0x1FA54, 0x1FA57), (0x1FA8A, 0x1FA8A), (0x1FA8E, 0x1FA8E), (0x1FAC8, 0x1FAC8), (0x1FACD, 0x1FACD)),
    *((0x1FAEA, 0x1FAEA), (0x1FAEF, 0x1FAEF), (0x1FBFA, 0x1FBFA), (0x2B73A, 0x2B73F), (0x2CEA2, 0x2CEAD)),
    (0x323B0, 0x33479),
)


def _character_class(ranges: Iterable[tuple[int, int]]) -> re.Pattern[str]:
    return re.compile("[" + "".join(f"{chr(first)}-{chr(last)}" for first, last in ranges) + "]")


_NEWER = _character_class(_DIFFERENT_KIND)
_SUSPECT = _character_class([*(pair for pair in _DIFFERENT_KIND if pair[1] < 0x10000), (0x10000, 0x10FFFF)])

#: Of each shard the first so many documents, and then one in so many, are encoded by the reference too.
SAMPLE_FIRST = 16
SAMPLE_EVERY = 8192
#: Characters; longer ones are left out of the sample, since the reference takes a second for a million.
SAMPLE_LONGEST = 50_000


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
            if len(texts[number]) > SAMPLE_LONGEST:
                continue
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


def _may_differ(text: str) -> bool:
    """Whether the text has characters whose kind is not the same in the Unicode versions of the two libraries."""
    if text.isascii():
        return False
    found = _SUSPECT.search(text)
    # One expression of all ranges would try every range on every character.
    return found is not None and _NEWER.search(text, found.start()) is not None


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
            "`python setup_stage.py 'parts=[tokenizer]'` brings Llama's; `python setup_stage.py 'parts=[tokenizer]' "
            "tokenizer=local` one that needs no account; tokenizer_folder=... names the folder of another"
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
