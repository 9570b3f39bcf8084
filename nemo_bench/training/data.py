"""NeMo's data module of a configuration: Megatron's indexed datasets, or random tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

from nemo.collections import llm
from nemo.collections.llm.gpt.data import mock

from nemo_bench.config import TrainConfig
from nemo_bench.training.settings import sample_order_folder


def build_tokenizer(cfg: TrainConfig) -> Any:
    """Return NeMo's tokenizer: a Hugging Face folder's, or for random tokens one that only has a size."""
    if cfg.data.kind == "mock":
        from nemo.collections.common.tokenizers.null_tokenizer import NullTokenizer

        return NullTokenizer(cfg.model.vocab_size - 1)  # it adds an end-of-document token
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer

    return AutoTokenizer(pretrained_model_name=str(cfg.data.tokenizer), use_fast=True)


def build_data(cfg: TrainConfig, tokenizer: Any) -> Any:
    """Return `PreTrainingDataModule` on the .bin/.idx pairs of `cfg.data`, or `MockDataModule`."""
    m, data = cfg.model, cfg.data
    shared: dict[str, Any] = {
        "seq_length": m.seq_length,
        "micro_batch_size": m.micro_batch_size,
        "global_batch_size": m.global_batch_size,
        "tokenizer": tokenizer,
        "num_workers": data.num_workers,
        "pin_memory": cfg.gpu.device == "cuda",
        "persistent_workers": False,
    }
    if data.kind == "mock":
        # NeMo 2.7.3 passes the wish for an attention mask, which Megatron's own layers need, on in the seed's place.
        mock._MockGPTDataset = partial(mock._MockGPTDataset, create_attention_mask=cfg.gpu.device == "cpu")
        return llm.MockDataModule(
            num_train_samples=cfg.trainer.max_steps * m.global_batch_size,
            num_val_samples=cfg.trainer.limit_val_batches * m.global_batch_size,
            num_test_samples=0,
            **shared,
        )
    paths = list(data.paths)
    if data.weights:
        paths = [item for weight, path in zip(data.weights, data.paths) for item in (str(weight), path)]
    return llm.PreTrainingDataModule(
        paths=paths, split=data.split, seed=cfg.trainer.seed, index_mapping_dir=sample_order_folder(cfg), **shared
    )
