"""`prepare_data.py`: the shards of a configuration, each a process here or a Slurm job, watched to their end."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from omegaconf import DictConfig

from nemo_bench.cli import quoted_path
from nemo_bench.cluster import lifeline
from nemo_bench.cluster.processes import Terminated, termination_raises
from nemo_bench.config import Launch, typed_as
from nemo_bench.data.config import Action, PreparationConfig
from nemo_bench.data.display import ShardDisplay
from nemo_bench.data.documents import format_of
from nemo_bench.data.encoder import read_tokenizer
from nemo_bench.data.manifest import datasets_in, read_manifest, verify
from nemo_bench.data.shard import LOG, Shard, find, is_url
from nemo_bench.data.split import empty_parts
from nemo_bench.data.tokenize import MAX_THREADS, usable_cores
from nemo_bench.errors import BenchError, RunFailed
from nemo_bench.files import dated_name
from nemo_bench.project import python_path
from nemo_bench.record.folder import tail
from nemo_bench.report.terminal import make_console

#: The recipe's folder, in the stage folder, for the logs of this work.
LOGS = "results.data_preparation"
POLL_S = 0.2
GRACE_S = 10.0  # for processes to remove what is half-made


def run_preparation(raw: DictConfig) -> None:
    """Do what the configuration asks for, on this machine.

    Raises:
        BenchError: the configuration cannot work, or a shard failed.
    """
    cfg = checked(typed_as(PreparationConfig, raw))
    if cfg.data.kind == "mock":
        print("data=mock is random tokens: there is nothing to prepare.")
    elif cfg.action is Action.check:
        check(cfg)
    elif cfg.data.kind == "local":
        _prepare_local(cfg)
    elif cfg.launch is Launch.dry:
        print(f"{plan(cfg, shards_of(cfg))}\nlaunch=dry: nothing was started.")
    else:
        shards = shards_of(cfg)
        if missing := missing_shards(cfg, shards):
            _run_here(cfg, missing)
        print(summary(cfg, shards))


def checked(cfg: PreparationConfig) -> PreparationConfig:
    """Return the configuration with absolute sources; raise BenchError if it cannot work."""
    if os.path.exists(cfg.stage_path) and not os.path.isdir(cfg.stage_path):
        raise BenchError(f"{cfg.stage_path} is a file: STAGE_PATH (or stage_path=...) must name a folder")
    for key, name in (("text_key", cfg.text_key), ("output_prefix", cfg.output_prefix)):
        if not name or "/" in name:
            raise BenchError(f"{key}={name}: must be a part of a file name, not empty and without a slash")
    for source in cfg.sources:
        if "://" in source and not is_url(source):
            raise BenchError(f"{source}: sources must be http:// or https:// URLs, or paths of files")
    cfg.sources = [source if is_url(source) else str(Path(source).absolute()) for source in cfg.sources]
    return cfg


# --- shards -----------------------------------------------------------------------------------------------------------


def shards_of(cfg: PreparationConfig) -> list[Shard]:
    """Return the shards that the configuration names; raise BenchError if it names none, or wrong ones."""
    if cfg.data.folder is None or cfg.tokenizer_folder is None:
        raise BenchError(f"data={cfg.data.name} needs data.folder=... and tokenizer_folder=...")
    sources = dict(enumerate(cfg.sources))
    if not sources:
        if len(set(cfg.shards)) != len(cfg.shards) or any(number < 0 for number in cfg.shards):
            raise BenchError(f"shards={cfg.shards}: must hold each number once, from 0 (the Pile has 0 to 29)")
        sources = {number: _shard_url(cfg.url, number) for number in cfg.shards}
    if not sources:
        raise BenchError("there is nothing to prepare: shards=[0,1] or sources=[...] must name documents")
    for source in sources.values():
        format_of(source.partition("#")[0].partition("?")[0] if is_url(source) else source)
    return [
        Shard(
            source=source,
            prefix=str(Path(cfg.data.folder) / f"{cfg.output_prefix}_{number:02d}_{cfg.text_key}_document"),
            tokenizer_folder=cfg.tokenizer_folder,
            text_key=cfg.text_key,
            append_eod=cfg.append_eod,
            encoder=cfg.encoder.name,
            max_bad_share=cfg.max_bad_share,
            download_folder=cfg.download_folder,
            keep_download=cfg.keep_downloads,
            threads=cfg.threads,
            overwrite=cfg.overwrite,
        )
        for number, source in sources.items()
    ]


def _shard_url(url: str, number: int) -> str:
    try:
        if url.format(shard=0) != url.format(shard=1):
            return url.format(shard=number)
    except (KeyError, IndexError, ValueError):  # other braces
        pass
    raise BenchError(f"url={url}: must hold {{shard}} or {{shard:02d}} for the shard's number")


def missing_shards(cfg: PreparationConfig, shards: list[Shard]) -> list[Shard]:
    """Return the shards that have to be made. Nothing starts before all have been checked."""
    # Only the file's checksum: loading a tokenizer takes a second.
    _, tokenizer_sha256 = read_tokenizer(Path(shards[0].tokenizer_folder))
    missing = [shard for shard in shards if cfg.overwrite or find(shard, tokenizer_sha256)]
    if absent := [shard.source for shard in missing if not shard.is_url and not Path(shard.source).is_file()]:
        raise BenchError(f"not found: {', '.join(absent)}\nsources=[...] must name files or URLs")
    return missing


def plan(cfg: PreparationConfig, shards: list[Shard]) -> str:
    """Return what would be made from what, and what is in the way."""
    lines = [f"{len(shards)} datasets, tokenizer {cfg.tokenizer_folder}"]
    lines += [f"  {shard.shown_source}\n    -> {shard.prefix}.bin and .idx" for shard in shards]
    try:
        missing = missing_shards(cfg, shards)
        lines += [f"{shard.name} exists already" for shard in shards if shard not in missing]
    except BenchError as error:
        lines.append(f"REFUSED: {error}")
    return "\n".join(lines)


_ORIGINS = {
    "made": "made, read back and verified",
    "found": "made before",
    "foreign": "existed before, not made by this program",
}


def summary(cfg: PreparationConfig, shards: list[Shard]) -> str:
    """Return what exists now, and how to train on it."""
    lines = []
    for shard in shards:
        line = f"{shard.name}: {shard.documents:,} documents, {shard.tokens:,} tokens ({_ORIGINS[shard.origin]})"
        if shard.origin == "made":
            seconds = shard.seconds["tokenising"] or 1e-9
            line += f", {shard.text_bytes / 1e6 / seconds:,.0f} MB/s, {shard.tokens / seconds:,.0f} tokens/s"
        if shard.bad:
            line += f"; left out: {', '.join(f'{number:,} x {reason}' for reason, number in shard.bad.items())}"
        if parts := empty_parts(cfg.data.split, shard.documents):
            line += f"; too few for data.split={cfg.data.split}: none for {' and '.join(parts)}"
        lines.append(line)
    lines.append(f"{len(shards)} datasets in {cfg.data.folder}, {sum(shard.tokens for shard in shards):,} tokens")
    prefixes = [shard.prefix for shard in shards]
    selection = f"data={cfg.data.name}"
    if cfg.data.paths != prefixes:
        paths = shlex.quote(f"data.paths=[{','.join(quoted_path(prefix) for prefix in prefixes)}]")
        selection += f" {paths} data.weights=[{','.join(['1'] * len(prefixes))}]"
    lines.append(f"python train.py {selection} ... trains on them")
    return "\n".join(lines)


def _prepare_local(cfg: PreparationConfig) -> None:
    from nemo_bench.data.local import prepare_local

    folder = Path(cfg.data.folder or "")
    if cfg.launch is Launch.dry:
        print(f"the local dataset, in {folder}\nlaunch=dry: nothing was started.")
        return
    dataset = prepare_local(
        folder,
        vocab_size=cfg.model.vocab_size,
        corpus_bytes=cfg.data.corpus_bytes,
        report=lambda line: print(line, flush=True),
    )
    print(f"{dataset.prefix}: {dataset.documents:,} documents, {dataset.tokens:,} tokens")


def _named_prefixes(cfg: PreparationConfig) -> list[Path]:
    if cfg.data.kind != "local":
        return [Path(shard.prefix) for shard in shards_of(cfg)]
    from nemo_bench.data.local import local_prefix

    folder = Path(cfg.data.folder or "")
    return [local_prefix(folder, vocab_size=cfg.model.vocab_size, corpus_bytes=cfg.data.corpus_bytes)]


def check(cfg: PreparationConfig) -> None:
    """Read back every dataset of the configuration, and every other one in the folder; print how each is.

    Raises:
        BenchError: one is missing or damaged.
    """
    from hydra.core.hydra_config import HydraConfig

    named = _named_prefixes(cfg)
    others = [prefix for prefix in datasets_in(named[0].parent) if prefix not in named]
    problems = 0
    for prefix in [*named, *others]:
        try:
            info, manifest = verify(prefix), read_manifest(prefix)
        except BenchError as error:
            problems += 1
            print(f"{prefix.name}: {error}")
            continue
        origin = "not made by this program"
        if manifest is not None:
            origin = f"from {manifest['inputs']['source']}, {manifest['made_at']}"
        print(
            f"{prefix.name}: {info.documents:,} documents, {info.tokens:,} tokens of {info.dtype}, largest id "
            f"{info.max_token_id:,}: whole ({origin})"
        )
    if problems:
        overrides = [override for override in HydraConfig.get().overrides.task if not override.startswith("action=")]
        again = shlex.join(["python", "prepare_data.py", *overrides])
        raise BenchError(
            f"{problems} missing or damaged: {again} makes what is missing; with overwrite=true it makes all that it "
            "names again"
        )


# --- processes --------------------------------------------------------------------------------------------------------


def new_folder(cfg: PreparationConfig) -> Path:
    """Return the name of a new folder for the records and logs of one command."""
    return Path(cfg.stage_path, LOGS, dated_name())


def begin(shard: Shard, parent: Path) -> None:
    """Give a shard a folder for its record and log."""
    shard.folder = str(parent / shard.name)
    try:
        Path(shard.folder).mkdir(parents=True)
        shard.save()
    except OSError as error:
        raise BenchError(f"{error}\nSTAGE_PATH (or stage_path=...) must name a folder that you may write in") from None


def command(shard: Shard) -> list[str]:
    """Return the command that makes the shard."""
    return [sys.executable, "-u", "-m", "nemo_bench.data.shard", shard.folder]


def end(shard: Shard, exit_code: int) -> None:
    """Take over the last record of a process that has ended; without one, say how it ended."""
    shard.refresh()
    if shard.ended:
        return
    shard.state, shard.exit_code, shard.error = "failed", exit_code, f"exit status {exit_code}"
    if exit_code < 0:
        shard.error = f"killed by {signal.Signals(-exit_code).name} (for lack of memory? see `dmesg`)"
    logs = [*Path(shard.folder).glob(LOG), *sorted(Path(shard.folder).glob("slurm-*.out"))]
    if lines := [f"  | {line}" for log in logs for line in tail(log, 15)]:
        shard.error = "\n".join([shard.error, "the last lines of its log:", *lines])


def raise_failures(shards: list[Shard]) -> None:
    """Raise RunFailed with the errors of the shards that failed, and the exit code of the first."""
    failed = [shard for shard in shards if shard.state == "failed"]
    if failed:
        done = sum(shard.state == "done" for shard in shards)
        lines = [f"{shard.name}: {shard.error}\n  ({shard.folder})" for shard in failed]
        lines.append(
            f"{len(failed)} of {len(shards)} failed, {done} are done and stay; the same command (without "
            "overwrite=true) continues from here"
        )
        raise RunFailed("\n".join(lines), max(failed[0].exit_code, 1))


def _run_here(cfg: PreparationConfig, shards: list[Shard]) -> None:
    """Make each shard in a process, `at_once` of them at a time; all end with this process, however it ends."""
    threads = cfg.threads or min(MAX_THREADS, max(1, usable_cores() // min(cfg.at_once, len(shards))))
    parent = new_folder(cfg)
    for shard in shards:
        shard.threads = threads
        begin(shard, parent)
    processes: dict[str, subprocess.Popen[bytes]] = {}
    read_fd, write_fd = os.pipe()
    try:
        with termination_raises(), ShardDisplay(make_console(), shards) as display:
            while not all(shard.ended for shard in shards):
                for shard in shards:
                    if shard.state == "running":
                        shard.refresh()
                        if (code := processes[shard.name].poll()) is not None:
                            end(shard, code)
                    elif shard.state == "waiting" and sum(s.state == "running" for s in shards) < cfg.at_once:
                        processes[shard.name] = _start(shard, read_fd)
                        shard.state = "running"
                display.update()
                time.sleep(POLL_S)
    except KeyboardInterrupt:
        raise RunFailed("interrupted: nothing half-made is left; the same command continues from here", 130) from None
    except Terminated as ended:
        raise RunFailed(f"ended by {ended}: the same command continues from here", 128 + ended.signum) from None
    finally:
        _stop(list(processes.values()))
        os.close(read_fd)
        os.close(write_fd)
    raise_failures(shards)


def _start(shard: Shard, lifeline_fd: int) -> subprocess.Popen[bytes]:
    search_path = python_path(os.environ.get("PYTHONPATH"))
    with open(Path(shard.folder, LOG), "ab") as log:
        return subprocess.Popen(
            command(shard),
            env={**os.environ, "PYTHONPATH": search_path, lifeline.VARIABLE: str(lifeline_fd)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[lifeline_fd],
            start_new_session=True,
        )


def _stop(processes: list[subprocess.Popen[bytes]]) -> None:
    """End what still runs, first in a way that lets it remove what is half-made."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + GRACE_S
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
