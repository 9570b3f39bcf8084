"""Parallel runs compute what one process computes, from the same weights (a checkpoint) and the same data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_bench.record.ranks import UNSTEADY_STEPS

from .conftest import Run

pytestmark = pytest.mark.train

STEPS = 8
TWO, FOUR = "trainer.devices=2", "trainer.devices=4"
TP2_SP = ("model.tensor_model_parallel_size=2", "model.sequence_parallel=true")
PP2_VP2 = ("model.pipeline_model_parallel_size=2", "model.virtual_pipeline_model_parallel_size=2")
LAYOUTS = {
    "DP2": [TWO],
    "DP2 with the distributed optimizer": [TWO, "model.optim.use_distributed_optimizer=true"],
    "TP2": [TWO, "model.tensor_model_parallel_size=2"],
    "TP2 SP": [TWO, *TP2_SP],
    "PP2": [TWO, "model.pipeline_model_parallel_size=2"],
    "PP2 VP2": [TWO, *PP2_VP2],
    "TP2 SP PP2 VP2": [FOUR, *TP2_SP, *PP2_VP2],
    "TP2 SP DP2": [FOUR, *TP2_SP],
    "PP2 DP2": [FOUR, "model.pipeline_model_parallel_size=2"],
}


@pytest.fixture(scope="module")
def saved(forked: Callable[..., Run]) -> Run:
    """Twenty steps, with checkpoints after 10 and 20 (the record counts steps from 0: step=9, step=19)."""
    return forked("checkpoint.every_n_steps=10")


@pytest.fixture(scope="module")
def weights(saved: Run) -> Path:
    """Where the comparisons start."""
    return saved.run_dir / "checkpoints" / "step=9"


@pytest.fixture(scope="module")
def single(forked: Callable[..., Run], weights: Path) -> Run:
    return forked(f"checkpoint.weights_from='{weights}'", f"trainer.max_steps={STEPS}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_of_a_parallel_run_are_the_single_process_ones(
    layout: str, forked: Callable[..., Run], weights: Path, single: Run
) -> None:
    parallel = forked(f"checkpoint.weights_from='{weights}'", f"trainer.max_steps={STEPS}", *LAYOUTS[layout])
    assert len(parallel.losses) == STEPS
    assert parallel.losses == pytest.approx(single.losses, rel=1e-3)
    ranks = json.loads((parallel.run_dir / "ranks.json").read_text())["ranks"]
    assert [rank["rank"] for rank in ranks] == [*range(4 if FOUR in LAYOUTS[layout] else 2)]
    assert all(rank["steps"] == STEPS - UNSTEADY_STEPS and rank["step_time_median_s"] > 0 for rank in ranks)


def test_weights_from_starts_with_the_checkpoints_weights(saved: Run, single: Run) -> None:
    assert single.losses[0] < saved.losses[0] - 0.3


def test_the_same_seed_gives_the_same_losses_to_the_last_digit(saved: Run, forked: Callable[..., Run]) -> None:
    assert forked().losses == saved.losses


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(saved: Run, weights: Path, forked: Callable[..., Run]) -> None:
    resumed = forked(f"checkpoint.resume_from='{weights}'")
    assert [row["step"] for row in resumed.steps] == list(range(10, 20))
    assert resumed.losses == saved.losses[10:]
