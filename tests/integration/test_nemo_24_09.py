"""NeMo 2.0.0 itself, the release in nemo:24.09, trains from the configuration that entrypoint=nemo_24_09 writes.

On a CPU, with megatron-core's own modules for those of Transformer Engine and Apex (training/nemo_1_on_cpu.py). It
needs an environment of its own: `make test-nemo-1` makes it (tests/nemo_24_09/environment.sh), and names its
interpreter in NEMO_BENCH_NEMO_1.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from nemo_bench.record.folder import RunFolder
from nemo_bench.report.model import Run
from nemo_bench.report.runs import load_run

from .conftest import PROJECT, SMALL, environment, run_dirs

PYTHON = os.environ.get("NEMO_BENCH_NEMO_1")
pytestmark = [
    pytest.mark.train,
    pytest.mark.skipif(not PYTHON, reason="NEMO_BENCH_NEMO_1 names no interpreter with NeMo 2.0.0"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    folder = tmp_path_factory.mktemp("nemo 1, it's")
    program = folder / "program.py"
    shutil.copy(PROJECT / "tests" / "nemo_24_09" / "program.py", program)
    seen: dict[tuple[str, ...], Run] = {}

    def train(*overrides: str) -> Run:
        if overrides not in seen:
            before = run_dirs(folder)
            assert PYTHON is not None
            quoted = str(program).replace("'", "\\'")
            command = [PYTHON, str(PROJECT / "train.py"), "entrypoint=nemo_24_09", f"entrypoint.program='{quoted}'"]
            done = subprocess.run(
                [*command, *SMALL, "data.num_workers=0", *overrides],
                cwd=folder,
                env=environment(folder),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=400,
            )
            assert done.returncode == 0, done.stdout + done.stderr
            (run_dir,) = run_dirs(folder) - before
            seen[overrides] = load_run(run_dir)
        return seen[overrides]

    return train


def test_nemo_1_trains_and_its_log_reads_as_a_run(trained: Callable[..., Run]) -> None:
    run = trained()
    assert RunFolder(Path(run.path)).status().state == "completed"
    assert run.final and run.steps.step == [*range(20)]
    assert run.first_loss is not None and run.last_loss is not None and run.last_loss < 0.9 * run.first_loss
    assert (run.entrypoint, run.model, run.version) == ("nemo_24_09", "tiny", "24.11")
    packages = json.loads((Path(run.path) / "node.json").read_text())["packages"]
    assert (packages["nemo_toolkit"], packages["megatron-core"]) == ("2.0.0", "0.9.0")


def test_the_model_has_the_configuration_that_was_written(trained: Callable[..., Run]) -> None:
    folder = Path(trained().path)
    written = yaml.safe_load((folder / "nemo_24_09.yaml").read_text())["model"]
    had = yaml.safe_load((folder / "nemo" / "hparams.yaml").read_text())
    had = had.get("cfg", had)
    assert {key: had.get(key) for key in written} == written


def test_random_tokens_need_no_tokenizer_and_the_vocabulary_is_the_configured_one(trained: Callable[..., Run]) -> None:
    run = trained("data=mock", "model.vocab_size=8192", "trainer.max_steps=6")
    assert run.steps.step == [*range(6)]
    # Untrained, every token of the vocabulary is about as likely.
    assert run.first_loss is not None and abs(run.first_loss - math.log(8192)) < 1


def test_two_processes_give_the_same_losses(trained: Callable[..., Run]) -> None:
    one, two = trained(), trained("trainer.devices=2")
    assert two.gpus == 2
    for a, b in zip(one.steps.loss, two.steps.loss, strict=True):
        assert a is not None and b is not None and abs(a - b) <= 0.02  # three digits are shown
