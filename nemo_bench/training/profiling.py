"""Profiled steps: PyTorch's profiler in the ranks that were chosen, or the range that NVIDIA Nsight Systems records."""

from __future__ import annotations

import gzip
import shutil
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.profiler import ProfilerActivity, record_function, schedule

from nemo_bench.config import ProfileConfig, TrainConfig
from nemo_bench.files import atomic_file, temporary_path, write_text
from nemo_bench.record.folder import PROFILE, EventLog
from nemo_bench.report import profile as step_profile
from nemo_bench.report import statistics


def build_profiling(cfg: TrainConfig, run_dir: Path, rank: int, events: EventLog) -> list[pl.Callback]:
    """Return the callbacks of this rank; none where nothing is profiled.

    They belong behind NeMo's timer: what the profilers do between two steps is then in no step's time.
    """
    p = cfg.profile
    if p.kind == "none":
        return []
    callbacks: list[pl.Callback] = [ProfileEvents(p, events)] if rank == 0 else []
    if rank in p.ranks:
        callbacks.append(TorchProfile(p, run_dir, rank) if p.kind == "torch" else NsysRange(p))
    return callbacks


class ProfileEvents(pl.Callback):
    """Write a `profile` event ahead of each step that a profile disturbs, so that reports leave these steps out.

    Beside the profiled steps these are the one before, in which the profiler warms up, and the one after: ranks that
    were not profiled wait in it for those that write.
    """

    def __init__(self, profile: ProfileConfig, events: EventLog) -> None:
        self.disturbed = range(profile.start_step - 1, profile.end_step + 2)
        self.events = events

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step in self.disturbed:
            self.events.write(statistics.PROFILE, after_step=trainer.global_step - 1)


class _Profile(pl.Callback):
    """Mark each profiled step, and in it the optimizer's part, from device idle to device idle.

    `mark` is a context that names a part of the profile; subclasses say what happens around each step.
    """

    def __init__(self, profile: ProfileConfig, mark: Callable[[str], Any]) -> None:
        self.profile, self.mark = profile, mark
        self.steps = range(profile.start_step, profile.end_step + 1)
        self.marks: ExitStack | None = None  # of the step under way

    def before(self, step: int) -> None: ...

    def after(self, step: int) -> None: ...

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        step = trainer.global_step
        if step in self.steps:
            _synchronize()
        self.before(step)
        if step in self.steps:
            self.marks = ExitStack()
            self.marks.enter_context(self.mark(f"{step_profile.STEP_MARK}{step}"))

    def on_before_optimizer_step(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.marks is not None:
            self.marks.enter_context(self.mark(step_profile.OPTIMIZER_MARK))

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.marks is not None:
            _synchronize()
            self.marks.close()
            self.marks = None
        self.after(trainer.global_step - 1)  # Lightning has counted this one already


class TorchProfile(_Profile):
    """Run PyTorch's profiler; write its trace, and a table of time by kernel class, on a CPU PyTorch's own."""

    def __init__(self, profile: ProfileConfig, run_dir: Path, rank: int) -> None:
        super().__init__(profile, record_function)
        self.run_dir, self.rank = run_dir, rank
        self.profiler: torch.profiler.profile | None = None

    def before(self, step: int) -> None:
        p = self.profile
        if step != p.start_step - 1:
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self.profiler = torch.profiler.profile(
            activities=activities,
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
        folder = self.run_dir / PROFILE
        folder.mkdir(exist_ok=True)
        trace = temporary_path(folder / f"rank{self.rank}.trace.json")
        try:
            profiler.export_chrome_trace(str(trace))
            with (
                open(trace, "rb") as plain,
                atomic_file(folder / f"rank{self.rank}.trace.json.gz", "wb") as file,
                gzip.open(file, "wb", compresslevel=3) as packed,  # quick: the other ranks wait
            ):
                shutil.copyfileobj(plain, packed, 1 << 20)
            try:
                if torch.cuda.is_available():
                    step_profile.write(step_profile.measure(trace, rank=self.rank), folder / f"rank{self.rank}")
                else:
                    table = profiler.key_averages().table("self_cpu_time_total", row_limit=50)
                    write_text(folder / f"rank{self.rank}.txt", table)
            except Exception:  # the trace is safe, and the table can be made of it later: no reason to end the run
                traceback.print_exc()
        finally:
            trace.unlink(missing_ok=True)


class NsysRange(_Profile):
    """Tell nsys, which this rank runs under (cluster/nsys.py), where the profiled steps begin and end.

    Not NeMo's NsysCallback: it leaves the last step out, and wraps every operation in an NVTX range of its own, which
    slows the steps (nsys does it too, if asked: `--pytorch=autograd-nvtx` in profile.nsys_args). Megatron's and
    Transformer Engine's own ranges are there.
    """

    def __init__(self, profile: ProfileConfig) -> None:
        super().__init__(profile, torch.cuda.nvtx.range)

    def before(self, step: int) -> None:
        if step == self.profile.start_step:
            _name_megatrons_parts(True)
            torch.cuda.cudart().cudaProfilerStart()

    def after(self, step: int) -> None:
        if step == self.profile.end_step:
            torch.cuda.cudart().cudaProfilerStop()
            _name_megatrons_parts(False)


def _name_megatrons_parts(enabled: bool) -> None:
    from megatron.core.utils import configure_nvtx_profiling  # not in every Megatron, and nothing else here needs it

    configure_nvtx_profiling(enabled)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
