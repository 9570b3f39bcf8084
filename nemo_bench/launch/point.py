"""One benchmark point on this machine, from its composed configuration to its numbers: check, prepare, run, report."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from nemo_bench.checks.datasets import dataset_remarks
from nemo_bench.checks.problems import problems
from nemo_bench.cluster import processes
from nemo_bench.config import TrainConfig
from nemo_bench.data.local import prepare_local
from nemo_bench.entrypoints import entrypoint_of
from nemo_bench.errors import BenchError, ConfigurationRefused, RunFailed
from nemo_bench.files import dated_name, write_text
from nemo_bench.launch.batch_script import rank_environment
from nemo_bench.launch.diagnosis import diagnose
from nemo_bench.launch.plan import plan, rank_plan, results_dir
from nemo_bench.record.folder import RunFolder, Status, tail
from nemo_bench.report.runs import load_run
from nemo_bench.report.terminal import Follower, make_console, print_summary

LOG_TAIL_LINES = 15
FULL_DISK_BYTES = 1 << 20  # with less than this free, a run ended for want of disk space


def run_point(cfg: TrainConfig) -> None:
    """Run the point, or print what would run; ConfigurationRefused with nothing started, RunFailed if incomplete."""
    dry, here = cfg.launch == "dry", cfg.cluster.scheduler == "none"
    broken = problems(cfg)
    if refused := [problem for problem in broken if not problem.missing or (here and not dry)]:
        raise ConfigurationRefused(refused)
    if dry:
        print(plan(cfg, missing=broken))
        print(f"{rank_plan(cfg)}\n" if here else "hydra/launcher=submitit_slurm prints the batch script. ", end="")
        print("launch=dry: nothing was started.")
    elif not here:
        others = "launch=dry checks it and prints it; scale=local runs here; cluster=local uses this machine's GPUs"
        raise BenchError(
            f"cluster={cfg.cluster.name}: add hydra/launcher=submitit_slurm to submit this point.\n{others}"
        )
    else:
        for _ in range(cfg.repeats):
            _run_here(cfg)


def _run_here(cfg: TrainConfig) -> None:
    console = make_console()
    cfg = prepare_data(cfg)
    overrides = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    run = new_run(cfg, overrides)
    console.print(f"run folder: {run.path}", soft_wrap=True, highlight=False)
    with Follower(cfg, run.path, console) as follower:
        execute(cfg, run, follower.tick)
    print_summary(console, load_run(run.path))


def prepare_data(cfg: TrainConfig) -> TrainConfig:
    """Build (or find) the local dataset and tokenizer; return the configuration with their paths."""
    if cfg.data.kind != "local":
        for remark in dataset_remarks(tuple(cfg.data.paths), cfg.data.tokenizer or ""):
            print(f"data: {remark}", flush=True)
        return cfg
    info, manifest = prepare_local(cfg.data, cfg.model.vocab_size)
    print(f"data: {info.documents:,} documents, {info.tokens:,} tokens, {manifest['vocab_size']:,} in vocabulary")
    folder = info.prefix.parent
    return replace(cfg, data=replace(cfg.data, paths=[str(info.prefix)], tokenizer=str(folder / "tokenizer")))


def new_run(cfg: TrainConfig, overrides: list[str], state: str = "running") -> RunFolder:
    """Record a run that is about to be started or submitted, with its configuration and its program's as they are."""
    run, command = RunFolder(results_dir(cfg) / dated_name()), ["python", *sys.argv]
    config_yaml, max_steps = OmegaConf.to_yaml(OmegaConf.structured(cfg)), cfg.trainer.max_steps
    run.create(config_yaml=config_yaml, command=command, overrides=overrides, max_steps=max_steps, state=state)
    for path, text in entrypoint_of(cfg).files(cfg, run.path).items():
        write_text(path, text)
    return run


def execute(cfg: TrainConfig, run: RunFolder, tick: Callable[[], None]) -> None:
    """Run a recorded run's ranks here, calling `tick`, and record how it ended; RunFailed if it did not complete."""
    try:
        command = entrypoint_of(cfg).rank_command(cfg, run.path, sys.executable)
        ranks = processes.started(command, rank_environment(cfg, os.environ), run.path, cfg.trainer.devices)
        advice = f"all ranks were ended. What was recorded is in {run.path}"
        with processes.explained_signals(advice), ranks as group:
            while (outcome := group.poll()) is None:
                tick()
                time.sleep(0.1)
            tick()
    except RunFailed as ended:
        state = "interrupted" if ended.exit_code == 128 + signal.SIGINT else "killed"
        run.set_status(Status(state, exit_code=ended.exit_code, reason=str(ended).partition(":")[0]))
        raise
    if outcome.failed_rank is not None:
        raise RunFailed(record_failure(cfg, run, outcome))
    run.set_status(Status("completed", exit_code=0))
    if (status := run.status()).state != "completed":
        raise RunFailed(f"the run is not complete: {status.reason}\nits record is in {run.path}")


def record_failure(cfg: TrainConfig, run: RunFolder, outcome: processes.Outcome) -> str:
    """Record the failed state and return the message: which rank, why, what to do, and its last lines."""
    errors = (error for error in run.rank_errors() if error["time"] <= outcome.seen_at)
    error = next(errors, None) if outcome.exit_code > 0 else None  # no exception causes a signal
    rank = int(error["rank"]) if error else outcome.failed_rank or 0
    reason, advice = diagnose(cfg, run, rank, error)
    code = outcome.exit_code
    if error is None:
        how = f"exit status {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
        how += " (from outside, or by the kernel for want of memory: `dmesg` says)" if code == -signal.SIGKILL else ""
        reason = f"{how}: {reason}" if reason else how
    if shutil.disk_usage(run.path).free < FULL_DISK_BYTES:
        # A rank may have had no room left to say it.
        reason = f"no space left on the disk of {cfg.stage_path}: free some, or set STAGE_PATH ({reason})"
    run.set_status(Status("killed" if code < 0 else "failed", exit_code=code, reason=reason, rank=rank))
    message = [f"rank {rank} of {cfg.world_size} failed: {reason}", *(f"  {line}" for line in advice)]
    if error is None or error["type"] != BenchError.__name__:
        last_lines = tail(run.log(rank), LOG_TAIL_LINES)
        message += [f"the last lines of {run.log(rank)}:", *(f"  | {line}" for line in last_lines)]
    return "\n".join(message)
