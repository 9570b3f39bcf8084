"""`report.py` as a user runs it: on real run folders, on bare logs, and on a sweep that was just run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fork_server import ForkServer

from ..reports import write_log
from .conftest import PROJECT, Run

TINY = PROJECT / "tests/runs/nemo-2.7.3/fp32/tiny"
LOGS = PROJECT / "tests/logs"
Report = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def report(tmp_path: Path, scripts: ForkServer) -> Report:
    """`report.py` with these arguments, in a folder of the test's own."""

    def run(*arguments: str, stage: Path | None = None, columns: int = 200) -> subprocess.CompletedProcess[str]:
        env = {name: value for name, value in os.environ.items() if not name.startswith("HYDRA_")}
        env |= {"STAGE_PATH": str(stage or tmp_path / "stage"), "COLUMNS": str(columns)}
        done = scripts.run([sys.executable, str(PROJECT / "report.py"), *arguments], cwd=tmp_path, env=env)
        assert "Traceback" not in done.stderr, done.stderr
        return done

    return run


def log(root: Path, gpus: int) -> Path:
    """A finished log in fp8, in the recipe's layout; its steps take 11.2 s."""
    path = root / f"24.09/fp8/70b/{gpus}/a.out"
    write_log(path, 11.2, 2 * gpus)
    return path


def results(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return content


def test_all_runs_of_the_stage_folder(report: Report, tmp_path: Path) -> None:
    shutil.copytree(TINY.parent, tmp_path / "stage/results/fp32")
    done = report()
    # One of the points has no finished run.
    assert done.returncode == 1 and done.stderr == "INCOMPLETE:\n  tiny fp32 1gpu data=mock: INCOMPLETE\n"
    assert "tiny fp32 2gpu" in done.stdout and "failed at step 0 of 40" in done.stdout
    folder = tmp_path / "stage/results/report"
    made = results(folder)
    assert len(made["runs"]) == 5 and made["verdict"] == "INCOMPLETE"
    assert (folder / "results.md").read_text().startswith("# Benchmark report")
    assert "20261122-165153-d39a" in (folder / "report.html").read_text()
    # A second report does not take the first, or another's files, for a run.
    done = report("output=stage/results/other/place", "archive=share/runs.tar.zst")
    assert done.returncode == 1 and "packed without secrets: share/runs.tar.zst" in done.stdout
    assert [path.name for path in (tmp_path / "share").iterdir()] == ["runs.tar.zst"]
    assert report().returncode == 1
    assert len(results(folder)["runs"]) == 5


def test_verdicts_and_exit_status(report: Report, tmp_path: Path) -> None:
    log(tmp_path / "results", 64)
    done = report("runs=results", "gpu=h100", "output=out")
    assert done.returncode == 0 and "35.5" in done.stdout and "70b fp8 64gpu: PASS: " in done.stdout
    assert results(tmp_path / "out")["points"][0]["verdict"]["value"] == "PASS"
    done = report("runs=results", "gpu=h100", "tolerance=0.001", "output=null")
    assert done.returncode == 1 and done.stderr == "FAIL:\n  70b fp8 64gpu: FAIL\n"
    shutil.copy(LOGS / "cancelled.out", log(tmp_path / "results", 128))
    done = report("runs=results", "gpu=h100", "output=null")
    assert done.returncode == 1 and "70b fp8 128gpu: INCOMPLETE" in done.stderr
    assert "the log ends at step 31 of 50" in done.stdout
    assert not (tmp_path / "results/report").exists()


def test_a_bare_log_and_what_the_command_line_says_of_it(report: Report, tmp_path: Path) -> None:
    job = tmp_path / "job.out"
    shutil.copy(LOGS / "nemo1_24_09.out", job)
    done = report("runs=job.out", "output=null")
    assert done.returncode == 1 and "name it with model=... precision=..." in done.stderr and "PASS" not in done.stdout
    known = ("model=70b", "precision=fp8", "gpus=64", "gpu=h100")
    done = report("runs=job.out", *known)
    assert done.returncode == 0 and "PASS" in done.stdout and (tmp_path / "report/results.json").exists()
    made = results(tmp_path / "report")
    numbers, point = made["points"][0]["numbers"], made["points"][0]
    # The recipe's arithmetic at the last step's 11.20 s
    assert round(8192 * 128 / point["last_s"]) == 93623
    for text in (f"{numbers['tokens_per_s']:,.0f}", f"{numbers['days_to_train']:.2f}", f"{numbers['mfu']:.2%}"):
        assert text in done.stdout, text
    done = report("runs=job.out", *known, "model.num_layers=4", "output=null")
    assert done.returncode == 1 and "num_layers=4, published 80" in done.stdout
    done = report("runs=job.out", *known, "total_tokens=15e12", "output=null")
    assert "days to 15T" in done.stdout and f"{15 * numbers['days_to_train']:,.2f}" in done.stdout


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("job.out", "job.out"),
        ("a b.out", "a b.out"),
        ("job é.out", "job é.out"),
        ("lr=3/job.out", "lr=3/job.out"),
        ("it's (1), {2}.out", "it's (1), {2}.out"),
        ("a b.out", "runs=a b.out"),
        ("lr=3/job.out", "runs=lr=3/job.out"),
        ("one/two/job.out", "runs=*/*/*.out"),
        ("one/two/job.out", "*/*/job.out"),
        ("back\\slash\\'.out", "back\\slash\\'.out"),
        ("job.out", "runs=[job.out]"),
    ],
)
def test_a_plain_path_is_enough(report: Report, tmp_path: Path, name: str, argument: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(LOGS / "nemo1_24_09.out", tmp_path / name)
    (tmp_path / name).with_name("gone.out").symlink_to("nowhere")  # which a pattern passes over
    done = report(argument, "model=70b", "precision=fp8", "gpus=64", "gpu=h100", "output=null")
    assert done.returncode == 0 and "PASS" in done.stdout, done.stderr


@pytest.mark.parametrize("argument", ["fifo", "bomb"])
def test_what_would_hang_is_refused(report: Report, tmp_path: Path, argument: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    shutil.copytree(next(TINY.glob("1/*d39a")), tmp_path / "bomb")
    levels = "".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10 if i else ['x'])}]\n" for i in range(12))
    (tmp_path / "bomb/config.yaml").write_text((tmp_path / "bomb/config.yaml").read_text() + levels)
    done = report(argument, "output=null")
    assert done.returncode == 2 and ("neither a file nor a folder" in done.stderr or "aliases" in done.stderr)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs=nowhere"], "runs=nowhere: there is no such file or folder"),
        (["runs=."], "runs=.: no run folder and no log with training steps there"),
        (["runs=[]"], "runs: name at least one"),
        (["runs="], "runs: name at least one"),
        (["runs=job.out", "baseline="], "baseline: name at least one"),
        (["runs=job.out", "archive=job.out/a.tar.zst", "output=null"], "archive=job.out/a.tar.zst: cannot be written"),
        ([], "there is no such file or folder"),
        (["a" * 300], "there is no such file or folder"),
        (["runs=job.out", "reference=3"], "reference=3: there is no such table"),
        (["runs=job.out", "reference=h100"], "valid: auto, nvidia-24.09, nvidia-24.12"),
        (["runs=job.out", "tolerance=five"], "tolerance=five"),
        (["runs=job.out", "tolerance=1.0"], "must be at least 0 and less than 1"),
        (["runs=job.out", "total_tokens=nan"], "must be more than 0"),
        (["runs=job.out", "gpus=0"], "must be at least 1"),
        (["runs=job.out", "model=7b"], "valid: tiny, 8b, 70b, 70b_slice, 405b"),
        (["runs=job.out", "archive=a.zip"], "must end in .tar.zst"),
        (["runs=job.out", "output=job.out"], "output=job.out: cannot be written"),
        (["runs=job.out", "output="], "output is empty"),
        (["run=job.out"], "did you mean: runs"),
        (["runs=a.out,b.out"], "runs=a.out,b.out"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_message(report: Report, tmp_path: Path, arguments: list[str], message: str) -> None:
    if "runs=." not in arguments:
        shutil.copy(LOGS / "nemo2.out", tmp_path / "job.out")
    before = sorted(tmp_path.rglob("*"))
    done = report(*arguments)
    assert done.returncode == 2 and message in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_help_and_composed_configuration(report: Report) -> None:
    done = report("--help")
    assert done.returncode == 0 and "archive=monday.tar.zst" in done.stdout and "reference: auto" in done.stdout
    done = report("--cfg", "job")
    assert done.returncode == 0 and "tolerance: 0.05" in done.stdout and "/results" in done.stdout


@pytest.mark.train
def test_a_sweep_of_real_runs(forked: Callable[..., Run], report: Report, stage: Path, tmp_path: Path) -> None:
    """Two repeats of one point, another layout, one run too short to be a result: all the way to the tables."""
    runs = [forked(), forked(), forked("trainer.devices=2", "model.tensor_model_parallel_size=2")]
    short = forked("trainer.max_steps=4")
    done = report(f"runs=[{','.join(str(run.run_dir) for run in (*runs, short))}]", "output=out")
    assert done.returncode == 0, done.stderr
    made = results(tmp_path / "out")
    by_path = {run["path"]: run for run in made["runs"]}
    for run in runs:
        found = by_path[str(run.run_dir)]
        assert found["why_not_final"] is None and found["times"]["steps"] == 20
        times = sorted(row["train_step_timing_s"] for row in run.steps)
        assert times[0] <= found["times"]["median_s"] <= times[-1]
        assert 0 < found["numbers"]["mfu"] < 1
    bad = by_path[str(short.run_dir)]
    assert bad["numbers"] is None and "not a measurement" in bad["why_not_final"]
    repeated = next(point for point in made["points"] if len(point["final_runs"]) == 2)
    assert repeated["step_time"]["degrees_of_freedom"] == 1
