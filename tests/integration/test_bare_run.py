"""The bare command, as a newcomer runs it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_bench.record.folder import RunFolder
from nemo_bench.report.runs import load_run

from .conftest import Run

pytestmark = pytest.mark.train


@pytest.fixture(scope="module")
def bare(train: Callable[..., Run]) -> Run:
    return train(small=False)


def test_fifty_steps_on_real_text_are_shown_and_the_loss_falls(bare: Run) -> None:
    assert [row["step"] for row in bare.steps] == list(range(50))
    assert all(math.isfinite(loss) for loss in bare.losses)
    assert sum(bare.losses[-5:]) / 5 < 0.6 * bare.losses[0]
    assert bare.stdout.count("train_step_timing") == 50
    for name in ("loss", "step time (s)", "tokens/s", "TFLOP/s", "MFU", "days to 1T tokens"):
        assert name in bare.stdout, name
    assert f"evidence: {bare.run_dir}" in bare.stdout
    # NeMo's noise is in the log, not on the terminal.
    assert "NeMo W" not in bare.stdout and bare.stderr == ""


def test_the_record_is_whole_and_the_recipes_grep_finds_nemos_own_lines(bare: Run, stage: Path) -> None:
    assert bare.run_dir.parent == stage / "results" / "25.11" / "fp32" / "tiny" / "1"
    assert (bare.run_dir / "rank0.out").read_text().count("train_step_timing in s: ") == 50
    assert RunFolder(bare.run_dir).status().state == "completed"
    assert RunFolder(bare.run_dir).read()["command"].endswith("train.py")
    node = json.loads((bare.run_dir / "node.json").read_text())
    assert node["packages"]["megatron-core"] == "0.15.3" and node["cpu_cores"] >= 1
    events = [json.loads(line)["event"] for line in (bare.run_dir / "events.jsonl").read_text().splitlines()]
    assert events == ["importing", "building", "training", "validation", "validated", "done"]


def test_the_numbers_and_each_steps_rates_follow_from_the_record(bare: Run) -> None:
    summary, last = load_run(bare.run_dir), bare.steps[-1]
    times = sorted(row["train_step_timing_s"] for row in bare.steps)
    assert summary.times is not None and times[0] <= summary.times.median_s <= times[-1]
    numbers = summary.numbers
    assert numbers is not None
    assert numbers.tokens_per_s * numbers.days_to_train * 86400 == pytest.approx(1e12)
    assert numbers.mfu is not None and numbers.mfu_causal is not None and 0 < numbers.mfu_causal < numbers.mfu < 1
    assert numbers.peak_source is not None and numbers.peak_source.startswith("measured")
    at_last = numbers.at(last["train_step_timing_s"])
    for rate in ("tokens_per_s_per_gpu", "tflops_per_gpu", "mfu"):
        assert last[rate] == pytest.approx(getattr(at_last, rate))
    assert not {"power_w", "sm_clock_mhz", "peak_memory_gib", "throttle_reasons"} & {*last}
