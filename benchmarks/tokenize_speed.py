"""How fast a shard is tokenised, against Megatron-LM's way, side by side on equal cores, with identical outputs.

    python benchmarks/tokenize_speed.py [--megabytes 200] [--cores 2] [--tokenizer FOLDER] [--output FILE.json]
    python benchmarks/tokenize_speed.py --scaling    # ours alone, on 1, 2, 4, ... cores, one shard and four at once

Text: source code and documentation of the packages installed here, a file a document. Tokenizer: Llama 3's vocabulary
of 128,000 merges, which the package `llama-models` ships (fetched with pip), or any folder given. Megatron-LM's way is
tests/megatron_preprocess.py: its algorithm on megatron-core's own tokenizer and builder. Start-up (importing, loading
the tokenizer) is in `process s` only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from nemo_bench.data.tokenizer import LLAMA3_SPLIT  # noqa: E402

SUFFIXES = (".py", ".pyi", ".md", ".rst", ".txt", ".h")


def write_corpus(target: Path, megabytes: float) -> int:
    """JSON Lines of text files installed here, in an order that mixes packages; returns the bytes of text."""
    import hashlib

    roots = [Path(sysconfig.get_path(name)) for name in ("purelib", "stdlib")]
    files = sorted(
        {path for root in roots for path in root.rglob("*") if path.suffix in SUFFIXES and path.is_file()},
        key=lambda path: hashlib.sha256(str(path.relative_to(path.anchor)).encode()).digest(),
    )
    written = 0
    with open(target, "w", encoding="utf-8") as lines:
        for path in files:
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            if not text.strip() or len(text) > 1_000_000:
                continue
            lines.write(json.dumps({"text": text, "meta": {"name": path.name}}, ensure_ascii=False) + "\n")
            written += len(text.encode())
            if written > megabytes * 1e6:
                return written
    sys.exit(f"only {written / 1e6:.0f} MB of text are installed here: ask for less with --megabytes")


def llama3_tokenizer(folder: Path) -> None:
    """Llama 3's tokenizer in Hugging Face's files, made from the tiktoken file that `llama-models` ships."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "llama-models==0.3.0", "-d", str(folder)],
        check=True,
        stderr=subprocess.DEVNULL,
    )
    (wheel,) = folder.glob("llama_models-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (folder / "tokenizer.model").write_bytes(archive.read("llama_models/llama3/tokenizer.model"))
    special = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{i}|>" for i in range(254))]
    converter = TikTokenConverter(
        str(folder / "tokenizer.model"), pattern=LLAMA3_SPLIT, additional_special_tokens=special
    )
    content = json.loads(converter.converted().to_str())
    content["model"]["ignore_merges"] = True  # as in Llama 3's own tokenizer.json
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": special[0], "eos_token": special[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    wheel.unlink()


def run_ours(source: Path, tokenizer: Path, folder: Path, cores: set[int]) -> dict[str, Any]:
    """One file through `prepare_data.py` on these cores."""
    folder.mkdir()
    settings = {"sources": f"[{source}]", "tokenizer_folder": tokenizer, "data.folder": folder}
    script = str(PROJECT / "prepare_data.py")
    measured = run([sys.executable, script, *(f"{key}={value}" for key, value in settings.items())], cores)
    (path,) = folder.glob("*_document.json")
    made = json.loads(path.read_bytes())
    return {**measured, "seconds": made["tokenising_s"], "documents": made["documents"], "tokens": made["tokens"]}


def run_megatron(source: Path, tokenizer: Path, prefix: Path, cores: set[int]) -> dict[str, Any]:
    """The same by Megatron-LM's way, with a worker a core."""
    script = PROJECT / "tests" / "megatron_preprocess.py"
    measured = run([sys.executable, str(script), str(source), str(tokenizer), str(prefix), str(len(cores))], cores)
    return {**measured, **json.loads(measured.pop("stdout").splitlines()[-1])}


def run(command: list[str], cores: set[int]) -> dict[str, Any]:
    """Runs it on these cores; whole-process seconds, and the peak memory of the process itself."""
    with tempfile.TemporaryFile() as output:
        started = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdout=output,
            env={**os.environ, "PYTHONPATH": str(PROJECT), "TOKENIZERS_PARALLELISM": "false"},
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        _, status, usage = os.wait4(process.pid, 0)
        process_s = time.perf_counter() - started
        if status:
            sys.exit(f"{command} failed")
        output.seek(0)
        stdout = output.read().decode()
    return {"process_s": process_s, "stdout": stdout, "peak_memory_mb": usage.ru_maxrss / 1e3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=200)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--repeats", type=int, default=3, help="of ours; the median is compared")
    arguments = parser.parse_args()
    from backports import zstd

    cores = set(sorted(os.sched_getaffinity(0))[: arguments.cores])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = arguments.tokenizer or folder
        if arguments.tokenizer is None:
            llama3_tokenizer(folder)
        plain = folder / "corpus.jsonl"
        text_bytes = write_corpus(plain, arguments.megabytes)
        packed = folder / "corpus.jsonl.zst"
        with open(plain, "rb") as source, zstd.open(packed, "wb", level=3) as target:
            shutil.copyfileobj(source, target)

        if arguments.scaling:
            measured = scaling(packed, tokenizer, folder, sorted(cores), arguments.repeats)
            print(f"{text_bytes / 1e6:.0f} MB of text a shard, zstd; {cpu_model()}")
            print(f"{'shards':>6}{'cores':>7}{'MB/s':>9}{'tokens/s':>14}{'a core':>8}{'peak MB a process':>19}")
            for row in measured:
                shards, count = row["shards"], row["cores"]
                rate = shards * text_bytes / 1e6 / row["seconds"]
                row["mb_per_s"], row["tokens_per_s"] = rate, shards * row["tokens"] / row["seconds"]
                figures = f"{rate:9.1f}{row['tokens_per_s']:14,.0f}{rate / count:8.1f}{row['peak_memory_mb']:19,.0f}"
                print(f"{shards:6}{count:7}{figures}")
            write(arguments.output, {"text_bytes": text_bytes, "rows": measured})
            return
        ours: dict[str, list[dict[str, Any]]] = {}
        for label, source_file, on in (
            ("jsonl", plain, cores),
            ("jsonl.zst", packed, cores),
            ("jsonl.zst on 1 core", packed, {min(cores)}),
        ):
            ours[label] = []
            for repeat in range(arguments.repeats):
                target_folder = folder / f"ours-{label.replace(' ', '')}-{repeat}"
                ours[label].append(run_ours(source_file, tokenizer, target_folder, on))
        reference = run_megatron(plain, tokenizer, folder / "megatron", cores)
        for suffix in (".bin", ".idx"):
            expected = (folder / f"megatron_text_document{suffix}").read_bytes()
            for label in ours:
                path = folder / f"ours-{label.replace(' ', '')}-0" / f"my-llama_00_text_document{suffix}"
                if path.read_bytes() != expected:
                    sys.exit(f"{label}: {suffix} differs from Megatron's")

    rows: dict[str, Any] = {"Megatron-LM's way, jsonl": reference}
    for label, repeats in ours.items():
        median = sorted(repeats, key=lambda row: row["seconds"])[len(repeats) // 2]
        rows[f"nemo_bench, {label}"] = {**median, "all_seconds": [row["seconds"] for row in repeats]}
    base = reference["tokens"] / reference["seconds"]
    print(f"{text_bytes / 1e6:.0f} MB of text, {reference['documents']:,} documents, {reference['tokens']:,} tokens")
    print(f"{platform.processor() or platform.machine()}, {len(cores)} cores; all outputs identical, byte for byte")
    print(f"{'':32}{'seconds':>9}{'MB/s':>8}{'tokens/s':>13}{'ratio':>7}{'process s':>11}{'peak MB':>9}")
    for label, row in rows.items():
        row.pop("stdout", None)
        rate = row["tokens"] / row["seconds"]
        row["tokens_per_s"], row["ratio"] = rate, rate / base
        print(
            f"{label:32}{row['seconds']:9.2f}{text_bytes / 1e6 / row['seconds']:8.1f}{rate:13,.0f}{rate / base:7.1f}"
            f"{row['process_s']:11.2f}{row['peak_memory_mb']:9,.0f}"
        )
    write(arguments.output, {"text_bytes": text_bytes, "cores": len(cores), "rows": rows})


def scaling(source: Path, tokenizer: Path, folder: Path, cores: list[int], repeats: int) -> list[dict[str, Any]]:
    """One shard on 1, 2, 4, ... cores, and four shards at once, each with a quarter of the cores; medians."""
    from concurrent.futures import ThreadPoolExecutor

    counts = [count for count in (1, 2, 4, 8, 16, 32, 64) if count <= len(cores)]
    rows = []
    for shards, count in [*((1, count) for count in counts), *((4, count) for count in counts if count >= 4)]:
        share = count // shards
        measured = []
        for repeat in range(repeats):
            with ThreadPoolExecutor(shards) as pool:
                runs = [
                    pool.submit(
                        run_ours,
                        source,
                        tokenizer,
                        folder / f"scaling-{shards}-{count}-{repeat}-{number}",
                        set(cores[number * share : (number + 1) * share]),
                    )
                    for number in range(shards)
                ]
                results = [run.result() for run in runs]
            measured.append(max(results, key=lambda row: float(row["seconds"])))
        median = sorted(measured, key=lambda row: float(row["seconds"]))[repeats // 2]
        median.pop("stdout")
        rows.append({"shards": shards, "cores": count, **median})
    return rows


def write(output: Path | None, content: dict[str, Any]) -> None:
    """Leaves the figures with what they were measured on."""
    if output is None:
        return
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": platform.python_version()}
    for name in ("gigatoken", "tokenizers", "megatron-core", "orjson", "backports.zstd"):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    where = {"command": ["python", *sys.argv], "cpu": cpu_model(), "versions": versions}
    output.write_text(json.dumps({**where, **content}, indent=2) + "\n")


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    main()
