"""Profiled steps: PyTorch's profiler in the ranks that were chosen, or the range that NVIDIA Nsight Systems records."""

from __future__ import annotations

import gzip
import shutil
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.profiler import record_function, schedule

from nemo_bench.config import ProfileConfig, TrainConfig
from nemo_bench.files import atomic_file, temporary_path, write_json, write_text
from nemo_bench.record.folder import PROFILE
from nemo_bench.report import profile as step_profile
from nemo_bench.training.hooks import Hooks, Step


def build_profiling(cfg: TrainConfig, run_dir: Path, rank: int) -> list[Hooks]:
    """Return this rank's profiler, if it has one; what it does between two steps is in no step's time."""
    p = cfg.profile
    if p.kind == "none" or rank not in p.ranks:
        return []
    return [_TorchProfile(p, run_dir, rank) if p.kind == "torch" else _NsysRange(p)]


class _Profile(Hooks):
    """Mark each profiled step, and in it the optimizer's part, from device idle to device idle."""

    mark: Callable[[str], Any]  # a context that names a part of the profile

    def __init__(self, profile: ProfileConfig) -> None:
        self.profile = profile
        self.steps = range(profile.start_step, profile.end_step + 1)
        self.marks: ExitStack | None = None  # of the step under way

    def before(self, step: int) -> None: ...
    def after(self, step: int) -> None: ...

    def step_start(self, step: int) -> None:
        torch.cuda.synchronize()
        self.before(step)
        if step in self.steps:
            self.marks = ExitStack()
            self.marks.enter_context(self.mark(f"{step_profile.STEP_MARK}{step}"))

    def optimizer_start(self) -> None:
        if self.marks is not None:
            self.marks.enter_context(self.mark(step_profile.OPTIMIZER_MARK))

    def step_end(self, step: Step) -> None:
        if self.marks is not None:
            torch.cuda.synchronize()
            self.marks.close()
            self.marks = None
        self.after(step.number)


class _TorchProfile(_Profile):
    """Run PyTorch's profiler; write its trace, and a table of time by kernel class, on a CPU PyTorch's own."""

    mark = record_function

    def __init__(self, profile: ProfileConfig, run_dir: Path, rank: int) -> None:
        super().__init__(profile)
        self.rank, self.path = rank, run_dir / PROFILE / f"rank{rank}"
        self.profiler: torch.profiler.profile | None = None

    def before(self, step: int) -> None:
        p = self.profile
        if step == p.start_step - 1:
            self.profiler = torch.profiler.profile(
                schedule=schedule(wait=0, warmup=1, active=len(self.steps), repeat=1),
                on_trace_ready=self._write,
                record_shapes=p.record_shapes,
                with_stack=p.with_stack,
                profile_memory=p.profile_memory,
            )
            self.profiler.start()

    def after(self, step: int) -> None:
        if self.profiler is not None:
            self.profiler.step()
            if step == self.profile.end_step:
                self.profiler.stop()
                self.profiler = None

    def _write(self, profiler: torch.profiler.profile) -> None:
        self.path.parent.mkdir(exist_ok=True)
        trace = temporary_path(self.path.with_suffix(".trace.json"))
        try:
            profiler.export_chrome_trace(str(trace))
            with (
                open(trace, "rb") as plain,
                atomic_file(self.path.with_suffix(".trace.json.gz"), "wb") as file,
                gzip.open(file, "wb", compresslevel=3) as packed,  # quick: the other ranks wait
            ):
                shutil.copyfileobj(plain, packed, 1 << 20)
            try:
                if torch.cuda.is_available():
                    profile = step_profile.measure(trace, rank=self.rank)
                    write_json(self.path.with_suffix(".json"), asdict(profile))
                else:
                    table = profiler.key_averages().table("self_cpu_time_total", row_limit=50)
                    write_text(self.path.with_suffix(".txt"), table)
            except Exception:  # the trace is safe, and the table can be made of it later: no reason to end the run
                traceback.print_exc()
        finally:
            trace.unlink(missing_ok=True)


class _NsysRange(_Profile):
    """Tell nsys, which this rank runs under (cluster/nsys.py), where the profiled steps begin and end.

    Not NeMo's NsysCallback: it leaves the last step out, and its NVTX range around every operation slows steps.
    """

    mark = staticmethod(torch.cuda.nvtx.range)

    def before(self, step: int) -> None:
        if step == self.profile.start_step:
            torch.cuda.cudart().cudaProfilerStart()

    def after(self, step: int) -> None:
        if step == self.profile.end_step:
            torch.cuda.cudart().cudaProfilerStop()
