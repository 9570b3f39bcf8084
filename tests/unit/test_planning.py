"""`estimate.py` as a user runs it: what it prints, writes, refuses, and finds."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from benchmarks.fork_server import ForkServer
from nemo_bench.checks.configuration import configuration_problems
from nemo_bench.estimate.step import estimate_of
from nemo_bench.planning.config import EstimateConfig
from nemo_bench.planning.search import overrides, search
from nemo_bench.record.machine import latest_path

from ..composing import PROJECT, composed

RUN = PROJECT / "benchmarks" / "results" / "gpu_speed" / "bf16_gbs32"
Estimate = Callable[..., subprocess.CompletedProcess[str]]


def write_check(stage: Path, cluster: str, gpu: str, content: dict[str, Any]) -> None:
    path = latest_path(str(stage), cluster, gpu)
    path.parent.mkdir()
    path.write_text(json.dumps(content))


@pytest.fixture
def estimate(tmp_path: Path, scripts: ForkServer) -> Estimate:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "STAGE_PATH": str(tmp_path), "COLUMNS": "80"}
        return scripts.run([sys.executable, str(PROJECT / "estimate.py"), *arguments], cwd=tmp_path, env=environment)

    return run


def test_a_point_in_80_columns_with_its_published_row(estimate: Estimate) -> None:
    done = estimate("precision=fp8", "scale=128gpu")
    assert done.returncode == 0 and done.stderr == ""
    assert max(map(len, done.stdout.splitlines())) <= 80
    parts = (
        "70b fp8 128gpu",
        "TP4 PP4 VP5 CP2",
        "tokens/s",
        "MFU",
        "GiB a GPU",
        "published, nvidia-24.09",
        "10.93 s: ",
    )
    assert all(part in done.stdout for part in (*parts, "100.0%", "derived from h200", "the host may be the limit"))


def test_the_last_machine_check_gives_its_rates_unless_it_is_left_out(estimate: Estimate, tmp_path: Path) -> None:
    rates = {"bf16_tflops": {"middle": 333.0, "least": 300.0}, "in_node_gb_s": {"middle": 350.0, "least": 340.0}}
    write_check(tmp_path, "slurm", "h100", {"checked_at": "yesterday", "rates": rates})
    shown = estimate("scale=64gpu").stdout
    assert "Machine check of yesterday: bf16 TFLOP/s 333, its slowest GPU 300, NVLink GB/s 350" in shown
    times_s = [
        float(re.findall(r"step time +([\d.]+) s", text)[0])
        for text in (shown, estimate("scale=64gpu", "machine_check=false").stdout)
    ]
    assert 1.7 < times_s[0] / times_s[1] < 2.3


def test_a_sweep_is_a_table_and_its_points_share_a_calibration(estimate: Estimate) -> None:
    done = estimate("-m", "scale=64,128", "calibrate=15")
    header, first, second = done.stdout.splitlines()
    assert header.split()[:4] == ["point", "step", "s", "from"]
    assert first.split()[:3] == ["70b", "bf16", "64gpu"] and first.split()[3] == "15"
    assert second.split()[3].startswith("15.0") and max(map(len, (first, second))) <= 80


def test_files_hold_the_estimate_and_the_schedule(estimate: Estimate, tmp_path: Path) -> None:
    done = estimate("scale=2gpu", "model=8b", "gpu=h200", f"calibrate={RUN}", "output=plan", "check_memory=false")
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "plan" / "estimate.json").read_text())
    uncalibrated = written["estimate"]["step_time_s"]
    assert sum(written["estimate"]["breakdown_s"].values()) == pytest.approx(uncalibrated)
    factor = written["calibration"]["factor"]
    assert factor == pytest.approx(1.014, abs=0.01) and "70b_slice bf16 1gpu" in written["calibration"]["source"]
    assert written["step_time_s"] == pytest.approx(factor * uncalibrated)
    page = (tmp_path / "plan" / "schedule.html").read_text()
    assert "Plotly.newPlot" in page and '"stage 0"' in page and 'src="http' not in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gpu=b200",), "gpu=b200: the rates of this GPU were never measured"),
        (("scale=local",), "estimates are of GPUs"),
        (("calibrate=nowhere",), "calibrate=nowhere: give a run folder"),
        (("calibrate=0",), "or the seconds of a step"),
        (("output=/proc/plan",), "output=/proc/plan: No such file or directory: name a folder"),
        (("serch",), "serch: not a verb of this command; its verbs: search"),
        (("scale=64gpu", "model.num_layers=81"), "must be a multiple of 20"),
        (("model.tensor_parallel_size=2",), "did you mean: model.tensor_model_parallel_size"),
        (("search", "scale=1gpu"), "no layout of 70b works on 1 x h100"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_what_cannot_be_is_refused(estimate: Estimate, arguments: tuple[str, ...], message: str) -> None:
    done = estimate(*arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_groups_and_values_are_those_of_train() -> None:
    choices = ["scale=128gpu", "precision=fp8", "cluster=slurm"]
    with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
        own, train = (OmegaConf.to_container(compose(name, choices), resolve=True) for name in ("estimate", "train"))
    assert isinstance(own, dict) and isinstance(train, dict)
    assert {key: value for key, value in own.items() if key in train} == train
    assert own.keys() - train.keys() == {"action", "calibrate", "machine_check", "output"}
    assert own.keys() == set(EstimateConfig.__dataclass_fields__)


def test_the_search_finds_layouts_that_work_and_the_lines_that_choose_them() -> None:
    choices = ("scale=128gpu", "precision=fp8", "data=mock")
    start = time.process_time()
    answers = search(composed(*choices))
    assert time.process_time() - start < 30
    assert len(answers) == 10 and len({answer.layout for answer in answers}) == 10
    times = [answer.step_time_s for answer in answers]
    assert times == sorted(times) and times[0] < estimate_of(composed(*choices)).step_time_s
    for answer in answers:
        cfg = composed(*choices, *overrides(composed(*choices), answer.cfg))
        assert configuration_problems(cfg) == [] and (answer.memory_gib or 0) < 80
        assert estimate_of(cfg).step_time_s == pytest.approx(answer.step_time_s)
