"""The tokenizer folder: Llama's, from Hugging Face, or a small one trained here, in the same files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from nemo_bench.errors import BenchError
from nemo_bench.stage.config import PartName, StageConfig, TokenizerConfig, TokenizerSource
from nemo_bench.stage.stage import Part, place_inside, print_line


def tokenizer_part(cfg: StageConfig, stage_folder: Path) -> Part:
    """Return the part `<tokenizer.folder>`.

    Raises:
        BenchError: a setting is missing.
    """
    tokenizer = cfg.tokenizer
    local = tokenizer.source is TokenizerSource.local
    for name in ("vocab_size", "corpus_bytes") if local else ("repo", "files"):
        if not getattr(tokenizer, name):
            raise BenchError(f"tokenizer.source={tokenizer.source.value} needs tokenizer.{name}")
    keys = ("vocab_size", "corpus_bytes") if local else ("repo", "revision")
    place = place_inside(stage_folder, tokenizer.folder, "tokenizer.folder")
    if local:
        plan = f"train a tokenizer of {tokenizer.vocab_size:,} tokens into {stage_folder / place}"
    else:
        files = ", ".join(tokenizer.files)
        plan = f"download {tokenizer.repo} ({tokenizer.revision}: {files}) into {stage_folder / place}, about 9 MB"
    return Part(
        name=PartName.tokenizer,
        place=place,
        place_key="tokenizer.folder",
        settings={
            "tokenizer.source": tokenizer.source.value,
            **{f"tokenizer.{key}": getattr(tokenizer, key) for key in keys},
        },
        plan=plan,
        make=partial(_make, tokenizer),
    )


def _make(cfg: TokenizerConfig, folder: Path, _lock: int) -> str:
    folder.mkdir()
    if cfg.source is TokenizerSource.local:
        _train(folder, cfg)
        tokens = verify(folder, (), None)  # a small corpus gives fewer tokens than asked for
        return f"trained here, {tokens:,} tokens"
    commit = _download(folder, cfg)
    return f"{cfg.repo} {commit}, {verify(folder, cfg.files, cfg.vocab_size):,} tokens"


def verify(folder: Path, names: Iterable[str], vocab_size: int | None) -> int:
    """Check that `folder` holds these files and a usable tokenizer, and return its number of tokens.

    Raises:
        BenchError: a file is missing or damaged, or the tokenizer does not have `vocab_size` tokens.
    """
    from tokenizers import Tokenizer

    if missing := [name for name in names if not (folder / name).is_file()]:
        raise BenchError(f"the tokenizer lacks {', '.join(missing)}")
    for path in sorted(folder.glob("*.json")):
        try:
            json.loads(path.read_bytes())
        except ValueError as error:
            raise BenchError(f"{path.name} of the tokenizer is damaged: {error}") from None
    try:
        tokenizer = Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except Exception as error:  # the library raises no narrower one
        raise BenchError(f"the `tokenizers` library cannot use tokenizer.json: {error}") from None
    size = int(tokenizer.get_vocab_size(with_added_tokens=True))
    if vocab_size not in (None, size):
        raise BenchError(
            f"tokenizer.json has {size:,} tokens, and tokenizer.vocab_size={vocab_size}: it is a different tokenizer "
            "(tokenizer.vocab_size=null accepts any)"
        )
    return size


def _train(folder: Path, cfg: TokenizerConfig) -> None:
    """Write the tokenizer that `python train.py` trains for its local dataset, in the files of Llama's."""
    from nemo_bench.data import corpus, tokenizer

    assert cfg.vocab_size is not None and cfg.corpus_bytes is not None
    print_line(f"tokenizer: training one of {cfg.vocab_size:,} tokens on the sources of this Python's standard library")
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


def _download(folder: Path, cfg: TokenizerConfig) -> str:
    """Download the files, all of one commit, and return the commit."""
    from nemo_bench.data.fetch import HUB, hub_file, shown

    assert cfg.repo is not None
    revision = cfg.revision
    endpoint = shown(os.environ.get("HF_ENDPOINT", HUB))
    print_line(
        f"tokenizer: downloading {cfg.repo} ({revision}) from {endpoint}; without a connection this gives up after "
        "half a minute"
    )
    try:
        for name in cfg.files:
            # The first file's commit holds for the others, whatever is pushed meanwhile.
            revision = hub_file(cfg.repo, name, folder, revision=revision, report=print_line).commit
    except BenchError as error:
        raise BenchError(
            f"{error}\ntokenizer=local needs no account and no network; bundle=FILE installs a bundle from another "
            "cluster; tokenizer.repo, .revision and .files choose other files"
        ) from error
    shutil.rmtree(folder / ".cache")  # the Hub's notes
    return revision
