"""The tokenizer folder: Llama's, from Hugging Face, or a small one trained here, in the same files."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path

from nemo_bench.errors import BenchError
from nemo_bench.files import write_json, write_text
from nemo_bench.stage.config import PartName, StageConfig, TokenizerConfig, TokenizerSource
from nemo_bench.stage.stage import Part, place_inside, print_line


def tokenizer_part(cfg: StageConfig, stage_folder: Path) -> Part:
    """Return the part `<tokenizer.folder>`; raise BenchError if a setting is missing."""
    tokenizer = cfg.tokenizer
    local = tokenizer.source is TokenizerSource.local
    for name in ("vocab_size", "corpus_bytes") if local else ("repo", "files"):
        if not getattr(tokenizer, name):
            raise BenchError(f"tokenizer.source={tokenizer.source.value} needs tokenizer.{name}")
    place = place_inside(stage_folder, tokenizer.folder, "tokenizer.folder")
    plan = f"train a tokenizer of {tokenizer.vocab_size} tokens into {stage_folder / place}"
    if not local:
        files = ", ".join(tokenizer.files)
        plan = f"download {tokenizer.repo} ({tokenizer.revision}: {files}) into {stage_folder / place}, about 9 MB"
    keys = ("vocab_size", "corpus_bytes") if local else ("repo", "revision")
    settings = {f"tokenizer.{key}": getattr(tokenizer, key) for key in keys}
    return Part(
        name=PartName.tokenizer,
        place=place,
        settings={"tokenizer.source": tokenizer.source.value, **settings},
        plan=plan,
        make=partial(_make, tokenizer),
    )


def _make(cfg: TokenizerConfig, folder: Path, _lock: int) -> str:
    folder.mkdir()
    if cfg.source is TokenizerSource.local:
        _train(folder, cfg)
        return f"trained here, {verify(folder, None):,} tokens"  # a small corpus gives fewer than asked for
    commit = _download(folder, cfg)
    return f"{cfg.repo} {commit}, {verify(folder, cfg.vocab_size):,} tokens"


def verify(folder: Path, vocab_size: int | None) -> int:
    """Return the number of tokens of the tokenizer in `folder`; raise BenchError if it is not `vocab_size`."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
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
    names = {"bos_token_id": tokenizer.BOS_TOKEN, "eos_token_id": tokenizer.EOS_TOKEN}
    ids = {key: trained.token_to_id(token) for key, token in names.items()}
    for name, text in tokenizer.render(trained).items():
        write_text(folder / name, text)
    write_json(folder / "config.json", {**ids, "model_type": "llama", "vocab_size": trained.get_vocab_size()})
    write_json(folder / "generation_config.json", ids)


def _download(folder: Path, cfg: TokenizerConfig) -> str:
    """Download the files, all of one commit, and return the commit."""
    from nemo_bench.data.fetch import HUB, hub_file, shown

    assert cfg.repo is not None
    commit, endpoint = cfg.revision, shown(os.environ.get("HF_ENDPOINT", HUB))
    print_line(
        f"tokenizer: downloading {cfg.repo} ({commit}) from {endpoint}; without a connection this gives up after "
        "half a minute"
    )
    try:
        for name in cfg.files:
            # The first file's commit holds for the others, whatever is pushed meanwhile.
            _, commit, _ = hub_file(cfg.repo, name, folder, commit, print_line)
    except BenchError as error:
        raise BenchError(
            f"{error}\ntokenizer=local needs no account and no network; `install bundle=FILE` brings a bundle from "
            "another cluster; tokenizer.repo, .revision and .files choose other files"
        ) from error
    shutil.rmtree(folder / ".cache")  # the Hub's notes
    return commit
