"""`prepare_data.py hydra/launcher=submitit_slurm` against a real Slurm: a job a shard, followed to its end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from backports import zstd

from nemo_bench.data.corpus import collect
from nemo_bench.data.shard import verify

from ..httpserver import FileServer, Twist
from .cluster import SlurmCluster, wait_for
from .conftest import SHARED, Scripts

SUBMIT = ("hydra/launcher=submitit_slurm", *SHARED)


@pytest.fixture
def scripts(slurm: SlurmCluster, tmp_path: Path, small_tokenizer: Path) -> Scripts:
    shutil.copytree(small_tokenizer, tmp_path / "llama3.1-dataset" / "llama")
    return Scripts(slurm, tmp_path)


@pytest.fixture
def server() -> Iterator[FileServer]:
    texts = list(collect(3_000_000).values())
    with FileServer() as server:
        for number in range(2):
            lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[number::2])
            server.put(f"/train/{number:02d}.jsonl.zst", zstd.compress(lines.encode()))
        yield server


def url(server: FileServer) -> str:
    return f"url='{server.url('/train/')}{{shard:02d}}.jsonl.zst'"


def datasets(scripts: Scripts) -> list[Path]:
    return sorted(scripts.stage.glob("llama3.1-dataset/*.idx"))


def job_ids(output: str) -> list[str]:
    return [line.split()[1].rstrip(":") for line in output.splitlines() if line.startswith("job ")]


def test_a_job_a_shard_and_what_was_made(scripts: Scripts, slurm: SlurmCluster, server: FileServer) -> None:
    done = scripts.run("prepare_data.py", *SUBMIT, url(server))
    assert done.returncode == 0, done.stdout + done.stderr
    ids = job_ids(done.stdout)
    assert len(ids) == 2
    assert [slurm.wait_for_end(job_id) for job_id in ids] == ["COMPLETED"] * 2
    assert slurm.job_record(ids[0])["JobName"] == "nemo-bench-my-llama_00_text_document"
    assert done.stdout.rpartition("==>")[2].count("made, read back and verified") >= 2 and "2 datasets" in done.stdout
    for index in datasets(scripts):
        assert verify(index.with_suffix(""))[0].documents > 20
    assert len(list(scripts.stage.glob("results.data_preparation/*/*/slurm-*.out"))) == 2

    again = scripts.run("prepare_data.py", *SUBMIT, url(server))
    assert again.returncode == 0 and job_ids(again.stdout) == [] and again.stdout.count("made before") == 2


def test_only_what_failed_is_submitted_again(scripts: Scripts, slurm: SlurmCluster, server: FileServer) -> None:
    server.script("/train/01.jsonl.zst", Twist(status=404))
    done = scripts.run("prepare_data.py", *SUBMIT, url(server))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "01.jsonl.zst cannot be downloaded" in done.stdout and "1 of 2 jobs did not complete" in done.stderr
    assert slurm.wait_for_end(job_ids(done.stdout)[1]) == "FAILED"
    assert [path.name for path in datasets(scripts)] == ["my-llama_00_text_document.idx"]
    again = scripts.run("prepare_data.py", *SUBMIT, url(server))
    assert again.returncode == 0, again.stderr
    assert len(job_ids(again.stdout)) == 1 and len(datasets(scripts)) == 2


def test_without_waiting_and_cancelled(scripts: Scripts, slurm: SlurmCluster, server: FileServer) -> None:
    shard = server.files["/train/00.jsonl.zst"].data
    server.put("/train/00.jsonl.zst", shard, piece_bytes=1000, pause_s=1.0)
    done = scripts.run("prepare_data.py", *SUBMIT, url(server), "wait=false", "shards=[0]")
    assert done.returncode == 0 and "prepare_data.py check" in done.stdout
    (job_id,) = job_ids(done.stdout)
    downloads = scripts.stage / "llama3.1-dataset" / "downloads"
    wait_for(lambda: any(p.stat().st_size for p in downloads.rglob("*.part/*")), "the download to begin", 60)
    listed = scripts.jobs()
    assert job_id in listed and "RUNNING" in listed and "nemo-bench-my-llama_00_text_document" in listed
    assert f"slurm-{job_id}.out" in scripts.jobs("log", job_id)
    twice = scripts.run("prepare_data.py", *SUBMIT, url(server), "wait=false", "shards=[0]")
    assert f"job {job_id} does this already" in twice.stdout and job_ids(twice.stdout) == [job_id]
    assert scripts.jobs("cancel", job_id).split() == ["cancelled:", job_id]
    assert slurm.wait_for_end(job_id).startswith("CANCELLED")
    assert "had ended" in scripts.jobs("cancel", job_id) and "CANCELLED" in scripts.jobs()
    assert datasets(scripts) == []
    missing = scripts.run("prepare_data.py", "check", url(server), "shards=[0]")
    assert missing.returncode == 2 and "my-llama_00_text_document.idx does not exist" in missing.stdout
    server.put("/train/00.jsonl.zst", shard)
    again = scripts.run("prepare_data.py", *SUBMIT, url(server), "shards=[0]")
    assert again.returncode == 0, again.stdout + again.stderr
    assert server.seen("GET", "/train/00.jsonl.zst")[-1].headers["range"].startswith("bytes=")
