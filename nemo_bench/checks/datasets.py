"""What a dataset's files say against the configuration: another tokenizer, parts of the split without a document."""

from __future__ import annotations

import functools
from itertools import accumulate
from pathlib import Path

from nemo_bench.checks.configuration import split_shares
from nemo_bench.config import TrainConfig
from nemo_bench.data.indexed_dataset import DatasetInfo, bin_path, idx_path, inspect
from nemo_bench.data.manifest import read_manifest
from nemo_bench.errors import BenchError, Need
from nemo_bench.files import sha256_of

NO_FILES = "data=local and data=mock need no files"
PARTS = ("train", "validation", "test")
SAMPLE_BYTES = 1 << 20
_inspect = functools.cache(inspect)  # the points of a sweep share their datasets


def dataset_rules(cfg: TrainConfig, need: Need) -> None:
    """Check the files of `data.paths`."""
    for prefix in cfg.data.paths:
        missing = [path for path in (idx_path(Path(prefix)), bin_path(Path(prefix))) if not path.is_file()]
        need.missing = bool(missing)
        try:
            info = _inspect(Path(prefix))
            _tokenizer_rules(cfg, need, info)
        except BenchError as error:
            need(False, "data.paths", str(error), f"`python prepare_data.py` makes it; {NO_FILES}", value=prefix)
        else:
            _split_rules(cfg, need, info)


def _tokenizer_rules(cfg: TrainConfig, need: Need, info: DatasetInfo) -> None:
    """Refuse token ids that the model does not have: with tensor parallelism Megatron trains on them, masked."""
    vocab_size, prefix = cfg.model.vocab_size, str(info.prefix)
    fix = "prepare it with the tokenizer in data.tokenizer, or name its own tokenizer and model.vocab_size"
    rule = f"holds ids of 16 bits, which a vocabulary of {vocab_size:,} (model.vocab_size) does not fit into"
    need(info.dtype != "uint16" or vocab_size <= 65_536, "data.paths", rule, fix, value=prefix)
    manifest = read_manifest(info.prefix)
    if manifest is None:
        largest = _largest_sampled_id(info)
        rule = f"holds token id {largest:,}, and the model has {vocab_size:,} (model.vocab_size)"
        need(largest < vocab_size, "data.paths", rule, fix, value=prefix)
        return
    rule = f"was made with a vocabulary of {manifest['vocab_size']:,}, and the model has {vocab_size:,}"
    need(manifest["vocab_size"] <= vocab_size, "data.paths", rule, fix, value=prefix)
    made_with = manifest["inputs"].get("tokenizer_sha256")
    tokenizer = Path(cfg.data.tokenizer or "") / "tokenizer.json"
    if made_with is not None and tokenizer.is_file():
        rule = f"was made with another tokenizer than {tokenizer}"
        need(made_with == sha256_of(tokenizer), "data.paths", rule, fix, value=prefix)


def _largest_sampled_id(info: DatasetInfo) -> int:
    """Return the largest token id in the first, the middle and the last MiB."""
    import numpy as np

    ids = np.memmap(bin_path(info.prefix), np.dtype(info.dtype).newbyteorder("<"), "r")
    count = SAMPLE_BYTES // ids.itemsize
    middle = max(0, len(ids) // 2 - count // 2)
    return max(int(ids[start : start + count].max()) for start in (0, middle, max(0, len(ids) - count)))


def _split_rules(cfg: TrainConfig, need: Need, info: DatasetInfo) -> None:
    """Refuse a share that rounds to no document: megatron-core counts its epochs for ever."""
    shares = split_shares(cfg.data.split)
    assert shares is not None
    ends = [round(end * info.documents) for end in accumulate(share / sum(shares) for share in shares)]
    for part, share, begin, end in zip(PARTS, shares, [0, *ends], ends):
        rule = f"gives {part} none of the {info.documents:,} documents of {info.prefix}, and training would never start"
        fix = f"a larger share of {part}, or 100,0,0 with trainer.limit_val_batches=0"
        need(share == 0 or end > begin, "data.split", rule, fix)
