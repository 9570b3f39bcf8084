"""`prepare_data.py`: the shards of a configuration, each a process here or a Slurm job, watched to their end."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from nemo_bench.cli import quoted_path
from nemo_bench.config import Launch, typed_as
from nemo_bench.data import shard
from nemo_bench.data.documents import format_of
from nemo_bench.data.encoder import Backend, Encoder
from nemo_bench.data.indexed_dataset import idx_path
from nemo_bench.data.preparation_config import Action, PreparationConfig
from nemo_bench.data.shard import ShardResult, ShardTask
from nemo_bench.data.tokenization import MAX_THREADS, usable_cores
from nemo_bench.errors import BenchError, RunFailed
from nemo_bench.files import dated_name
from nemo_bench.project import python_path
from nemo_bench.record.folder import tail

#: The recipe's folder for the logs of this work, under the stage folder.
LOGS = "results.data_preparation"
LOG = "log.out"
POLL_S = 0.2
GRACE_S = 10.0  # for a process that is to end


@dataclass
class Shard:
    """A shard under way: its task, the folder of its records, and how it stands."""

    task: ShardTask
    folder: Path
    process: subprocess.Popen[bytes] | None = None
    job_id: str | None = None
    state: str = "waiting"  # waiting, running, done, failed; of a job, Slurm's words meanwhile
    result: ShardResult | None = None
    error: str = ""
    exit_code: int = 0

    @property
    def ended(self) -> bool:
        return self.state in ("done", "failed")

    def progress(self) -> dict[str, Any]:
        """What its process last left; {} before it has."""
        try:
            content = json.loads((self.folder / shard.PROGRESS).read_bytes())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def end(self, exit_code: int) -> None:
        """Takes over what the process left at its end."""
        self.exit_code = exit_code
        try:
            if exit_code == 0:
                self.result = ShardResult(**json.loads((self.folder / shard.RESULT).read_bytes()))
                self.state = "done"
                return
            self.error = json.loads((self.folder / shard.ERROR).read_bytes())["message"]
        except (OSError, ValueError, KeyError):
            lines = [f"  | {line}" for log in self._logs() for line in tail(log, 15)]
            ended = f"exit status {exit_code}"
            if exit_code < 0:
                ended = f"killed by {signal.Signals(-exit_code).name}"
                if -exit_code == signal.SIGKILL:
                    ended += " (from outside, or by the kernel for want of memory: `dmesg` says)"
            self.error = "\n".join([ended, *(["the last lines of its log:", *lines] if lines else [])])
        self.state = "failed"

    def _logs(self) -> list[Path]:
        return [*self.folder.glob(LOG), *sorted(self.folder.glob("slurm-*.out"))]


def run_preparation(raw: DictConfig) -> None:
    """Does what the configuration asks for, on this machine.

    Raises:
        BenchError: the configuration cannot work, or a shard failed.
    """
    cfg = absolute_paths(typed_as(PreparationConfig, raw))
    if cfg.data.kind == "mock":
        print("data=mock are random tokens: there is nothing to prepare.")
    elif cfg.data.kind == "local":
        _prepare_local(cfg)
    elif cfg.action is Action.check:
        check(cfg)
    else:
        tasks = shard_tasks(cfg)
        if cfg.launch is Launch.dry:
            print(plan(cfg, tasks))
            print("launch=dry: nothing was started.")
            return
        waiting, results = what_is_missing(cfg, tasks)
        if waiting:
            results += _run_here(cfg, waiting)
        print(summary(cfg, tasks, results))


def absolute_paths(cfg: PreparationConfig) -> PreparationConfig:
    """The configuration with absolute paths, since jobs stand in another folder."""
    cfg.stage_path = str(Path(cfg.stage_path).absolute())
    if os.path.exists(cfg.stage_path) and not os.path.isdir(cfg.stage_path):
        raise BenchError(f"{cfg.stage_path} is a file: STAGE_PATH (or stage_path=...) must name a folder")
    cfg.download_folder = str(Path(cfg.download_folder).absolute())
    if cfg.data.folder is not None:
        cfg.data.folder = str(Path(cfg.data.folder).absolute())
    if cfg.tokenizer_folder is not None:
        cfg.tokenizer_folder = str(Path(cfg.tokenizer_folder).absolute())
    for source in cfg.sources:
        if "://" in source and not shard.is_url(source):
            raise BenchError(f"{source}: sources are http:// and https:// URLs, and paths of files")
    cfg.sources = [source if shard.is_url(source) else str(Path(source).absolute()) for source in cfg.sources]
    return cfg


def shard_tasks(cfg: PreparationConfig) -> list[ShardTask]:
    """The shards that the configuration names, in order.

    Raises:
        BenchError: it names none, or cannot work.
    """
    if cfg.data.folder is None or cfg.tokenizer_folder is None:
        raise BenchError(f"data={cfg.data.name} has no folder or tokenizer: tokenizer_folder=... and data.folder=...")
    numbered = list(enumerate(cfg.sources))
    if not numbered:
        if len(set(cfg.shards)) != len(cfg.shards) or any(number < 0 for number in cfg.shards):
            raise BenchError(f"shards={cfg.shards}: each number once, from 0 (the Pile has 0 to 29)")
        numbered = [(number, _shard_url(cfg.url, number)) for number in cfg.shards]
    if not numbered:
        raise BenchError("there is nothing to prepare: shards=[0,1] or sources=[...] name the documents")
    for name, least, value in (
        ("at_once", 1, cfg.at_once),
        ("threads", 1, cfg.threads),
        ("max_bad_share", 0, cfg.max_bad_share),
    ):
        if value is not None and not value >= least:
            raise BenchError(f"{name}={value}: at least {least}")
    if not cfg.text_key or "/" in cfg.text_key or "/" in cfg.output_prefix:
        raise BenchError(
            f"text_key={cfg.text_key} output_prefix={cfg.output_prefix}: both are part of the datasets' names, thus "
            "without slashes, and text_key names the documents' text: not empty"
        )
    for _, source in numbered:
        format_of(shard.download_name(source) if shard.is_url(source) else source)
    return [
        ShardTask(
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
        for number, source in numbered
    ]


def _shard_url(url: str, number: int) -> str:
    try:
        if url.format(shard=0) != url.format(shard=1):
            return url.format(shard=number)
    except (KeyError, IndexError, ValueError):
        pass
    raise BenchError(f"url={url}: must hold {{shard}} or {{shard:02d}}, for the shard's number")


def plan(cfg: PreparationConfig, tasks: list[ShardTask]) -> str:
    """What would be made from what, and what is in its way."""
    from nemo_bench.data.encoder import read_tokenizer

    lines = [f"{len(tasks)} dataset{'s' if len(tasks) > 1 else ''}, tokenizer {cfg.tokenizer_folder}"]
    fingerprint = None
    try:
        fingerprint = read_tokenizer(Path(tasks[0].tokenizer_folder))[1]
    except BenchError as error:
        lines.append(str(error))
    for task in tasks:
        lines.append(f"  {task.shown}\n    -> {task.prefix}.bin and .idx")
        if not task.is_url and not Path(task.source).is_file():
            lines.append("    this file is NOT THERE")
        if fingerprint is not None and not cfg.overwrite:
            try:
                if isinstance(shard.found(task, fingerprint), ShardResult):
                    lines.append("    there already")
            except BenchError as error:
                lines.append(f"    REFUSED: {error}")
    return "\n".join(lines)


def what_is_missing(cfg: PreparationConfig, tasks: list[ShardTask]) -> tuple[list[ShardTask], list[ShardResult]]:
    """The tasks that have to be done, and the datasets that are there; nothing is started before all was looked at."""
    from nemo_bench.data.encoder import read_tokenizer

    # Only the file's checksum: loading a tokenizer takes a second, and each shard does it anyway.
    _, fingerprint = read_tokenizer(Path(tasks[0].tokenizer_folder))
    waiting, results = [], []
    for task in tasks:
        found = "to be made anew" if cfg.overwrite else shard.found(task, fingerprint)
        if isinstance(found, ShardResult):
            results.append(found)
        else:
            waiting.append(task)
    missing = [task.source for task in waiting if not task.is_url and not Path(task.source).is_file()]
    if missing:
        raise BenchError(f"not there: {', '.join(missing)}\nsources=[...] names files or URLs")
    return waiting, results


def summary(cfg: PreparationConfig, tasks: list[ShardTask], results: list[ShardResult]) -> str:
    """What there is now, and how to train on it."""
    by_prefix = {result.prefix: result for result in results}
    lines = []
    for task in tasks:
        result = by_prefix[task.prefix]
        told = {
            "made": "made, read back and verified",
            "found": "made before",
            "foreign": "there before, not made by this program",
        }
        line = f"{task.name}: {result.documents:,} documents, {result.tokens:,} tokens ({told[result.state]})"
        if result.text_bytes is not None:
            taken = result.seconds["tokenise"] or 1e-9
            line += f", {result.text_bytes / 1e6 / taken:,.0f} MB/s, {result.tokens / taken:,.0f} tokens/s"
        if result.bad:
            line += f"; left out: {', '.join(f'{number:,} x {reason}' for reason, number in result.bad.items())}"
        lines.append(line)
    total = sum(result.tokens for result in results)
    lines.append(f"{len(results)} datasets in {cfg.data.folder}, {total:,} tokens")
    prefixes = [task.prefix for task in tasks]
    if [str(Path(path).absolute()) for path in cfg.data.paths] == prefixes:
        lines.append(f"python train.py data={cfg.data.name} ... trains on them")
    else:
        paths = shlex.quote(f"data.paths=[{','.join(quoted_path(prefix) for prefix in prefixes)}]")
        weights = f"data.weights=[{','.join(['1'] * len(prefixes))}]"
        lines.append(f"python train.py data={cfg.data.name} {paths} {weights} ... trains on them")
    return "\n".join(lines)


def _prepare_local(cfg: PreparationConfig) -> None:
    from nemo_bench.data.local import check_local, prepare_local

    assert cfg.data.folder is not None
    folder = Path(cfg.data.folder) / "dataset"
    if cfg.launch is Launch.dry:
        print(f"the local dataset: {folder}\nlaunch=dry: nothing was started.")
        return
    if cfg.action is Action.check:
        whole = check_local(folder, vocab_size=cfg.model.vocab_size, corpus_bytes=cfg.data.corpus_bytes)
        print(f"{whole.prefixes[0]}: {whole.documents:,} documents, {whole.tokens:,} tokens: whole")
        return
    made = prepare_local(
        folder,
        vocab_size=cfg.model.vocab_size,
        corpus_bytes=cfg.data.corpus_bytes,
        report=lambda line: print(line, flush=True),
    )
    print(f"{made.prefixes[0]}: {made.documents:,} documents, {made.tokens:,} tokens, verified")


def check(cfg: PreparationConfig) -> None:
    """Reads back every dataset of the configuration, and says how it is.

    Raises:
        BenchError: one is missing or damaged.
    """
    missing, damaged = 0, 0
    vocab_size = None
    with contextlib.suppress(BenchError):
        vocab_size = Encoder(Path(cfg.tokenizer_folder or ""), backend=Backend.tokenizers).vocab_size
    for task in shard_tasks(cfg):
        try:
            info = shard.verify(Path(task.prefix), vocab_size)
        except BenchError as error:
            there = idx_path(Path(task.prefix)).exists()
            missing, damaged = missing + (not there), damaged + there
            print(f"{task.name}: {error}")
            continue
        manifest = shard.read_manifest(Path(task.prefix))
        origin = (
            f"from {manifest['inputs']['source']}, {manifest['made_at']}" if manifest else "not made by this program"
        )
        print(
            f"{task.name}: {info.documents:,} documents, {info.tokens:,} tokens of {info.dtype}, largest id "
            f"{info.max_token_id:,}: whole ({origin})"
        )
    if missing or damaged:
        command = shlex.join(["python", "prepare_data.py", *_overrides()])
        told = [f"{missing} missing: {command}"] if missing else []
        if damaged:
            told.append(
                f"{damaged} damaged, which this makes anew, and only those that are named: {command} overwrite=true"
            )
        raise BenchError("\n".join(told))


def _overrides() -> list[str]:
    """What the user chose, without the verb."""
    from hydra.core.hydra_config import HydraConfig

    overrides = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    return [override for override in overrides if not override.startswith("action=")]


# --- here -------------------------------------------------------------------------------------------------------------


def new_shard(parent: Path, task: ShardTask) -> Shard:
    """A shard with a folder for its records, which holds its task."""
    folder = parent / task.name
    folder.mkdir(parents=True)
    # A URL may hold a password.
    os.close(os.open(folder / shard.TASK, os.O_CREAT | os.O_WRONLY, 0o600))
    with open(folder / shard.TASK, "w") as file:
        json.dump(asdict(task), file, indent=2)
    return Shard(task, folder)


def new_log_folder(stage: Path) -> Path:
    """A folder for the records of one command."""
    return stage / LOGS / dated_name()


def raise_failures(shards: list[Shard]) -> None:
    """Raises RunFailed with what the failed shards said, and the code of the first."""
    failed = [one for one in shards if one.state == "failed"]
    if not failed:
        return
    lines = [f"{one.task.name}: {one.error}\n  ({one.folder})" for one in failed]
    done = sum(one.state == "done" for one in shards)
    more = "the same command goes on from here"
    if failed[0].task.overwrite:
        more = "without overwrite=true the same command makes the others"
    lines.append(f"{len(failed)} of {len(shards)} failed, {done} are done and stay; {more}")
    code = failed[0].exit_code
    raise RunFailed("\n".join(lines), code if code > 0 else 1)


def _run_here(cfg: PreparationConfig, tasks: list[ShardTask]) -> list[ShardResult]:
    """Runs each task in a process, some at once; all end with this one, however it ends."""
    from nemo_bench.cluster import lifeline, processes
    from nemo_bench.data.progress_display import ShardDisplay
    from nemo_bench.report.terminal import make_console

    parent = new_log_folder(Path(cfg.stage_path))
    try:
        threads = cfg.threads or min(MAX_THREADS, max(1, usable_cores() // min(cfg.at_once, len(tasks))))
        shards = [new_shard(parent, replace(task, threads=threads)) for task in tasks]
    except OSError as error:
        raise BenchError(f"{error}\nSTAGE_PATH (or stage_path=...) must name a folder that can be written") from None
    read_fd, write_fd = os.pipe()
    environment = {
        **os.environ,
        "PYTHONPATH": python_path(os.environ.get("PYTHONPATH")),
        lifeline.VARIABLE: str(read_fd),
    }
    try:
        with processes.termination_raises(), ShardDisplay(make_console(), shards) as display:
            while not all(one.ended for one in shards):
                running = [one for one in shards if one.state == "running"]
                for one in shards:
                    if one.state == "waiting" and len(running) < cfg.at_once:
                        _start(one, environment, read_fd)
                        running.append(one)
                for one in running:
                    assert one.process is not None
                    if (code := one.process.poll()) is not None:
                        one.end(code)
                display.update()
                time.sleep(POLL_S)
    except KeyboardInterrupt:
        raise RunFailed("interrupted: nothing half-made is left, and the same command goes on from here", 130) from None
    except processes.Terminated as ended:
        raise RunFailed(f"ended by {ended}: the same command goes on from here", 128 + ended.signum) from None
    finally:
        _stop([one.process for one in shards if one.process is not None])
        os.close(read_fd)
        os.close(write_fd)
    raise_failures(shards)
    return [one.result for one in shards if one.result is not None]


def _stop(processes: list[subprocess.Popen[bytes]]) -> None:
    """Ends what still runs: first in a way that lets it remove what is half-made."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + GRACE_S
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _start(one: Shard, environment: dict[str, str], lifeline_fd: int) -> None:
    with open(one.folder / LOG, "ab") as log:
        one.process = subprocess.Popen(
            [sys.executable, "-u", "-m", "nemo_bench.data.shard", str(one.folder)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[lifeline_fd],
            start_new_session=True,
        )
    one.state = "running"
