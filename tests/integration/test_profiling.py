"""Profiled training, for real: traces and tables on the CPU, and ranks that run under `nsys`."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from nemo_bench.config import ProfileConfig, load, typed
from nemo_bench.record import folder as record
from nemo_bench.report import profile as step_profile
from nemo_bench.report.runs import load_run

from ..nsys import calls, install
from .conftest import PROJECT, SMALL, Run, environment, processes_of, wait_for

pytestmark = pytest.mark.train
CONFIG = PROJECT / "tests/runs/nemo-2.7.3/bf16/70b/1/20261122-172402-5f1a/config.yaml"


def test_profiled_steps_leave_a_trace_and_a_table_and_do_not_count(train: Callable[..., Run]) -> None:
    """Two ranks, of which one that does not write the record is profiled."""
    window = ("profile.start_step=4", "profile.end_step=5", "profile.ranks=[1]")
    ran = train("profile=torch", *window, "trainer.max_steps=12", "trainer.devices=2")
    folder = ran.run_dir / record.PROFILE
    assert sorted(path.name for path in folder.iterdir()) == ["rank1.trace.json.gz", "rank1.txt"]
    table = (folder / "rank1.txt").read_text()
    for operation in ("Self CPU", "aten::mm", "c10d::allreduce_", f"{step_profile.STEP_MARK}5", "optimizer"):
        assert operation in table, operation
    run = load_run(ran.run_dir)
    # Those that were profiled, the one in which the profiler warmed up, and the one in which rank 0 waited.
    excluded = dict(zip(run.steps.step, run.steps.excluded))
    assert [step for step, why in excluded.items() if why == "profile"] == [3, 4, 5, 6]
    assert run.final and run.times is not None and "4 (profile)" in ran.stdout


# Starts the ranks of the run folder as train.py does, and says how they ended.
LAUNCHER = """
import sys
from pathlib import Path
from nemo_bench.config import load
from nemo_bench.launch import point
from nemo_bench.record.folder import CONFIG, RunFolder
run = RunFolder(Path(sys.argv[1]))
point.execute(load(run.path / CONFIG), run, lambda: None)
"""


class Launched:
    """A run of two ranks of which rank 1 runs under `nsys`: the program's own path, but for the refusal on a CPU."""

    def __init__(self, stage: Path, folder: Path) -> None:
        install(folder)
        self.folder, self.run_dir = folder, folder / "run"
        self.run_dir.mkdir()
        chosen = (*SMALL, "data=mock", "trainer.devices=2", "trainer.max_steps=3", "profile=nsys", "profile.ranks=[1]")
        with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
            cfg = typed(compose("train", [*chosen, f"stage_path={stage}"]))
        text = OmegaConf.to_yaml(OmegaConf.structured(cfg))
        record.RunFolder(self.run_dir).create(config_yaml=text, command=["test"], overrides=[])
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, str(self.run_dir)],
            env={**environment(stage), "PYTHONPATH": str(PROJECT), "PATH": f"{folder}:{os.environ['PATH']}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def processes(self) -> list[int]:
        return [pid for pid in processes_of(self.run_dir) if pid != self.process.pid]

    def wait_until_wrapped(self) -> int:
        """The process number of `nsys`, once rank 1 runs under it."""
        wait_for(lambda: calls(self.folder) and len(self.processes()) == 3, "rank 1 under nsys", 60)
        return next(iter(calls(self.folder)))


def test_a_rank_trains_under_nsys(stage: Path, tmp_path: Path) -> None:
    run = Launched(stage, tmp_path / "bin")
    output, _ = run.process.communicate(timeout=200)
    assert run.process.returncode == 0, output + (run.run_dir / "rank1.out").read_text()
    ((_, arguments),) = calls(run.folder).items()
    assert f"--output={run.run_dir}/profile/rank1" in arguments
    assert arguments[-3:] == ["-m", "nemo_bench.training.rank", str(run.run_dir)]
    assert (run.run_dir / "profile/rank1.nsys-rep").exists()
    assert record.RunFolder(run.run_dir).status().state == "completed"
    assert len((run.run_dir / record.STEPS).read_text().splitlines()) == 3


def test_nsys_and_its_rank_end_with_the_launcher_and_with_each_other(stage: Path, tmp_path: Path) -> None:
    run = Launched(stage, tmp_path / "launcher")
    run.wait_until_wrapped()
    run.process.kill()
    run.process.wait()
    wait_for(lambda: not run.processes(), "the end of all processes", 30)

    run = Launched(stage, tmp_path / "rank")
    wrapper = run.wait_until_wrapped()
    (rank,) = (pid for pid in run.processes() if os.getpgid(pid) == wrapper and pid != wrapper)
    os.kill(rank, signal.SIGKILL)
    output, _ = run.process.communicate(timeout=60)
    assert run.process.returncode == 1 and "rank 1 of 2 failed" in output
    assert run.processes() == []


def test_nsys_is_told_where_the_steps_begin_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's part is played by a list; the profiler is the program's, copied as NeMo copies callbacks."""
    import torch

    from nemo_bench.training.hooks import Step
    from nemo_bench.training.profiling import build_profiling

    noted: list[str] = []
    profiler_calls = {f"cudaProfiler{what}": partial(noted.append, what.lower()) for what in ("Start", "Stop")}
    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(**profiler_calls))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", noted.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: noted.append("end"))
    cfg = load(CONFIG)
    cfg.profile = ProfileConfig(kind="nsys", start_step=2, end_step=3, ranks=[0])
    assert build_profiling(cfg, Path("run"), 1) == []
    (profiler,) = copy.deepcopy(build_profiling(cfg, Path("run"), 0))
    for number in range(5):
        noted.append(f"step {number}")
        profiler.step_start(number)
        profiler.optimizer_start()
        profiler.step_end(Step(number, 1.0, 2.5, None, 3e-4))
    profiled = [[f"nemo_bench step {number}", "nemo_bench optimizer", "end", "end"] for number in (2, 3)]
    expected = ["step 0", "step 1", "step 2", "start", *profiled[0], "step 3", *profiled[1], "stop", "step 4"]
    assert noted == expected
