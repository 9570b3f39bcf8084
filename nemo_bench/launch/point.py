"""One benchmark point from its composed configuration to its numbers: check, prepare, run, report."""

from __future__ import annotations

import math
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from nemo_bench import flops
from nemo_bench.checks.problems import problems
from nemo_bench.checks.smaller import smaller_configurations
from nemo_bench.config import Launch, TrainConfig, typed
from nemo_bench.entrypoints import entrypoint_of
from nemo_bench.errors import BenchError, ConfigurationRefused, RunFailed
from nemo_bench.launch.diagnosis import diagnose
from nemo_bench.launch.plan import profile_plan
from nemo_bench.project import python_path
from nemo_bench.record import folder as record

if TYPE_CHECKING:
    from nemo_bench.cluster.processes import Outcome

LOG_TAIL_LINES = 15
# Less than this is free where a run ended for want of disk space.
FULL_DISK_BYTES = 1 << 20


def run_point(raw: DictConfig) -> None:
    """Runs the point (or, with launch=dry, prints what would run).

    Raises:
        ConfigurationRefused: with every problem that could be found; nothing was started or written.
        RunFailed: the run was started and did not complete.
    """
    cfg = typed(raw)
    dry = cfg.launch is Launch.dry
    runs_here = not dry and cfg.cluster.scheduler == "none"
    if refused := [problem for problem in problems(cfg) if runs_here or not problem.missing]:
        raise ConfigurationRefused(refused)
    if dry:
        print(plan(cfg))
        run_dir = results_dir(cfg) / "<run>"
        if cfg.cluster.scheduler != "none":
            print("hydra/launcher=submitit_slurm prints the batch script. launch=dry: nothing was started.")
            return
        print(f"  each rank  {shlex.join(entrypoint_of(cfg).rank_command(cfg, run_dir, sys.executable))}")
        environment = entrypoint_of(cfg).environment(cfg)
        print("             " + " ".join(f"{key}={shlex.quote(value)}" for key, value in environment.items()))
        for path, text in entrypoint_of(cfg).files(cfg, run_dir).items():
            print(f"# {path}\n{text}")
        print("launch=dry: nothing was started.")
        return
    if cfg.cluster.scheduler != "none":
        raise BenchError(
            f"cluster={cfg.cluster.name}: add hydra/launcher=submitit_slurm to submit this point.\n"
            "launch=dry checks it and prints it; scale=local runs here; cluster=local uses this machine's GPUs"
        )
    _run_here(cfg)


def point_name(cfg: TrainConfig) -> str:
    """A point in a table's words: `70b fp8 128gpu`."""
    return f"{cfg.model.name} {cfg.precision.name} {cfg.world_size}gpu"


def results_dir(cfg: TrainConfig) -> Path:
    """`<stage>/results/<version>/<precision>/<model>/<gpus>`, the recipe's layout."""
    gpus = str(cfg.world_size)
    return Path(cfg.stage_path) / "results" / cfg.results_version / cfg.precision.name / cfg.model.name / gpus


def plan(cfg: TrainConfig) -> str:
    """What a point is, in words: layout, batch, work, where its results go."""
    m, gpus = cfg.model, cfg.world_size
    parameters = cfg.architecture.num_parameters
    per_sequence = cfg.architecture.flops_per_sequence(m.seq_length)
    tokens = m.seq_length * m.global_batch_size
    lines = [
        f"Llama 3.1 {m.name} ({parameters / 1e9:.3g}B parameters), {cfg.precision.name}, "
        f"{gpus} x {cfg.gpu.name} ({cfg.trainer.num_nodes} nodes x {cfg.trainer.devices}): every check passed",
        f"  layout     TP{m.tensor_model_parallel_size} PP{m.pipeline_model_parallel_size} "
        f"VP{m.virtual_pipeline_model_parallel_size or 1} CP{m.context_parallel_size} DP{cfg.data_parallel_size}"
        f"{' SP' if m.sequence_parallel and m.tensor_model_parallel_size > 1 else ''}{_bubble(cfg)}",
        f"  batch      MBS {m.micro_batch_size}, GBS {m.global_batch_size}, GA {cfg.num_micro_batches}, "
        f"sequence {m.seq_length}: {tokens:,} tokens a step",
        f"  work       {per_sequence:.4g} FLOPs a sequence, {per_sequence * m.global_batch_size:.4g} a step "
        "(the recipe's convention)",
        f"  steps      {cfg.trainer.max_steps}",
        f"  data       {cfg.data.name}: {', '.join(cfg.data.paths) or cfg.data.folder or 'random tokens'}",
        *_memory_plan(cfg),
        *profile_plan(cfg),
        f"  results    {results_dir(cfg)}/<run>/",
    ]
    return "\n".join(lines)


def _bubble(cfg: TrainConfig) -> str:
    m = cfg.model
    if m.pipeline_model_parallel_size == 1:
        return ""
    share = flops.pipeline_bubble(
        pipeline_stages=m.pipeline_model_parallel_size,
        virtual_stages=m.virtual_pipeline_model_parallel_size or 1,
        micro_batches=cfg.num_micro_batches,
    )
    return f": {share:.1%} of a step is pipeline bubble, where all stages have equal work"


def _memory_plan(cfg: TrainConfig) -> list[str]:
    if cfg.gpu.device == "cpu" or not entrypoint_of(cfg).memory_is_estimated:
        return []
    from nemo_bench.memory import GIB, estimate_memory

    needed = estimate_memory(cfg).total_bytes / GIB
    there = cfg.gpu.memory_gib or math.inf
    has = "" if cfg.gpu.memory_gib is None else f"; {cfg.gpu.name} has {there:g}"
    lines = [f"  memory     about {needed:.0f} GiB a GPU, by an estimate{has}"]
    if needed > there:
        lines.append(f"             this does not fit; what does: {smaller_configurations(cfg, there)}")
    return lines


def _run_here(cfg: TrainConfig) -> None:
    from nemo_bench.report.numbers import summarise
    from nemo_bench.report.terminal import Follower, make_console, print_summary

    console = make_console()
    if line := prepare_data(cfg):
        print(line)
    run_dir = _new_run(cfg)
    console.print(f"run folder: {run_dir}", soft_wrap=True, highlight=False)
    with Follower(cfg, run_dir, console) as follower:
        execute(cfg, run_dir, follower.tick)
    print_summary(console, summarise(run_dir))
    if (run_dir / record.PROFILE).is_dir():
        names = ", ".join(sorted(path.name for path in (run_dir / record.PROFILE).iterdir()))
        console.print(f"profile:  {run_dir / record.PROFILE}: {names}", soft_wrap=True, highlight=False)


def execute(cfg: TrainConfig, run_dir: Path, tick: Callable[[], None]) -> None:
    """Runs the ranks of a recorded run on this machine, calling `tick` while they run, and records how it ended.

    Raises:
        RunFailed: it did not complete; all ranks are gone.
    """
    from nemo_bench.cluster import processes

    entrypoint_of(cfg).write_files(cfg, run_dir)
    try:
        command = entrypoint_of(cfg).rank_command(cfg, run_dir, sys.executable)
        ranks = processes.started(command, rank_environment(cfg), run_dir, cfg.trainer.devices)
        with processes.termination_raises(), ranks as group:
            outcome = processes.wait(group, tick)
    except KeyboardInterrupt:
        record.RunFolder(run_dir).set_status(record.Status("interrupted", exit_code=130, reason="Ctrl-C"))
        raise RunFailed(f"interrupted: all ranks were ended. What was recorded is in {run_dir}", 130) from None
    except processes.Terminated as ended:
        code = 128 + ended.signum
        record.RunFolder(run_dir).set_status(record.Status("killed", exit_code=code, reason=f"{ended} from outside"))
        raise RunFailed(f"ended by {ended}: all ranks were ended. What was recorded is in {run_dir}", code) from None
    if outcome.failed_rank is not None:
        raise RunFailed(_record_failure(cfg, run_dir, outcome))
    record.RunFolder(run_dir).set_status(record.Status("completed", exit_code=0))


def rank_environment(cfg: TrainConfig) -> dict[str, str]:
    """Return the environment of every rank on this machine."""
    own_path = (
        {}
        if entrypoint_of(cfg).keeps_image_pythonpath(cfg)
        else {"PYTHONPATH": python_path(os.environ.get("PYTHONPATH"))}
    )
    return {
        **entrypoint_of(cfg).environment(cfg),
        **os.environ,  # what the user exports wins over the recipe's environment
        **cfg.cluster.env,
        **own_path,
        "PYTHONUNBUFFERED": "1",  # a killed rank's log holds its last lines
    }


def _new_run(cfg: TrainConfig) -> Path:
    from hydra.core.hydra_config import HydraConfig

    results = results_dir(cfg)
    try:
        run_dir = record.RunFolder.new(results).path
        record.RunFolder(run_dir).create(
            config_yaml=OmegaConf.to_yaml(OmegaConf.structured(cfg)),
            command=["python", *sys.argv],
            overrides=list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else [],
            ranks=cfg.world_size,
        )
    except OSError as error:
        raise BenchError(
            f"the run folder cannot be written: {error}\n"
            f"STAGE_PATH (or stage_path=...) names the folder; it is {cfg.stage_path}"
        ) from None
    return run_dir


def prepare_data(cfg: TrainConfig) -> str:
    """Builds (or finds) the local dataset and tokenizer, puts their paths into `cfg`, and says what it is."""
    if cfg.data.kind != "local":
        return ""
    from nemo_bench.data.local import prepare_local

    assert cfg.data.folder is not None
    prepared = prepare_local(
        Path(cfg.data.folder) / "dataset",
        vocab_size=cfg.model.vocab_size,
        corpus_bytes=cfg.data.corpus_bytes,
        report=lambda line: print(line, flush=True),
    )
    cfg.data.paths = [str(prefix) for prefix in prepared.prefixes]
    cfg.data.tokenizer = str(prepared.tokenizer_dir)
    return f"data: {prepared.documents:,} documents, {prepared.tokens:,} tokens, {prepared.vocab_size:,} in vocabulary"


def _record_failure(cfg: TrainConfig, run_dir: Path, outcome: Outcome) -> str:
    """Writes the failed state and returns the message: which rank, why, what to do, and its last lines."""
    rank, exit_code, state = outcome.failed_rank or 0, outcome.exit_code, "failed"
    errors = [error for error in record.RunFolder(run_dir).rank_errors() if error["time"] <= outcome.seen_at]
    # A signal is no consequence of an exception.
    first = errors[0] if errors and exit_code > 0 else None
    if first is not None:
        rank = int(first["rank"])
    refused = first is not None and first["type"] == BenchError.__name__
    diagnosis = diagnose(cfg, record.RunFolder(run_dir), rank, first)
    headline = diagnosis.headline
    if exit_code < 0:
        state = "killed"
        reason = f"killed by {signal.Signals(-exit_code).name}"
        if diagnosis.cause:
            reason += f": {diagnosis.cause}"
        elif -exit_code == signal.SIGKILL:
            reason += " (from outside, or by the kernel for want of memory: `dmesg` says)"
    elif first is not None:
        lines = str(first["message"]).strip().splitlines() or [""]
        reason = headline if refused else f"{first['type']}: {diagnosis.cause or lines[0]}"
    else:
        reason = f"exit status {exit_code}" + (f": {headline}" if headline else "")
    if shutil.disk_usage(run_dir).free < FULL_DISK_BYTES:
        # Said by whoever looks, since a rank may have had no room left to say it.
        reason = f"no space left on the disk of {cfg.stage_path}: free some, or set STAGE_PATH ({reason})"
    record.RunFolder(run_dir).set_status(record.Status(state, exit_code=exit_code, reason=reason, rank=rank))
    message = [f"rank {rank} of {cfg.world_size} failed: {reason}", *(f"  {line}" for line in diagnosis.advice)]
    if not refused:
        log = record.RunFolder(run_dir).log(rank)
        message += [f"the last lines of {log}:", *(f"  | {line}" for line in record.tail(log, LOG_TAIL_LINES))]
    return "\n".join(message)
