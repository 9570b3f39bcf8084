"""The recipe's own worked numbers, to its printed digits, and both FLOPs conventions."""

from __future__ import annotations

from functools import partial

import pytest

from nemo_bench import flops
from nemo_bench.flops import FlopsConvention

flops_of_the_70b = partial(
    flops.model_flops,
    seq_length=8192,
    num_layers=80,
    hidden_size=8192,
    ffn_hidden_size=28672,
    num_attention_heads=64,
    num_query_groups=8,
    vocab_size=128256,
)


def test_model_flops_of_the_70b_part_by_part() -> None:
    work = flops_of_the_70b()
    assert work.attention == 8192 * 136_902_082_560
    assert work.mlp == 8192 * 338_228_674_560
    assert work.embedding == 8192 * 6_304_038_912
    assert f"{work.total:.2e}" == "3.94e+15"


def test_the_recipes_worked_example() -> None:
    tokens_per_s = flops.tokens_per_second(seq_length=8192, global_batch_size=128, step_time_s=11.31)
    # The recipe prints 92712: 92711.7 rounded.
    assert round(tokens_per_s) == 92712
    assert f"{flops.days_to_train(tokens=1e12, tokens_per_s=92712):.2f}" == "124.84"
    # It reckons with the rounded 3.94e15; the unrounded 3.944e15 would give 35.24%.
    share = flops.mfu(
        global_batch_size=128, flops_per_sequence=3.94e15, step_time_s=11.31, num_gpus=64, peak_tflops=1979
    )
    assert f"{share:.2%}" == "35.21%"


def test_the_recipe_counts_7_2_percent_more_than_the_causal_convention() -> None:
    recipe = flops_of_the_70b()
    causal = flops_of_the_70b(convention=FlopsConvention.CAUSAL)
    assert (causal.mlp, causal.embedding) == (recipe.mlp, recipe.embedding)
    # Half of the core: 12 * layers * hidden * seq / 2 a token.
    assert recipe.attention - causal.attention == 8192 * 12 * 80 * 8192 * 8192 / 2
    assert f"{recipe.total / causal.total - 1:.1%}" == "7.2%"


@pytest.mark.parametrize(
    ("shape", "published"),
    [
        (
            {"num_layers": 32, "hidden_size": 4096, "ffn_hidden_size": 14336, "num_attention_heads": 32},
            8_030_261_248,
        ),
        (
            {"num_layers": 80, "hidden_size": 8192, "ffn_hidden_size": 28672, "num_attention_heads": 64},
            70_553_706_496,
        ),
        (
            {"num_layers": 126, "hidden_size": 16384, "ffn_hidden_size": 53248, "num_attention_heads": 128},
            405_853_388_800,
        ),
    ],
)
def test_parameters_of_the_published_models(shape: dict[str, int], published: int) -> None:
    assert flops.num_parameters(num_query_groups=8, vocab_size=128256, **shape) == published


def test_the_pipeline_bubble() -> None:
    assert flops.pipeline_bubble(pipeline_stages=1, virtual_stages=1, micro_batches=4) == 0
    # Narayanan et al. 2021: (p - 1) / m of the work, so 3/8 of it, or 3/11 of the step
    assert flops.pipeline_bubble(pipeline_stages=4, virtual_stages=1, micro_batches=8) == pytest.approx(3 / 11)
    # and interleaved v times, a v-th of it
    assert flops.pipeline_bubble(pipeline_stages=4, virtual_stages=5, micro_batches=64) == pytest.approx(0.6 / 64.6)
