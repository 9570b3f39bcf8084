"""What is recorded while a model trains. No framework: each stack has an adapter that calls these hooks."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from nemo_bench import flops
from nemo_bench.config import TrainConfig
from nemo_bench.record.folder import RunFolder
from nemo_bench.record.ranks import gathered, write_ranks
from nemo_bench.report.statistics import PROFILE
from nemo_bench.training.gpu import GpuSampler, log, open_sampler
from nemo_bench.training.known import left_out


@dataclass(frozen=True)
class Step:
    """A finished step; `loss` and `grad_norm` are numbers or tensors of one element."""

    number: int  # counts from 0
    seconds: float
    loss: Any
    grad_norm: Any  # None where it was not computed
    lr: float


class Hooks:
    """Act around the steps of a run; each event does nothing by default."""

    def train_start(self, first_step: int) -> None: ...
    def step_start(self, step: int) -> None: ...
    def optimizer_start(self) -> None: ...
    def step_end(self, step: Step) -> None: ...
    def validation_start(self, after_step: int) -> None: ...
    def validation_end(self, loss: Any) -> None: ...
    def checkpoint(self, after_step: int) -> None: ...
    def train_end(self) -> None: ...


def call(hooks: list[Hooks], event: str, *arguments: Any) -> None:
    """Tell the hooks of an event, in their order."""
    for hook in hooks:
        getattr(hook, event)(*arguments)


class RunRecorder(Hooks):
    """Write `events.jsonl` and `steps.jsonl`, on one rank, behind the `RankTelemetry` whose measurements it writes."""

    def __init__(self, cfg: TrainConfig, run: RunFolder, telemetry: RankTelemetry) -> None:
        self.cfg, self.run, self.telemetry = cfg, run, telemetry
        # Reports leave these steps out: before, the profiler warms up; after, the other ranks wait for it to write.
        p = cfg.profile
        self.disturbed = range(0) if p.kind == "none" else range(p.start_step - 1, p.end_step + 2)

    def train_start(self, first_step: int) -> None:
        if left_out:
            self.run.write_event("left_out", settings=sorted(left_out))
        self.run.write_event("training", first_step=first_step)
        # By now every rank has measured its peak, where none is published.
        measured = [float(peak["tflops"]) for peak in self.run.measured_peaks().values()]
        published = self.cfg.gpu.peak_tflops.get(self.cfg.precision.name)
        self.peak_tflops = fmean(measured) if published is None and measured else published
        self._announce(first_step)

    def step_end(self, step: Step) -> None:
        row = {
            "step": step.number,
            "loss": float(step.loss),
            "train_step_timing_s": step.seconds,
            "consumed_samples": (step.number + 1) * self.cfg.model.global_batch_size,
            "lr": step.lr,
        }
        if step.grad_norm is not None:
            row["grad_norm"] = float(step.grad_norm)
        self.row = {**row, **self._rates(step.seconds), **self.telemetry.step}
        self.run.write_step(self.row)
        self._announce(step.number + 1)

    def _rates(self, step_time_s: float) -> dict[str, float]:
        """Return a step's rates; none of a step without a time, no MFU without a peak."""
        m, gpus = self.cfg.model, self.cfg.world_size
        if step_time_s <= 0:
            return {}
        step: dict[str, Any] = {"global_batch_size": m.global_batch_size, "step_time_s": step_time_s}
        work = self.cfg.architecture.flops_per_sequence(m.seq_length)
        tflops = flops.tflops_per_gpu(flops_per_sequence=work, num_gpus=gpus, **step)
        tokens_per_s = flops.tokens_per_second(seq_length=m.seq_length, **step)
        rates = {"tokens_per_s_per_gpu": tokens_per_s / gpus, "tflops_per_gpu": tflops}
        return rates | ({"mfu": tflops / self.peak_tflops} if self.peak_tflops else {})

    def _announce(self, step: int) -> None:
        if step in self.disturbed:
            self.run.write_event(PROFILE, after_step=step - 1)

    def validation_start(self, after_step: int) -> None:
        self.run.write_event("validation", after_step=after_step)

    def validation_end(self, loss: Any) -> None:
        self.run.write_event("validated", val_loss=None if loss is None else float(loss))

    def checkpoint(self, after_step: int) -> None:
        self.run.write_event("checkpoint", after_step=after_step)


class RankTelemetry(Hooks):
    """Measure every step on every rank; after the last, rank 0 writes what all of them measured to `ranks.json`."""

    def __init__(self, cfg: TrainConfig, run: RunFolder, rank: int, matrix_tflops: float | None) -> None:
        # Nothing that NeMo cannot copy: the thread begins with the training.
        self.on_gpu, self.run, self.rank, self.matrix_tflops = cfg.gpu.device == "cuda", run, rank, matrix_tflops
        self.sampler: GpuSampler | None = None
        self.rows: list[dict[str, Any]] = []
        self.step: dict[str, Any] = {}

    def train_start(self, first_step: int) -> None:
        if self.on_gpu:
            self.device = torch.cuda.get_device_properties(torch.cuda.current_device())
            self.sampler = open_sampler(self.device)

    def step_start(self, step: int) -> None:
        if self.sampler is not None:
            self.sampler.take()  # between steps: validation, a checkpoint

    def step_end(self, step: Step) -> None:
        self.step = {}
        if self.on_gpu:
            stats = torch.cuda.memory_stats()
            self.step["peak_memory_gib"] = stats["allocated_bytes.all.peak"] / 2**30
            self.step["reserved_memory_gib"] = stats["reserved_bytes.all.current"] / 2**30
        if self.sampler is not None:
            self.step |= self.sampler.take()
        self.rows.append({"train_step_timing_s": step.seconds, **self.step})

    def train_end(self) -> None:
        if self.sampler is not None:
            self.sampler.stop()
        rank: dict[str, Any] = {"rank": self.rank, "host": socket.gethostname()}
        if self.on_gpu:
            rank |= {"local_rank": int(os.environ["LOCAL_RANK"]), "gpu_name": self.device.name}
            rank["gpu_uuid"] = f"GPU-{str(self.device.uuid).removeprefix('GPU-')}"
        if self.matrix_tflops is not None:
            rank["matrix_tflops"] = round(self.matrix_tflops, 1)
        ranks: list[Any] = [None] * torch.distributed.get_world_size()
        try:
            torch.distributed.all_gather_object(ranks, rank | gathered(self.rows))
            if self.rank == 0:
                write_ranks(self.run.path, ranks)
        except (RuntimeError, OSError) as error:  # the training is done, and its numbers are safe
            log(f"no ranks.json: {type(error).__name__}: {error}")
