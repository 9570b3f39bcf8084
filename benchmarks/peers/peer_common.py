"""What the peers share: the slice of the model that they train, the timed loop, and the result file."""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

# The recipe's optimizer. Its 2000 warm-up steps keep the weights near where they started, as in our own short runs.
LEARNING_RATE = 3e-4
LR_WARMUP_STEPS = 2000
BETAS = (0.9, 0.95)
EPSILON = 1e-8
WEIGHT_DECAY = 0.1
CLIP_GRAD = 1.0

# Random tokens carry nothing to learn, so the first loss is ln(vocabulary) plus half the variance of the first logits:
# 0.5 with torchtitan's initialisation, 1.6 with Transformers' at hidden size 8192.
FIRST_LOSS_BELOW, FIRST_LOSS_ABOVE = 0.2, 3.0


@dataclass(frozen=True)
class Slice:
    """One run: the architecture, the batch, how many steps. The defaults are four layers of Llama 3.1 70B."""

    precision: str
    layers: int
    hidden_size: int
    ffn_hidden_size: int
    attention_heads: int
    query_groups: int
    vocab_size: int
    rope_base: float
    seq_length: int
    global_batch_size: int  # in sequences; the micro-batch is one sequence
    steps: int  # warm-up included
    warmup: int  # steps that the statistics leave out
    seed: int
    device: str
    compile: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every peer has."""
    parser.add_argument("--precision", choices=("bf16", "fp8"), default="bf16")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=8192)
    parser.add_argument("--ffn-hidden-size", type=int, default=28672)
    parser.add_argument("--attention-heads", type=int, default=64)
    parser.add_argument("--query-groups", type=int, default=8)
    parser.add_argument("--vocab-size", type=int, default=128256)
    parser.add_argument("--rope-base", type=float, default=500000.0)
    parser.add_argument("--seq-length", type=int, default=8192)
    parser.add_argument("--global-batch-size", type=int, default=4, help="sequences a step, one a micro-batch")
    parser.add_argument("--steps", type=int, default=30, help="steps in all, warm-up included")
    parser.add_argument("--warmup", type=int, default=8, help="steps left out of the statistics")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to check a tiny model")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--output", type=Path, required=True, help="the result, JSON")


def slice_of(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> Slice:
    """The run that was asked for; a choice that cannot run ends the process with code 2 and says why."""
    fields = {name: getattr(arguments, name) for name in Slice.__dataclass_fields__}
    for name, value in fields.items():
        if isinstance(value, int) and not isinstance(value, bool) and name not in ("warmup", "seed") and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    run = Slice(**fields)
    if not 0 <= run.warmup < run.steps:
        parser.error(f"--warmup must be from 0 to --steps - 1 = {run.steps - 1}, not {run.warmup}")
    if run.hidden_size % run.attention_heads or run.attention_heads % run.query_groups:
        parser.error("--attention-heads must divide --hidden-size, and --query-groups must divide --attention-heads")
    return run


def stop(message: str, code: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


def prepare(run: Slice) -> None:
    """Sets PyTorch's allocator as torchtitan's own run_train.sh does, before PyTorch is imported.

    Ends the process with code 2 where there is no such device, or float8 on a CPU would have to be compiled.
    """
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if run.device == "cpu" and run.precision == "fp8" and run.compile:
        stop("float8 is emulated on a CPU without compilation only: add --no-compile", 2)
    check_device(run.device)


def check_device(device: str) -> None:
    """Ends the process with code 2 where there is no such device."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        stop("PyTorch sees no GPU here; for a check of a tiny model on the CPU add --device cpu and small sizes", 2)


def random_batches(run: Slice) -> list[Any]:
    """A tensor of tokens a micro-batch, on the CPU, `seq_length + 1` long: inputs and targets overlap by all but one.

    All are drawn before the clock starts, so that no step pays for them.
    """
    import torch

    generator = torch.Generator().manual_seed(run.seed)
    shape = (run.steps * run.global_batch_size, 1, run.seq_length + 1)
    return list(torch.randint(run.vocab_size, shape, generator=generator))


def run_steps(run: Slice, step: Callable[[int], Any]) -> dict[str, Any]:
    """Calls `step` for 0, 1, ... and returns each step's time and loss.

    A step's time reaches from one synchronisation of the device to the next, so that together they are the wall time.

    :param step: trains one global batch and returns its mean loss, as a number or a tensor
    :return: step_times_s, losses, the statistics of the steps after the warm-up, what was compiled, the device's peak
        memory
    """
    import torch

    def synchronise() -> None:
        if run.device == "cuda":
            torch.cuda.synchronize()

    times_s, losses = [], []
    # No collection falls into a step: torchtitan does the same, and it costs the other nothing.
    gc.collect()
    gc.disable()
    try:
        if run.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        synchronise()
        before = time.perf_counter()
        for index in range(run.steps):
            loss = step(index)
            synchronise()
            now = time.perf_counter()
            times_s.append(now - before)
            losses.append(float(loss))
            print(f"step {index + 1}/{run.steps}: {times_s[-1]:.3f} s, loss {losses[-1]:.4f}", flush=True)
            if index == 0:
                check_first_loss(losses[0], run.vocab_size)
            before = now
    finally:
        gc.enable()
    if not all(math.isfinite(loss) for loss in losses):
        stop(f"the loss is not finite: {losses}", 1)
    counted = times_s[run.warmup :]
    median_s = statistics.median(counted)
    return {
        "step_times_s": times_s,
        "losses": losses,
        "median_step_s": median_s,
        "mean_step_s": statistics.fmean(counted),
        "min_step_s": min(counted),
        "max_step_s": max(counted),
        "compiled_graphs": compiled_graphs(),
        "tokens_per_s": run.global_batch_size * run.seq_length / median_s,
        "peak_memory_allocated_bytes": torch.cuda.max_memory_allocated() if run.device == "cuda" else None,
        "peak_memory_reserved_bytes": torch.cuda.max_memory_reserved() if run.device == "cuda" else None,
    }


def compiled_graphs() -> dict[str, int]:
    """How many graphs torch.compile made so far, and at how many places it had to break one (0, for a fair figure)."""
    from torch._dynamo.utils import counters

    return {"graphs": counters["stats"]["unique_graphs"], "breaks": sum(counters["graph_break"].values())}


def check_first_loss(loss: float, vocab_size: int) -> None:
    """Ends the process with code 1 where an untrained model's loss is not what random tokens give."""
    expected = math.log(vocab_size)
    if not expected - FIRST_LOSS_BELOW <= loss <= expected + FIRST_LOSS_ABOVE:
        stop(
            f"the first loss is {loss:.3f}; an untrained model on random tokens has "
            f"{expected - FIRST_LOSS_BELOW:.2f} to {expected + FIRST_LOSS_ABOVE:.2f}: this is not the model asked for",
            1,
        )


def environment(packages: tuple[str, ...]) -> dict[str, Any]:
    """The machine and the versions: of Python, PyTorch, CUDA, cuDNN and of `packages` (None where one is missing)."""
    import torch

    versions: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    found: dict[str, Any] = {"versions": versions, "gpu": None}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = {"name": properties.name, "memory_bytes": properties.total_memory}
        versions["cuda"] = torch.version.cuda
        versions["cudnn"] = str(torch.backends.cudnn.version())
    return found


def write_result(output: Path, result: dict[str, Any]) -> None:
    """Writes JSON aside, then renames: a file of this name is a whole one."""
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = output.with_name(f".{output.name}.{os.getpid()}")
    with aside.open("w", encoding="utf-8") as file:
        json.dump(result, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    aside.replace(output)
    print(f"wrote {output}")


def result_of(peer: str, run: Slice, settings: dict[str, Any], packages: tuple[str, ...]) -> dict[str, Any]:
    """The part of a result that does not come from the steps."""
    return {"peer": peer, "precision": run.precision, "run": asdict(run), "settings": settings, **environment(packages)}
