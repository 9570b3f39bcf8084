"""What a user sees of `train.py` before anything is started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model=7b", "405b"),  # the valid choices
        ("scale=3gpu", "64gpu"),
        ("profile=perf", "none, nsys, nsys_recipe, torch"),
        ("scael=128gpu", "scale"),
        ("model.tensor_parallel=2", "did you mean: model.tensor_model_parallel_size"),
        ("model.optim.learning_rate=1", "model.optim.lr"),
        ("foo.bar=1", "valid here: model, precision"),
        ("+model.foo=1", "unknown key: model.foo"),
        ("trainer.devices=two", "trainer.devices"),
        ("launch=fast", "run, dry"),
        ("model=[", "model=["),
        ("profile.ranks=[[1]]", "profile.ranks=[[1]]\n    is not a list"),
        ("cluster.container='${stage_path}'", "is not a section of plain values"),
        ("model.optim='${stage_path}'", "is not a section of plain values"),
        ("model=[1,2]", "chosen by the name of one of its options"),
        ("cluster.container={image: a}", "a section that is null takes no values"),
        ("experiment=llama31_70b_bf16_65gpu", "llama31_70b_bf16_64gpu"),
        ("model=null", "chosen by the name of one of its options"),
        ("=5", "chosen by the name of one of its options"),
        ("cluster.env={A: b}", "add one with +cluster.env.<key>=<value>"),
        ("checkpoint.resume_from=/a=b", "\"checkpoint.resume_from='/a=b'\""),
        ("scale=upto(x)", "give a number of GPUs, as in 'scale=upto(512)'"),
        ("--resolve", "--resolve"),
        ("--shell-completion", "install"),
        ("--run", "--multirun"),
        ("hydra/launcher=submitit_local", "-m runs the points of a sweep in turn, in the foreground"),
    ],
)
def test_bad_input_gets_one_message_and_exit_code_2(train_cli: Cli, override: str, expected: str) -> None:
    result = train_cli(override, *(["-m"] if override == "--run" else []))
    assert result.returncode == 2, result.stderr
    assert expected in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("script", ["train", "prepare_data", "setup_stage", "report", "jobs", "estimate"])
def test_an_interpreter_without_the_packages_is_told_where_they_are(script: str) -> None:
    command = [sys.executable, "-S", str(Path(__file__).parents[2] / f"{script}.py")]  # -S: without what is installed
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "source .venv/bin/activate" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (
            "--cfg job --resolve precision=fp8 scale=128gpu",
            ("num_nodes: 16", "devices: 8", "global_batch_size: 256", "name: fp8"),
        ),
        ("--help", ("launch=dry", "scale: 1024gpu", "model: 405b", "STAGE_PATH")),
        (
            "launch=dry scale=64gpu data=mock model.num_attention_heads=16 model.attention_backend=auto",
            ("auto falls back to unfused, which is slow: no other kernel takes heads of 512",),
        ),
        (
            "scale=64gpu profile=nsys launch=dry profile.ranks=[0,8] profile.end_step=10",
            ("nsys: steps 10 to 10 of ranks 0, 8", "nsys profile '--output=<run>/profile/rank0'", "--trace=cuda,nvtx"),
        ),
        ("-m launch=dry scale=upto(128)", ("64 x h100", "128 x h100")),
        ("-m launch=dry scale=64,128gpu,256", ("64 x h100", "128 x h100", "256 x h100")),  # a scale may be a number
        (
            "precision=fp8 scale=2048gpu launch=dry",
            ("TP4 PP4 VP5 CP2 DP64 SP: 0.9% of a step is pipeline bubble", "GBS 4096, GA 64", "/fp8/70b/2048/"),
        ),
    ],
)
def test_what_is_shown_before_anything_runs(
    train_cli: Cli, tmp_path: Path, arguments: str, texts: tuple[str, ...]
) -> None:
    result = train_cli(*arguments.split())
    assert result.returncode == 0, result.stderr
    assert [text for text in texts if text not in result.stdout] == []
    assert list(tmp_path.iterdir()) == []


def test_a_point_that_does_not_fit_is_refused_and_says_what_does(train_cli: Cli) -> None:
    eight = ("gpu=h200", "scale=1gpu", "model=8b", "model.context_parallel_size=1", "launch=dry")
    result = train_cli(*eight)
    assert result.returncode == 2 and "about 156 GiB a GPU" in result.stderr
    narrow = "model.optim.exp_avg_dtype=bf16 model.optim.exp_avg_sq_dtype=bf16 model.optim.store_param_remainders=true"
    assert "what fits: trainer.devices=2 " in result.stderr
    assert f"; {narrow} (111 GiB)" in result.stderr  # measured: benchmarks/results/gpu_speed/8b_bf16
    assert train_cli(*eight, *narrow.split()).returncode == 0
    forced = train_cli(*eight, "check_memory=false")
    assert forced.returncode == 0 and "this does not fit" in forced.stdout


def test_a_sweep_goes_on_after_a_refused_point_and_ends_with_its_code(train_cli: Cli, tmp_path: Path) -> None:
    result = train_cli("-m", "launch=dry", "scale=64gpu,8gpu,128gpu")
    assert result.returncode == 2
    assert result.stdout.count("the configuration's checks passed") == 2
    assert "must divide the number of GPUs" in result.stderr
    assert list(tmp_path.iterdir()) == []  # nor anything of Hydra's own


def test_ctrl_c_during_the_imports_shows_no_traceback(project: Path, tmp_path: Path) -> None:
    (tmp_path / "hydra.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    command = [sys.executable, str(project / "train.py")]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None and process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "") and process.returncode == -signal.SIGINT


def test_jobs_of_no_stage_folder(project: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(project / "jobs.py"), "--stage", "nowhere"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{tmp_path}/nowhere is not a folder: --stage (or STAGE_PATH) must name a stage folder\n"


def test_a_reader_that_goes_away_is_no_error(train_cli: Cli, project: Path, tmp_path: Path) -> None:
    command = f"{sys.executable} {project}/train.py -m launch=dry scale=64gpu,128gpu,256gpu,512gpu | head -n 1"
    shown = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert shown.stdout.startswith("Llama 3.1 70b") and shown.stderr == ""


def test_another_launcher_of_the_same_name_does_not_get_in_the_way(train_cli: Cli, tmp_path: Path) -> None:
    """hydra-submitit-launcher registers a schema under the name of ours, which knows none of our settings."""
    plugin = tmp_path / "site" / "hydra_plugins" / "other_submitit_launcher"
    plugin.mkdir(parents=True)
    (plugin / "__init__.py").write_text(
        "from dataclasses import dataclass\n"
        "from hydra.core.config_store import ConfigStore\n"
        "@dataclass\nclass Conf:\n    _target_: str = 'other.Launcher'\n    timeout_min: int = 60\n"
        "for name in ('submitit_slurm', 'submitit_local'):\n"
        "    ConfigStore.instance().store(group='hydra/launcher', name=name, node=Conf, provider='other')\n"
    )
    point = ("scale=64gpu,128gpu", "data=mock", "hydra/launcher=submitit_slurm", "launch=dry")
    shown = train_cli(*point, PYTHONPATH=str(tmp_path / "site"))
    assert shown.stderr == "" and shown.stdout.count("nothing was submitted") == 1
    refused = train_cli("hydra/launcher=submitit_local", PYTHONPATH=str(tmp_path / "site"))
    assert refused.returncode == 2 and "in the foreground" in refused.stderr


@pytest.mark.parametrize(
    "command", ["train.py --cfg job scale=128gpu", "train.py launch=dry scale=128gpu", "-c {code}"]
)
def test_the_submitting_side_imports_nothing_heavy(project: Path, tmp_path: Path, command: str) -> None:
    """Not even what runs only once a job starts: preparing data, starting ranks, following them, reporting."""
    modules = "nemo_bench.data.local, nemo_bench.launch.point, nemo_bench.planning.command, nemo_bench.report.terminal"
    code = f"import {modules}; "
    code += "data = nemo_bench.config.DataConfig(folder='d', corpus_bytes=9999);"
    code += "nemo_bench.data.local.prepare_local(data, vocab_size=300)"
    script = str(project / "train.py")
    arguments = [{"train.py": script, "{code}": code}.get(word, word) for word in command.split()]
    python, environment = [sys.executable, "-X", "importtime"], {**os.environ, "PYTHONPATH": str(project)}
    shown = subprocess.run([*python, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in shown.stderr.splitlines()}
    assert imported & {"hydra", "torch", "lightning", "megatron", "nemo", "transformers"} == {"hydra"}
