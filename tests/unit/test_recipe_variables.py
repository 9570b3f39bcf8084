"""The recipe's environment variables: what they stand for, and what contradicts them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest

from nemo_bench.errors import BenchError
from nemo_bench.recipe_variables import overrides

from ..composing import composed

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.mark.parametrize(
    ("environment", "meant"),
    [
        ({"DTYPE": "FP8", "MODEL_SIZE": "70b", "JOB_TOTAL_GPUS": "128"}, "precision=fp8 model=70b scale=128gpu"),
        ({"MAX_STEPS": "10", "NUM_LAYERS": "8", "SEQ_LEN": "4096"}, None),
        ({"TP": "2", "GBS": "64", "VP": "3"}, ""),  # anybody's variables
        ({"DTYPE": "bf16", "TP": "2", "VP": "null"}, None),
        ({"ENABLE_PROFILE": "true", "RUN_CONF_PROFILE_START_STEP": "5"}, "profile=nsys_recipe profile.start_step=5"),
        ({"ENABLE_PROFILE": "false", "ENABLE_NCCL_TRACE": ""}, ""),
        ({"RUN_CONF_IMAGE": "/A.sqsh"}, "cluster.container.image=/A.sqsh"),
        (
            {"OPTIMIZATION_NAME": "a", "OPTIMIZATION_CODE": "model.optim.bucket_cap_mb=400 +model.x=1"},
            "++entrypoint.settings.model.optim.bucket_cap_mb=400 ++entrypoint.settings.model.x=1",
        ),
    ],
)
def test_a_variable_stands_for_its_override(environment: dict[str, str], meant: str | None) -> None:
    added = overrides(["launch=dry"], environment)
    composed(*added, *[] if any("scale=" in word for word in added) else ["scale=64gpu"])  # all are keys
    assert len(added) == len(environment) if meant is None else sorted(added) == sorted(meant.split())


@pytest.mark.parametrize(
    ("typed", "environment", "message"),
    [
        ("precision=bf16", {"DTYPE": "fp8"}, "precision=bf16 is typed: type precision=fp8, or unset DTYPE"),
        ("precision=bf16,fp8", {"DTYPE": "fp8"}, "type precision=fp8"),
        (
            "experiment=llama31_8b_bf16_8gpu",
            {"MODEL_SIZE": "70b"},
            "has its own model: unset MODEL_SIZE, or type model=70b",
        ),
        ("model.tensor_model_parallel_size=4", {"TP": "2", "MODEL_SIZE": "70b"}, "model.tensor_model_parallel_size=2"),
        ("launch=dry", {"RUN_CONF_PROFILE_STEP": "1"}, "valid: RUN_CONF_IMAGE, RUN_CONF_PROFILE_START_STEP"),
        ("launch=dry", {"OPTIMIZATION_FILE": "1"}, "valid: .*OPTIMIZATION_NAME"),
        ("launch=dry", {"OPTIMIZATION_CODE": "a=1"}, "belong together"),
        ("launch=dry", {"RUN_CONF_RESULT_DIR": "/r"}, "STAGE_PATH names the stage"),
    ],
)
def test_a_contradiction_or_an_unknown_variable_is_refused(
    typed: str, environment: dict[str, str], message: str
) -> None:
    with pytest.raises(BenchError, match=message):
        overrides([typed], environment)


def test_what_is_typed_as_well_is_no_contradiction() -> None:
    assert overrides(["precision=fp8", "experiment=x", "model=8b"], {"DTYPE": "fp8", "MODEL_SIZE": "8b"}) == []


def test_train_takes_them(train_cli: Cli) -> None:
    point = {"DTYPE": "fp8", "MODEL_SIZE": "8b", "JOB_TOTAL_GPUS": "16", "ENABLE_PROFILE": "true"}
    done = train_cli("launch=dry", **point)
    assert done.returncode == 0, done.stderr
    assert "Llama 3.1 8b" in done.stdout and "fp8, 16 x h100" in done.stdout
    assert "nsys: steps 20 to 30 of ranks 0, 1, 2, 3, 4, 5, 6, 7" in done.stdout
    done = train_cli("launch=dry", "precision=bf16", **point)
    assert (done.returncode, done.stdout) == (2, "") and "type precision=fp8, or unset DTYPE" in done.stderr
