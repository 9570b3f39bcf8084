"""The tokenizer folder: Llama's, from Hugging Face, or a small one trained here, in the same files."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from nemo_bench.errors import BenchError
from nemo_bench.stage.config import PartName, StageConfig, TokenizerConfig, TokenizerSource
from nemo_bench.stage.files import Room, remove, say
from nemo_bench.stage.manifest import Entry
from nemo_bench.stage.part import Part, inside

# Llama's tokenizer.json has 9 MB, and downloads go through a second copy.
_ROOM_BYTES = 40 * 10**6
_ATTEMPTS = 5


class TokenizerPart(Part):
    """`<tokenizer.folder>`."""

    kind = PartName.tokenizer
    place_key = "tokenizer.folder"

    def __init__(self, cfg: StageConfig, stage: Path) -> None:
        self.cfg = cfg.tokenizer
        self.place = inside(stage, str(Path(self.cfg.folder).absolute()), "tokenizer.folder")
        self.local = self.cfg.source is TokenizerSource.local
        for name in ("vocab_size", "corpus_bytes") if self.local else ("repo", "files"):
            if not getattr(self.cfg, name):
                raise BenchError(f"tokenizer.{name} is needed with tokenizer.source={self.cfg.source.value}")

    def difference(self, entry: Entry) -> str | None:
        there, asked = entry.details, self.cfg
        if there["source"] != asked.source.value:
            return f"holds a tokenizer of source={there['source']}, not {asked.source.value}"
        if self.local and there["asked_vocab_size"] != asked.vocab_size:
            return f"holds one of tokenizer.vocab_size={there['asked_vocab_size']}, not {asked.vocab_size}"
        if not self.local and there["repo"] != asked.repo:
            return f"holds the one of {there['repo']}, not of {asked.repo}"
        if not self.local and asked.revision not in (there["asked_revision"], there["revision"]):
            return f"holds revision {there['asked_revision']}, not {asked.revision}"
        return None

    def version(self, entry: Entry) -> str:
        there, tokens = entry.details, f"{entry.details['vocab_size']:,} tokens"
        if there["source"] == TokenizerSource.local.value:
            return f"trained here, {tokens}"
        return f"{there['repo']} {(there['revision'] or 'as found')[:12]}, {tokens}"

    def plan(self, destination: Path) -> str:
        if self.local:
            return f"train a tokenizer of {self.cfg.vocab_size:,} tokens into {destination}"
        names = ", ".join(self.cfg.files + self.cfg.optional_files)
        return f"download {self.cfg.repo} ({self.cfg.revision}: {names}) into {destination}\n  about 9 MB"

    def room(self, destination: Path) -> list[Room]:
        return [Room(destination.parent, _ROOM_BYTES, "the tokenizer")]

    def make(self, made: Path, lock: int) -> dict[str, Any]:
        made.mkdir()
        if self.local:
            _train(made, self.cfg)
            # A small corpus gives fewer tokens than asked for.
            return self._details(None, verify(made, _LOCAL_FILES, None))
        commit = download(made, self.cfg)
        return self._details(commit, verify(made, self.cfg.files, self.cfg.vocab_size))

    @property
    def adopt(self) -> Callable[[Path], dict[str, Any]] | None:
        # A folder of unknown origin may be Llama's, made by the recipe's own setup.sh; it is not one trained here.
        return None if self.local else self._adopt

    def _adopt(self, path: Path) -> dict[str, Any]:
        return self._details(None, verify(path, self.cfg.files, self.cfg.vocab_size))

    def _details(self, commit: str | None, vocab_size: int) -> dict[str, Any]:
        return {
            "source": self.cfg.source.value,
            "repo": self.cfg.repo,
            "asked_revision": self.cfg.revision,
            "revision": commit,
            "asked_vocab_size": self.cfg.vocab_size,
            "vocab_size": vocab_size,
        }


def verify(folder: Path, names: Iterable[str], vocab_size: int | None) -> int:
    """Checks that `folder` holds these files and that its tokenizer can be used; returns its number of tokens.

    Raises:
        BenchError: a file is missing or cannot be read, or it is not a tokenizer of `vocab_size` tokens.
    """
    from tokenizers import Tokenizer

    if missing := [name for name in names if not (folder / name).is_file()]:
        raise BenchError(f"the tokenizer lacks {', '.join(missing)}")
    for path in sorted(folder.glob("*.json")):
        try:
            json.loads(path.read_bytes())
        except ValueError as error:
            raise BenchError(f"{path.name} of the tokenizer is damaged ({error})") from error
    try:
        tokenizer = Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except OSError:
        raise
    except Exception as error:  # all that `tokenizers` raises
        raise BenchError(f"tokenizer.json cannot be used by the `tokenizers` library: {error}") from error
    size = int(tokenizer.get_vocab_size(with_added_tokens=True))
    if vocab_size not in (None, size):
        raise BenchError(
            f"tokenizer.json has {size:,} tokens, and tokenizer.vocab_size={vocab_size}: it is another tokenizer "
            "(tokenizer.vocab_size=null takes any)"
        )
    return size


# --- trained here -------------------------------------------------------------------------------------------

_LOCAL_FILES = (
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


def _train(folder: Path, cfg: TokenizerConfig) -> None:
    """Writes the tokenizer that `python train.py` trains for its local dataset, in the files of Llama's."""
    from nemo_bench.data import corpus, tokenizer

    assert cfg.vocab_size is not None and cfg.corpus_bytes is not None
    say(f"tokenizer: training one of {cfg.vocab_size:,} tokens on this Python's standard library")
    trained = tokenizer.train((file.text for file in corpus.collect(cfg.corpus_bytes)), vocab_size=cfg.vocab_size)
    ids = {
        "bos_token_id": trained.token_to_id(tokenizer.BOS_TOKEN),
        "eos_token_id": trained.token_to_id(tokenizer.EOS_TOKEN),
    }
    files = tokenizer.render(trained)
    files["config.json"] = _json({**ids, "model_type": "llama", "vocab_size": trained.get_vocab_size()})
    files["generation_config.json"] = _json(ids)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


# --- from Hugging Face --------------------------------------------------------------------------------------


def download(folder: Path, cfg: TokenizerConfig) -> str:
    """Downloads the files, all of one commit, compares them with the hub's checksums, and returns the commit.

    Token, endpoint and time limits are huggingface_hub's: HF_TOKEN or its stored login, HF_ENDPOINT, HF_HUB_*.

    Raises:
        BenchError: access, name, network or contents are not as they should be; says what mends it.
    """
    import requests
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError
    from huggingface_hub.utils.logging import set_verbosity
    from huggingface_hub.utils.tqdm import disable_progress_bars

    # Its progress is of small files, and its warnings quote signed URLs.
    disable_progress_bars()
    set_verbosity(logging.ERROR)
    assert cfg.repo is not None
    say(f"tokenizer: downloading {cfg.repo} ({cfg.revision})")
    revision = cfg.revision
    try:
        for name in [*cfg.files, *cfg.optional_files]:
            try:
                found = get_hf_file_metadata(hf_hub_url(cfg.repo, name, revision=revision))
                # The later files come from the first one's commit, whatever is pushed meanwhile.
                revision = found.commit_hash or revision
                path = _fetch(cfg.repo, name, revision, folder)
            except EntryNotFoundError as error:
                # A subclass of it stands for a failed connection, and has no answer.
                if name in cfg.optional_files and error.response is not None:
                    continue
                raise
            if found.size != os.path.getsize(path) or not _has_checksum(Path(path), found.etag):
                raise BenchError(f"{name} of {cfg.repo} was damaged on its way (size or checksum): run this again")
    except (requests.RequestException, ValueError) as error:
        raise _explained(error, cfg) from error
    except OSError as error:
        if error.errno is None:  # huggingface_hub's own
            raise _explained(error, cfg) from error
        raise
    remove(folder / ".cache")  # its notes
    return revision


def _fetch(repo: str, name: str, commit: str, folder: Path) -> str:
    """`hf_hub_download`, which gives up where a connection breaks inside a body; called again it goes on from there."""
    import requests
    from huggingface_hub import hf_hub_download

    for left in reversed(range(_ATTEMPTS)):
        try:
            return hf_hub_download(repo, name, revision=commit, local_dir=folder)
        except OSError as error:
            # A bare OSError without number is its word for a body of the wrong length.
            broken = type(error) is OSError and error.errno is None
            if left == 0 or not (broken or isinstance(error, requests.exceptions.ChunkedEncodingError)):
                raise
    raise AssertionError("not reached")


def _has_checksum(path: Path, etag: str | None) -> bool:
    """Whether the contents are those of the hub's ETag: SHA-256 in large file storage, else git's id of the blob.

    Mirrors may send SHA-1, or what says nothing about the contents.
    """
    data = path.read_bytes()
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", etag or ""):
        return True
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data)
    return etag in {digest.hexdigest() for digest in (hashlib.sha256(data), blob, hashlib.sha1(data))}


def _explained(error: Exception, cfg: TokenizerConfig) -> BenchError:
    """What an error of huggingface_hub means for the user. No text of its own, which may quote signed URLs."""
    from huggingface_hub import errors, get_token

    page, token = f"https://huggingface.co/{cfg.repo}", get_token()
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(error, errors.RepositoryNotFoundError) and not isinstance(error, errors.GatedRepoError):
        known = "to the account of this token" if token else "to those who are not logged in (no HF_TOKEN is set)"
        return BenchError(
            f"Hugging Face shows no model tokenizer.repo={cfg.repo} {known}: correct the name, or, for a private one, "
            "export HF_TOKEN=<a token of an account that may read it>"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return BenchError(f"{cfg.repo} has no tokenizer.revision={cfg.revision}: {page}/commits lists them")
    if isinstance(error, errors.EntryNotFoundError) and response is not None:
        name = re.sub(r".*/resolve/[^/]+/|\?.*", "", str(response.url))
        return BenchError(
            f"{cfg.repo} has no file {name}: {page}/tree/main lists its files; tokenizer.files=[...] names those that "
            "are needed, tokenizer.optional_files=[...] those that may be missing"
        )
    if status in (401, 403):
        head = (
            f"Hugging Face refused this token access to {cfg.repo} (status {status})."
            if token
            else f"{cfg.repo} needs a Hugging Face token, and there is none (HF_TOKEN is not set)."
        )
        return BenchError(
            f"{head}\n"
            f"  1. access: log in, open {page}, accept the licence there. Approval is not automatic and can take a day "
            "or more.\n"
            "  2. token: https://huggingface.co/settings/tokens, of the same account, with read access to gated "
            "repositories\n"
            "  3. export HF_TOKEN=<token>, and run this again\n"
            "tokenizer=local needs no account; bundle=FILE installs what another cluster has"
        )
    if isinstance(error, errors.HFValidationError):
        return BenchError(f"tokenizer.repo={cfg.repo} is no name of a repository: ORGANISATION/NAME")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return BenchError(
            "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set, so nothing is downloaded: `unset` it, or bundle=FILE "
            "installs what another cluster has"
        )
    cause = f"status {status}" if status is not None else type(error.__cause__ or error).__name__
    from huggingface_hub.constants import ENDPOINT

    endpoint = re.sub(r"//[^/@]*@", "//", ENDPOINT)  # without a mirror's user and password
    return BenchError(
        f"{endpoint} cannot be reached, or gives no good answer ({cause}), for {cfg.repo}: run this where there is "
        "internet (https_proxy is honoured), or bring a bundle from another cluster (bundle=FILE); tokenizer=local "
        "needs no network"
    )
