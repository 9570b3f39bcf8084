"""From an empty folder to a run on a prepared dataset, by the commands that a cluster's user gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from backports import zstd

from nemo_bench.data.corpus import collect
from nemo_bench.record.folder import RunFolder

from ..httpserver import FileServer
from .conftest import SMALL, Run, run_script

pytestmark = pytest.mark.train


def test_random_tokens_need_no_files(forked: Callable[..., Run]) -> None:
    run = forked("data=mock", "trainer.max_steps=5")
    assert RunFolder(run.run_dir).status().state == "completed" and len(run.steps) == 5
    assert 6 < run.losses[0] < 7  # ln 512, and the noise of new weights: nothing can be learned from them


def test_the_recipes_dataset_trains(forked: Callable[..., Run], stage: Path) -> None:
    """`data=pile`, its two blended shards, on the small model: the loss falls, and both are read."""
    run_script(stage, "setup_stage.py", "tokenizer=local", "parts=[tokenizer]", "tokenizer.vocab_size=512")
    texts = list(collect(2_000_000).values())
    with FileServer() as server:
        for number in range(2):
            lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[number::2])
            server.put(f"/{number:02d}.jsonl.zst", zstd.compress(lines.encode()))
        done = run_script(stage, "prepare_data.py", f"url='{server.url('/')}{{shard:02d}}.jsonl.zst'")
    assert "train.py data=pile" in done.stdout, done.stderr
    run = forked("data=pile", "trainer.max_steps=50")
    assert run.losses[0] > 6 and sum(run.losses[-3:]) / 3 < 0.8 * run.losses[0]
    log = (run.run_dir / "rank0.out").read_text()
    assert "my-llama_00_text_document" in log and "my-llama_01_text_document" in log
    assert "model.vocab_size=512" in SMALL  # the tokenizer's, above
