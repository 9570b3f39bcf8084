"""What a dataset's files say against the configuration: another tokenizer, parts of the split without a document."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from nemo_bench.config import TrainConfig
from nemo_bench.data.corpus import collect
from nemo_bench.data.encoder import Encoder
from nemo_bench.data.indexed_dataset import DatasetInfo, bin_path, empty_parts, idx_path, inspect, optimal_dtype
from nemo_bench.data.shard import read_manifest
from nemo_bench.errors import BenchError, Need, Problem
from nemo_bench.files import sha256_of

NO_FILES = "data=local and data=mock need no files"
SAMPLE_TOKENS = 1 << 18
_inspect = functools.cache(inspect)  # the points of a sweep share their datasets


def dataset_problems(cfg: TrainConfig) -> list[Problem]:
    """Return what is wrong with the files of `data.paths`, or missing; and with the split of the local dataset."""
    need = Need(cfg)
    if cfg.data.kind == "local":
        _split_rules(cfg, need, "the local dataset", len(collect(cfg.data.corpus_bytes)))
    for prefix in cfg.data.paths if cfg.data.kind == "megatron" else ():
        need.missing = not all(path.is_file() for path in (idx_path(Path(prefix)), bin_path(Path(prefix))))
        try:
            info = _inspect(Path(prefix))
            _tokenizer_rules(cfg, need, info)
        except BenchError as error:
            need(False, "data.paths", str(error), f"`python prepare_data.py` makes it; {NO_FILES}", value=prefix)
        else:
            _split_rules(cfg, need, prefix, info.documents)
    return need.problems


@functools.cache
def dataset_remarks(prefixes: tuple[str, ...], tokenizer: str) -> list[str]:
    """Say which datasets of others lack the end-of-document token, as Megatron's do without --append-eod."""
    foreign = [Path(prefix) for prefix in prefixes if read_manifest(Path(prefix)) is None]
    try:
        eod = Encoder(Path(tokenizer), "tokenizers").eod if foreign else 0
        without = [prefix for prefix in foreign if eod not in _sample(_inspect(prefix))]
    except BenchError:  # named by the rules
        return []
    return [f"{prefix}: no document ends in the end-of-document token of {tokenizer}, id {eod}" for prefix in without]


def _sample(info: DatasetInfo) -> Any:
    """Return the token ids at the beginning, in the middle and at the end."""
    ids = np.memmap(bin_path(info.prefix), np.dtype(info.dtype).newbyteorder("<"), "r")
    last = max(0, len(ids) - SAMPLE_TOKENS)
    return np.concatenate([ids[start : start + SAMPLE_TOKENS] for start in (0, last // 2, last)])


def _tokenizer_rules(cfg: TrainConfig, need: Need, info: DatasetInfo) -> None:
    """Refuse token ids that the model does not have: with tensor parallelism Megatron trains on them, masked."""

    def refuse(broken: bool, rule: str) -> None:
        fix = "prepare it with the tokenizer in data.tokenizer, or name its own tokenizer and model.vocab_size"
        need(not broken, "data.paths", rule, fix, value=str(info.prefix))

    vocab_size, manifest = cfg.model.vocab_size, read_manifest(info.prefix)
    has = f"and the model has {vocab_size:,} (model.vocab_size)"
    refuse(info.dtype == "uint16" and optimal_dtype(vocab_size) != "uint16", f"holds ids of 16 bits, {has}")
    if manifest is None:
        largest = int(_sample(info).max())
        refuse(largest >= vocab_size, f"holds token id {largest:,}, {has}")
        return
    refuse(manifest["vocab_size"] > vocab_size, f"was made with a vocabulary of {manifest['vocab_size']:,}, {has}")
    made_with = manifest["inputs"].get("tokenizer_sha256")
    tokenizer = Path(cfg.data.tokenizer or "") / "tokenizer.json"
    other = made_with is not None and tokenizer.is_file() and made_with != sha256_of(tokenizer)
    refuse(other, f"was made with another tokenizer than {tokenizer}")


def _split_rules(cfg: TrainConfig, need: Need, dataset: str, documents: int) -> None:
    for part in empty_parts(cfg.data.split, documents):
        rule = f"gives {part} none of the {documents:,} documents of {dataset}, and training would never start"
        need(False, "data.split", rule, f"a larger share of {part}, or 100,0,0 with trainer.limit_val_batches=0")
