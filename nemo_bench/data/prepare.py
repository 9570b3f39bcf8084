"""`prepare_data.py`: the shards of a configuration made here or as Slurm jobs, and what is there of them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from urllib.parse import urlsplit

from omegaconf import DictConfig

from nemo_bench.cli import quoted_path
from nemo_bench.cluster import jobs
from nemo_bench.cluster.processes import explained_signals
from nemo_bench.config import ComposedPoint, typed_as
from nemo_bench.data import corpus
from nemo_bench.data.config import PreparationConfig
from nemo_bench.data.documents import format_of
from nemo_bench.data.encoder import read_tokenizer
from nemo_bench.data.indexed_dataset import empty_parts, split_documents, split_shares
from nemo_bench.data.local import local_prefix, prepare_local
from nemo_bench.data.shard import Shard, datasets_in, is_made, is_url, prepare, read_manifest, verify
from nemo_bench.errors import BenchError, RunFailed
from nemo_bench.files import dated_name

LOGS = "results.data_preparation"  # the recipe's folder, in the stage folder, for the logs of this work


def run_preparation(raw: DictConfig) -> None:
    """Do what the configuration asks for, here; raise BenchError if it cannot work, or a shard failed."""
    cfg = _checked(raw)
    if cfg.data.kind == "mock":
        print("data=mock is random tokens: there is nothing to prepare.")
    elif cfg.action == "check":
        _check(cfg)
    elif cfg.launch == "dry":
        print(f"{_plan(cfg)}\nlaunch=dry: nothing was started.")
    elif cfg.data.kind == "local":
        dataset, _ = prepare_local(cfg.data, cfg.model.vocab_size)
        print(f"{dataset.prefix}: {dataset.documents:,} documents, {dataset.tokens:,} tokens")
    else:
        missing = _missing_shards(cfg)
        _make_shards(missing)
        print(_summary(cfg, missing))


def submit_preparations(points: list[ComposedPoint], *, wait: bool) -> None:
    """Submit a job for each missing shard of all points, once all have been checked, and with `wait` follow the jobs.

    Raises BenchError if a point cannot work or the scheduler refuses, RunFailed if a job did not complete.
    """
    configs = [_checked(point.config) for point in points]
    for cfg in configs:
        jobs.check_command(cfg)
        if cfg.action != "prepare" or cfg.data.kind != "megatron":
            raise BenchError(f"{cfg.action} data={cfg.data.name} needs no job: leave out hydra/launcher=...")
    dry = any(cfg.launch == "dry" for cfg in configs)
    groups = [_shards_of(cfg) if dry else _missing_shards(cfg) for cfg in configs]
    scripts = []
    for point, cfg, shards in zip(points, configs, groups):
        for shard in shards:
            folder = Path(cfg.stage_path, LOGS, dated_name(), shard.name)
            overrides = [*point.overrides, f"only={shard.number}"]
            script = jobs.command_script("prepare_data.py", overrides, cfg, f"nemo-bench-{shard.name}", folder)
            scripts.append((script, folder))
    if dry:
        print(*map(_plan, configs), sep="\n")
    if scripts:
        hint = "python prepare_data.py check reads back what they make"
        jobs.submit_commands(scripts, Path(configs[0].stage_path), hint, dry=dry, wait=wait)
    if not dry and (wait or not scripts):
        print(*map(_summary, configs, groups), sep="\n")


def _checked(raw: DictConfig) -> PreparationConfig:
    """Return the configuration with absolute sources; raise BenchError if it cannot work."""
    cfg = typed_as(PreparationConfig, raw)
    for key, name in (("text_key", cfg.text_key), ("output_prefix", cfg.output_prefix)):
        if not name or "/" in name:
            raise BenchError(f"{key}={name}: must be a part of a file name, not empty and without a slash")
    if split_shares(cfg.data.split) is None:
        raise BenchError(f"data.split={cfg.data.split}: must be three numbers, such as 99,1,0")
    cfg.sources = [source if is_url(source) else str(Path(source).absolute()) for source in cfg.sources]
    return cfg


def _shards_of(cfg: PreparationConfig) -> list[Shard]:
    """Return the shards that the configuration names; raise BenchError if it names none."""
    if cfg.data.folder is None or cfg.tokenizer_folder is None:
        raise BenchError(f"data={cfg.data.name} needs data.folder=... and tokenizer_folder=...")
    sources = dict(enumerate(cfg.sources))
    if not sources:
        if not re.fullmatch(r"[^{}]*\{shard(:\d+d)?\}[^{}]*", cfg.url):
            raise BenchError(f"url={cfg.url}: must hold {{shard}} or {{shard:02d}} for the shard's number")
        sources = {number: cfg.url.format(shard=number) for number in cfg.shards}
    sources = {number: source for number, source in sources.items() if cfg.only in (None, number)}
    if not sources:
        raise BenchError("there is nothing to prepare: shards=[0,1] or sources=[...] must name documents")
    for source in sources.values():
        format_of(urlsplit(source).path if is_url(source) else source)
    names = ("tokenizer_folder", "text_key", "encoder", "max_bad_share", "overwrite")
    options = {name: getattr(cfg, name) for name in names}
    shards = []
    for number, source in sources.items():
        prefix = f"{cfg.data.folder}/{cfg.output_prefix}_{number:02d}_{cfg.text_key}_document"
        shards.append(Shard(source, prefix, number=number, **options))
    return shards


def _missing_shards(cfg: PreparationConfig) -> list[Shard]:
    """Return the shards that have to be made; raise BenchError if one cannot be."""
    shards = _shards_of(cfg)
    _, tokenizer_sha256 = read_tokenizer(Path(shards[0].tokenizer_folder))
    missing = [shard for shard in shards if cfg.overwrite or not is_made(shard, tokenizer_sha256)]
    if absent := [shard.source for shard in missing if not is_url(shard.source) and not Path(shard.source).is_file()]:
        raise BenchError(f"not found: {', '.join(absent)}\nsources=[...] must name files, http:// or https:// URLs")
    return missing


@explained_signals("the same command continues from here")
def _make_shards(shards: list[Shard]) -> None:
    """Make one shard after the other; one that cannot be made does not stop the others."""
    failures: list[tuple[Shard, BenchError]] = []
    for shard in shards:
        try:
            prepare(shard)
        except BenchError as error:
            failures.append((shard, error))
    if failures:
        lines = [f"{shard.name}: {error}" for shard, error in failures]
        lines.append(f"{len(failures)} of {len(shards)} failed: the same command (without overwrite=true) makes them")
        raise RunFailed("\n".join(lines), failures[0][1].exit_code)


def _plan(cfg: PreparationConfig) -> str:
    """Return what would be made from what; raise BenchError if it cannot be."""
    if cfg.data.kind == "local":
        return f"the local dataset, in {cfg.data.folder}"
    shards, missing = _shards_of(cfg), _missing_shards(cfg)
    lines = [f"{len(missing)} of {len(shards)} datasets to be made, tokenizer {cfg.tokenizer_folder}"]
    for shard in shards:
        state = "" if shard in missing else " (exists already)"
        lines.append(f"  {shard.shown_source}\n    -> {shard.prefix}.bin and .idx{state}")
    return "\n".join(lines)


def _summary(cfg: PreparationConfig, made: list[Shard]) -> str:
    """Return what exists now, how Megatron will split it, and how to train on it."""
    shards, lines, tokens = _shards_of(cfg), [], 0
    for shard in shards:
        manifest = read_manifest(Path(shard.prefix))
        assert manifest is not None
        documents, tokens = manifest["documents"], tokens + manifest["tokens"]
        origin = "made, read back and verified" if shard in made else "made before"
        line = f"{shard.name}: {documents:,} documents, {manifest['tokens']:,} tokens ({origin})"
        if shard in made:
            line += f", {manifest['tokens'] / manifest['tokenising_s']:,.0f} tokens/s"
        if manifest["bad"]:
            line += f"; left out: {', '.join(f'{count:,} x {reason}' for reason, count in manifest['bad'].items())}"
        parts = ", ".join(f"{n:,} to {part}" for part, n in split_documents(cfg.data.split, documents).items())
        lines += [line, f"  data.split={cfg.data.split} gives {parts}"]
        if empty := empty_parts(cfg.data.split, documents):
            lines[-1] += f": train.py refuses that, since {' and '.join(empty)} would get none; use another data.split"
    prefixes = [shard.prefix for shard in shards]
    selection = f"data={cfg.data.name}"
    if cfg.data.paths != prefixes:
        paths = shlex.quote(f"data.paths=[{','.join(map(quoted_path, prefixes))}]")
        selection += f" {paths} data.weights=[]"
    lines.append(f"{len(shards)} datasets in {cfg.data.folder}, {tokens:,} tokens")
    return "\n".join([*lines, f"python train.py {selection} ... trains on them"])


def _check(cfg: PreparationConfig) -> None:
    """Read back every dataset named or in the folder, and print how it is; raise BenchError if one is not whole."""
    if cfg.data.kind == "local":
        named = [local_prefix(cfg.data, cfg.model.vocab_size, corpus.collect(cfg.data.corpus_bytes))]
    else:
        named = [Path(shard.prefix) for shard in _shards_of(cfg)]
    problems = 0
    for prefix in [*named, *(prefix for prefix in datasets_in(named[0].parent) if prefix not in named)]:
        try:
            info, manifest = verify(prefix)
            counts = f"{info.documents:,} documents, {info.tokens:,} tokens of {info.dtype}"
            print(f"{prefix.name}: {counts}: whole (from {manifest['inputs']['source']}, {manifest['made_at']})")
        except BenchError as error:
            problems += 1
            print(f"{prefix.name}: {error}")
    if problems:
        remedy = "the same command without `check` makes what is missing, and with overwrite=true all that it names"
        raise BenchError(f"{problems} missing or damaged: {remedy}")
