"""The tokenizer folder: Llama's, from Hugging Face, or a small one trained here, in the same files."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path

from nemo_bench.data import corpus, tokenizer
from nemo_bench.data.encoder import Encoder
from nemo_bench.data.fetch import HUB, hub_file, shown
from nemo_bench.errors import BenchError
from nemo_bench.stage.config import StageConfig, TokenizerConfig
from nemo_bench.stage.stage import Part, place_inside, print_line


def tokenizer_part(cfg: StageConfig, stage_folder: Path) -> Part:
    """Return the part `<tokenizer.folder>`."""
    c = cfg.tokenizer
    place = place_inside(stage_folder, c.folder, "tokenizer.folder")
    if c.source == "local":
        if c.vocab_size is None:
            raise BenchError("tokenizer.source=local needs tokenizer.vocab_size")
        keys, plan = ("vocab_size", "corpus_bytes"), f"train a tokenizer of {c.vocab_size} tokens"
    else:
        keys, plan = ("repo", "revision"), f"download {c.repo} ({c.revision}: {', '.join(c.files)})"
    settings = {f"tokenizer.{key}": getattr(c, key) for key in ("source", *keys)}
    return Part("tokenizer", place, settings, f"{plan} into {stage_folder / place}", partial(_make, c))


def _make(cfg: TokenizerConfig, folder: Path, _lock: int) -> str:
    folder.mkdir()
    if cfg.source == "local":
        print_line(f"tokenizer: training one of {cfg.vocab_size:,} tokens on this Python's standard library")
        tokenizer.write(folder, corpus.collect(cfg.corpus_bytes).values(), vocab_size=cfg.vocab_size or 0)
        origin, wanted = "trained here", None  # a small corpus gives fewer than asked for
    else:
        origin, wanted = f"{cfg.repo} {_download(folder, cfg)}", cfg.vocab_size
    size = Encoder(folder, "tokenizers").vocab_size
    if wanted not in (None, size):
        other = f"tokenizer.vocab_size={wanted}: it is another tokenizer (tokenizer.vocab_size=null accepts any)"
        raise BenchError(f"tokenizer.json has {size:,} tokens, and {other}")
    return f"{origin}, {size:,} tokens"


def _download(folder: Path, cfg: TokenizerConfig) -> str:
    """Download the files, all of one commit, and return the commit."""
    commit, endpoint = cfg.revision, shown(os.environ.get("HF_ENDPOINT", HUB))
    print_line(f"tokenizer: downloading {cfg.repo} ({commit}) from {endpoint}; without a connection this takes 30 s")
    try:
        for name in cfg.files:
            # The first file's commit holds for the others, whatever is pushed meanwhile.
            _, commit = hub_file("model", cfg.repo, commit, name, folder, lambda _: None)
    except BenchError as error:
        other = "tokenizer=local needs no account and no network; `install bundle=FILE` brings that of another cluster"
        raise BenchError(f"{error}\n{other}") from error
    shutil.rmtree(folder / ".cache")  # the Hub's notes
    return commit
