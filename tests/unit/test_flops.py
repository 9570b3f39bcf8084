"""The recipe's own worked numbers, to its printed digits, and both FLOPs conventions."""

from __future__ import annotations

import pytest

from nemo_bench import flops
from nemo_bench.flops import Architecture

LLAMA_70B = Architecture(80, 8192, 28672, 64, 8, 128256)


def test_model_flops_of_the_70b() -> None:
    work = LLAMA_70B.flops_per_sequence(8192)
    assert work == 8192 * (136_902_082_560 + 338_228_674_560 + 6_304_038_912)  # attention, MLP, embedding
    assert f"{work:.2e}" == "3.94e+15"


def test_the_recipes_worked_example() -> None:
    tokens_per_s = flops.tokens_per_second(seq_length=8192, global_batch_size=128, step_time_s=11.31)
    # The recipe prints 92712: 92711.7 rounded.
    assert round(tokens_per_s) == 92712
    assert f"{flops.days_to_train(tokens=1e12, tokens_per_s=92712):.2f}" == "124.84"
    # It uses the rounded 3.94e15; the unrounded 3.944e15 would give 35.24%.
    achieved = flops.tflops_per_gpu(global_batch_size=128, flops_per_sequence=3.94e15, step_time_s=11.31, num_gpus=64)
    assert f"{achieved / 1979:.2%}" == "35.21%"


def test_the_recipe_counts_7_2_percent_more_than_the_causal_convention() -> None:
    recipe = LLAMA_70B.flops_per_sequence(8192)
    causal = LLAMA_70B.flops_per_sequence(8192, causal=True)
    # Half of the core: 12 * layers * hidden * seq / 2 a token.
    assert recipe - causal == 8192 * 12 * 80 * 8192 * 8192 / 2
    assert f"{recipe / causal - 1:.1%}" == "7.2%"


@pytest.mark.parametrize(
    ("architecture", "published"),
    [
        (Architecture(32, 4096, 14336, 32, 8, 128256), 8_030_261_248),
        (LLAMA_70B, 70_553_706_496),
        (Architecture(126, 16384, 53248, 128, 8, 128256), 405_853_388_800),
    ],
)
def test_parameters_of_the_published_models(architecture: Architecture, published: int) -> None:
    assert architecture.num_parameters == published
