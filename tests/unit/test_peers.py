"""What the peers of the GPU benchmark share: the timed loop, its checks, the result file."""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "peers"))

import peer_common

EXPECTED_LOSS = math.log(512)


def slice_of(*options: str) -> peer_common.Slice:
    parser = argparse.ArgumentParser()
    peer_common.add_arguments(parser)
    arguments = ["--device", "cpu", "--vocab-size", "512", "--seq-length", "16", "--global-batch-size", "2"]
    return peer_common.slice_of(parser, parser.parse_args([*arguments, "--output", "unused.json", *options]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--steps", "3"), "--warmup must be from 0 to --steps - 1 = 2, not 8"),
        (("--layers", "0"), "--layers must be at least 1, not 0"),
        (("--attention-heads", "60"), "--attention-heads must divide --hidden-size"),
        (("--query-groups", "7"), "--query-groups must divide --attention-heads"),
    ],
)
def test_a_run_that_cannot_be_is_refused(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        slice_of(*options)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_the_warm_up_stays_out_of_the_statistics() -> None:
    run = slice_of("--steps", "5", "--warmup", "2")

    def step(index: int) -> float:
        assert not gc.isenabled()
        return EXPECTED_LOSS + index / 10

    measured: dict[str, Any] = peer_common.run_steps(run, step)
    times_s = measured["step_times_s"]
    assert len(times_s) == 5
    assert measured["losses"] == pytest.approx([EXPECTED_LOSS + index / 10 for index in range(5)])
    assert measured["median_step_s"] == statistics.median(times_s[2:])
    assert (measured["min_step_s"], measured["max_step_s"]) == (min(times_s[2:]), max(times_s[2:]))
    assert measured["tokens_per_s"] == pytest.approx(2 * 16 / measured["median_step_s"])
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([EXPECTED_LOSS, math.nan], "the loss is not finite"),
        ([EXPECTED_LOSS - 1, EXPECTED_LOSS], "the first loss is 5.238"),
        ([EXPECTED_LOSS + 4, EXPECTED_LOSS], "the first loss is 10.238"),
        ([math.inf, EXPECTED_LOSS], "the first loss is inf"),
    ],
)
def test_a_loss_that_cannot_be_ends_the_run(
    losses: list[float], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        peer_common.run_steps(slice_of("--steps", "2", "--warmup", "0"), lambda index: losses[index])
    assert ended.value.code == 1
    assert message in capsys.readouterr().err
    assert gc.isenabled()


def test_the_batches_are_random_repeatable_and_one_token_longer_than_the_sequence() -> None:
    run = slice_of("--steps", "3", "--warmup", "0")
    batches = peer_common.random_batches(run)
    assert [tuple(batch.shape) for batch in batches] == [(1, 17)] * 6
    assert not batches[0].equal(batches[1])
    assert all(first.equal(second) for first, second in zip(batches, peer_common.random_batches(run)))
