"""What a user sees of this project, held as text: dry runs, the messages met first, and the report of the run corpus.

`NEMO_BENCH_WRITE_GOLDEN=1 pytest tests/unit/test_snapshots.py` writes them anew; read the diff.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest

from benchmarks.fork_server import ForkServer

PROJECT = Path(__file__).resolve().parents[2]
SNAPSHOTS = PROJECT / "tests" / "golden" / "snapshots"
SCALES = "scale=64gpu,128gpu,256gpu,512gpu,1024gpu,2048gpu"
SLURM = ("hydra/launcher=submitit_slurm", "cluster=slurm")

DRY_RUNS = {
    "70b_bf16": ("-m", "precision=bf16", SCALES),
    "70b_fp8": ("-m", "precision=fp8", SCALES),
    "70b_slurm": ("precision=fp8", "scale=128gpu", *SLURM),
    "70b_24_09": ("precision=bf16", "scale=64gpu", "entrypoint=nemo_24_09", *SLURM),
    "405b": ("-m", "model=405b", "scale=576gpu", "precision=bf16,fp8"),
    "8b": ("model=8b", "scale=8gpu", "gpu=h200"),
    "bare": (),
}

# The messages that a user meets first: train.py unless another script is named.
ERRORS: dict[str, tuple[str, ...]] = {
    "unknown option": ("scale=65gpu",),
    "unknown key": ("model.tensor_parallel_size=2",),
    "wrong type": ("trainer.max_steps=many",),
    "layout": ("scale=64gpu", "model.num_layers=81", "gpu=a100", "precision=fp8"),
    "batch": ("scale=64gpu", "model.global_batch_size=100"),
    "too many ranks": ("model.tensor_model_parallel_size=3",),
    "no sbatch": ("scale=64gpu", "hydra/launcher=submitit_slurm", "data=mock", "cluster.container=null"),
    "slurm without launcher": ("scale=64gpu", "data=mock"),
    "empty stage": ("scale=64gpu", "hydra/launcher=submitit_slurm"),
    "data kind": ("data.kind=pile",),
    "no such checkpoint": ("checkpoint.resume_from=nowhere",),
    "profile step": ("profile=torch", "profile.start_step=80"),
    "report of nothing": ("report.py", "runs=nowhere"),
    "unknown reference": ("report.py", "runs=nowhere", "reference=nvidia-23.01"),
    "unknown verb": ("setup_stage.py", "chek"),
    "no such job": ("jobs.py", "log", "12"),
    "no sources": ("prepare_data.py", "sources=[nowhere.jsonl]"),
}


def run(scripts: ForkServer, tmp_path: Path, *command: str) -> str:
    """The command's exit status and output, with this machine's names taken out."""
    script, *arguments = command if "".join(command[:1]).endswith(".py") else ("train.py", *command)
    hidden = ("SLURM_", "SBATCH_", "HYDRA_", "NEMO_BENCH_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    environment |= {"STAGE_PATH": str(tmp_path / "stage"), "COLUMNS": "200"}
    environment["PATH"] = str(tmp_path / "nowhere")  # without a scheduler, whatever this machine has
    done = scripts.run([sys.executable, str(PROJECT / script), *arguments], cwd=tmp_path, env=environment)
    text = f"exit status {done.returncode}\n{done.stdout}{done.stderr}"
    for path, name in ((sys.executable, "<python>"), (tmp_path, "<tmp>"), (PROJECT, "<project>")):
        text = text.replace(str(path), name)
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def held(name: str, text: str) -> None:
    path = SNAPSHOTS / name
    if os.environ.get("NEMO_BENCH_WRITE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("name", DRY_RUNS)
def test_a_dry_run_prints_what_it_did(name: str, scripts: ForkServer, tmp_path: Path) -> None:
    held(f"dry_{name}.txt", run(scripts, tmp_path, *DRY_RUNS[name], "launch=dry"))


def test_messages_say_what_they_said(scripts: ForkServer, tmp_path: Path) -> None:
    texts = [f"# {name}: {' '.join(words)}\n{run(scripts, tmp_path, *words)}" for name, words in ERRORS.items()]
    held("errors.txt", "\n".join(texts))


def test_the_report_of_the_corpus_is_what_it_was(scripts: ForkServer, tmp_path: Path) -> None:
    runs = f"runs=[{PROJECT}/tests/runs,{PROJECT}/tests/logs]"
    run(scripts, tmp_path, "report.py", runs, f"output={tmp_path}/report")
    text = (tmp_path / "report" / "results.json").read_text().replace(str(PROJECT), "<project>")
    report = json.loads(re.sub(r'"generated_at": "[^"]*"', '"generated_at": ""', text))
    held("results.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
