"""A byte-level BPE tokenizer of Llama 3's construction, trained on a small corpus.

It differs from Llama 3's own only in its merges: split expression, byte-level alphabet, the place of the special tokens
and the three files are the same, so that transformers and NeMo load it in the same way.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

BOS_TOKEN = "<|begin_of_text|>"
EOS_TOKEN = "<|end_of_text|>"
SPECIAL_TOKENS = (BOS_TOKEN, EOS_TOKEN)

# As in Llama 3's tokenizer.json.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MIN_FREQUENCY = 2  # of a pair of tokens that is merged: one seen once teaches nothing about the text


def _train(texts: Iterable[str], vocab_size: int) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated")
    bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_of_words])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        min_frequency=MIN_FREQUENCY,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Given to the trainer, they would take the first ids; Llama 3 has them after the ordinary tokens.
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    template = processors.TemplateProcessing(
        single=f"{BOS_TOKEN} $A",
        pair=f"{BOS_TOKEN} $A {BOS_TOKEN}:1 $B:1",
        special_tokens=[(BOS_TOKEN, tokenizer.token_to_id(BOS_TOKEN))],
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    return tokenizer


def write(folder: Path, texts: Iterable[str], *, vocab_size: int) -> None:
    """Train on `texts` the new Hugging Face folder `folder`.

    It holds `vocab_size` tokens, the special ones last; fewer if no pair is left to merge.
    """
    tokenizer = _train(texts, vocab_size)
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = {str(tokenizer.token_to_id(token)): {"content": token, **flags} for token in SPECIAL_TOKENS}
    config = {
        "added_tokens_decoder": added,
        "clean_up_tokenization_spaces": False,  # they would be missing in decoded text
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 131072,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    special = {"bos_token": BOS_TOKEN, "eos_token": EOS_TOKEN}
    contents = {"tokenizer_config.json": config | special, "special_tokens_map.json": special}
    files = {name: json.dumps(content, indent=2, sort_keys=True) for name, content in contents.items()}
    folder.mkdir(parents=True, exist_ok=True)
    # `Tokenizer.save` makes of a full disk a bare Exception.
    for name, text in {"tokenizer.json": tokenizer.to_str(pretty=True), **files}.items():
        (folder / name).write_text(text + "\n", encoding="utf-8")
