"""`prepare_data.py`: the shards of a configuration, what is missing of them, and what is there."""

from __future__ import annotations

import re
import shlex
import signal
from functools import partial
from pathlib import Path

from omegaconf import DictConfig

from nemo_bench.cli import quoted_path
from nemo_bench.cluster.processes import Terminated, termination_raises
from nemo_bench.config import Launch, typed_as
from nemo_bench.data.config import PreparationConfig
from nemo_bench.data.documents import format_of
from nemo_bench.data.encoder import read_tokenizer
from nemo_bench.data.manifest import datasets_in, read_manifest, verify
from nemo_bench.data.shard import Shard, is_url, prepare, why_missing
from nemo_bench.data.split import empty_parts, split_documents, split_shares
from nemo_bench.errors import BenchError, RunFailed


def run_preparation(raw: DictConfig) -> None:
    """Do what the configuration asks for, here; raise BenchError if it cannot work, or a shard failed."""
    cfg = checked(typed_as(PreparationConfig, raw))
    if cfg.data.kind == "mock":
        print("data=mock is random tokens: there is nothing to prepare.")
    elif cfg.action == "check":
        check(cfg)
    elif cfg.data.kind == "local":
        _prepare_local(cfg)
    elif cfg.launch is Launch.dry:
        print(f"{plan(cfg, shards_of(cfg))}\nlaunch=dry: nothing was started.")
    else:
        shards = list(shards_of(cfg).values())
        missing = missing_shards(cfg, shards)
        _make_shards(missing)
        print(summary(cfg, shards, missing))


def checked(cfg: PreparationConfig) -> PreparationConfig:
    """Return the configuration with absolute sources; raise BenchError if it cannot work."""
    for key, name in (("text_key", cfg.text_key), ("output_prefix", cfg.output_prefix)):
        if not name or "/" in name:
            raise BenchError(f"{key}={name}: must be a part of a file name, not empty and without a slash")
    if split_shares(cfg.data.split) is None:
        raise BenchError(f"data.split={cfg.data.split}: must be three numbers, such as 99,1,0")
    for source in cfg.sources:
        if "://" in source and not is_url(source):
            raise BenchError(f"{source}: sources must be http:// or https:// URLs, or paths of files")
    cfg.sources = [source if is_url(source) else str(Path(source).absolute()) for source in cfg.sources]
    return cfg


def shards_of(cfg: PreparationConfig) -> dict[int, Shard]:
    """Return the shards that the configuration names, by number; raise BenchError if it names none."""
    if cfg.data.folder is None or cfg.tokenizer_folder is None:
        raise BenchError(f"data={cfg.data.name} needs data.folder=... and tokenizer_folder=...")
    sources = dict(enumerate(cfg.sources))
    if not sources:
        if len(set(cfg.shards)) != len(cfg.shards) or any(number < 0 for number in cfg.shards):
            raise BenchError(f"shards={cfg.shards}: must hold each number once, from 0 (the Pile has 0 to 29)")
        if not re.fullmatch(r"[^{}]*\{shard(:\d+d)?\}[^{}]*", cfg.url):
            raise BenchError(f"url={cfg.url}: must hold {{shard}} or {{shard:02d}} for the shard's number")
        sources = {number: cfg.url.format(shard=number) for number in cfg.shards}
    sources = {number: source for number, source in sources.items() if cfg.only in (None, number)}
    if not sources:
        raise BenchError("there is nothing to prepare: shards=[0,1] or sources=[...] must name documents")
    for source in sources.values():
        format_of(source.partition("#")[0].partition("?")[0] if is_url(source) else source)
    return {
        number: Shard(
            source=source,
            prefix=str(Path(cfg.data.folder) / f"{cfg.output_prefix}_{number:02d}_{cfg.text_key}_document"),
            tokenizer_folder=cfg.tokenizer_folder,
            text_key=cfg.text_key,
            encoder=cfg.encoder,
            max_bad_share=cfg.max_bad_share,
            threads=cfg.threads,
            overwrite=cfg.overwrite,
        )
        for number, source in sources.items()
    }


def missing_shards(cfg: PreparationConfig, shards: list[Shard]) -> list[Shard]:
    """Return the shards that have to be made; raise BenchError if one cannot be."""
    _, tokenizer_sha256 = read_tokenizer(Path(shards[0].tokenizer_folder))
    missing = [shard for shard in shards if cfg.overwrite or why_missing(shard, tokenizer_sha256)]
    if absent := [shard.source for shard in missing if not is_url(shard.source) and not Path(shard.source).is_file()]:
        raise BenchError(f"not found: {', '.join(absent)}\nsources=[...] must name files or URLs")
    return missing


def _make_shards(shards: list[Shard]) -> None:
    """Make one shard after the other; one that cannot be made does not stop the others."""
    failures: list[tuple[Shard, BenchError]] = []
    try:
        with termination_raises():
            for shard in shards:
                try:
                    prepare(shard, partial(print, f"{shard.name}:", flush=True))
                except BenchError as error:
                    failures.append((shard, error))
    except (KeyboardInterrupt, Terminated) as ended:
        code = 128 + getattr(ended, "signum", signal.SIGINT)
        raise RunFailed("interrupted: the same command continues from here", code) from None
    if failures:
        lines = [f"{shard.name}: {error}" for shard, error in failures]
        counts = f"{len(failures)} of {len(shards)} failed, {len(shards) - len(failures)} are done and stay"
        lines.append(f"{counts}; the same command (without overwrite=true) continues from here")
        raise RunFailed("\n".join(lines), failures[0][1].exit_code)


def plan(cfg: PreparationConfig, shards: dict[int, Shard]) -> str:
    """Return what would be made from what, and what is in the way."""
    lines = [f"{len(shards)} datasets, tokenizer {cfg.tokenizer_folder}"]
    lines += [f"  {shard.shown_source}\n    -> {shard.prefix}.bin and .idx" for shard in shards.values()]
    try:
        missing = missing_shards(cfg, list(shards.values()))
        lines += [f"{shard.name} exists already" for shard in shards.values() if shard not in missing]
    except BenchError as error:
        lines.append(f"REFUSED: {error}")
    return "\n".join(lines)


def summary(cfg: PreparationConfig, shards: list[Shard], made: list[Shard]) -> str:
    """Return what exists now, how Megatron will split it, and how to train on it."""
    lines, tokens = [], 0
    for shard in shards:
        manifest = read_manifest(Path(shard.prefix))
        assert manifest is not None
        origin = "made, read back and verified" if shard in made else "made before"
        line = f"{shard.name}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens ({origin})"
        if shard in made:
            seconds = manifest["seconds"]["tokenising"]
            rate = manifest["text_bytes"] / 1e6 / seconds
            line += f", {rate:,.0f} MB/s, {manifest['tokens'] / seconds:,.0f} tokens/s"
        if manifest["bad"]:
            bad = (f"{number:,} x {reason}" for reason, number in manifest["bad"].items())
            line += f"; left out: {', '.join(bad)}"
        lines += [line, f"  {_split_text(cfg.data.split, manifest['documents'])}"]
        tokens += manifest["tokens"]
    lines.append(f"{len(shards)} datasets in {cfg.data.folder}, {tokens:,} tokens")
    prefixes = [shard.prefix for shard in shards]
    selection = f"data={cfg.data.name}"
    if cfg.data.paths != prefixes:
        paths = shlex.quote(f"data.paths=[{','.join(quoted_path(prefix) for prefix in prefixes)}]")
        selection += f" {paths} data.weights=[{','.join(['1'] * len(prefixes))}]"
    lines.append(f"python train.py {selection} ... trains on them")
    return "\n".join(lines)


def _split_text(split: str, documents: int) -> str:
    """Say how Megatron splits so many documents, and whether train.py would refuse that."""
    counts = split_documents(split, documents)
    text = f"data.split={split} gives {', '.join(f'{count:,} to {part}' for part, count in counts.items())}"
    if empty := empty_parts(split, documents):
        text += f": train.py refuses that, since {' and '.join(empty)} would get none; use another data.split"
    return text


def _prepare_local(cfg: PreparationConfig) -> None:
    from nemo_bench.data.local import prepare_local

    folder = Path(cfg.data.folder or "")
    if cfg.launch is Launch.dry:
        print(f"the local dataset, in {folder}\nlaunch=dry: nothing was started.")
        return
    sizes = {"vocab_size": cfg.model.vocab_size, "corpus_bytes": cfg.data.corpus_bytes}
    dataset = prepare_local(folder, **sizes, report=partial(print, flush=True))
    print(f"{dataset.prefix}: {dataset.documents:,} documents, {dataset.tokens:,} tokens")


def check(cfg: PreparationConfig) -> None:
    """Read back every dataset named or in the folder, and print how it is; raise BenchError if one is not whole."""
    from nemo_bench.data.local import local_prefix

    if cfg.data.kind == "local":
        folder = Path(cfg.data.folder or "")
        named = [local_prefix(folder, vocab_size=cfg.model.vocab_size, corpus_bytes=cfg.data.corpus_bytes)]
    else:
        named = [Path(shard.prefix) for shard in shards_of(cfg).values()]
    problems = 0
    for prefix in [*named, *(prefix for prefix in datasets_in(named[0].parent) if prefix not in named)]:
        try:
            info, manifest = verify(prefix)
        except BenchError as error:
            problems += 1
            print(f"{prefix.name}: {error}")
            continue
        print(
            f"{prefix.name}: {info.documents:,} documents, {info.tokens:,} tokens of {info.dtype}, largest id "
            f"{info.max_token_id:,}: whole (from {manifest['inputs']['source']}, {manifest['made_at']})"
        )
    if problems:
        remedy = "the same command without `check` makes what is missing, and with overwrite=true all that it names"
        raise BenchError(f"{problems} missing or damaged: {remedy}")
