"""The batch script of a point: golden files for the recipe's ends, and every option of the request.

`NEMO_BENCH_WRITE_GOLDEN=1 pytest tests/unit/test_slurm_script.py` writes the golden files anew; read the diff.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_bench.config import TrainConfig
from nemo_bench.launch.batch_script import batch_script
from nemo_bench.launch.plan import results_dir

from ..composing import PROJECT, composed

GOLDEN = PROJECT / "tests" / "golden"
STAGE = "/lustre/nemo"


@pytest.fixture(autouse=True)
def stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAGE_PATH", STAGE)


def run_dir(cfg: TrainConfig) -> Path:
    return results_dir(cfg) / "20261122-120000-abcd"


def script(*overrides: str) -> str:
    cfg = composed("scale=64gpu", *overrides)
    return batch_script(cfg, run_dir(cfg))


@pytest.mark.parametrize("gpus", [64, 2048])
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_the_script_is_the_golden_one(gpus: int, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ACCOUNT", "account_name")
    monkeypatch.setenv("SLURM_PARTITION", "batch")
    monkeypatch.setenv("SLURM_GPUS_PER_NODE", "8")
    cfg = composed(f"scale={gpus}gpu", f"precision={precision}")
    text = batch_script(cfg, run_dir(cfg)).replace(str(PROJECT), "/home/user/nemo-bench")
    golden = GOLDEN / f"70b_{precision}_{gpus}gpu.sbatch"
    if os.environ.get("NEMO_BENCH_WRITE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()


def options(text: str) -> dict[str, str]:
    flags = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH --")]
    return {name: shlex.split(value)[0] if value else "" for name, _, value in (flag.partition("=") for flag in flags)}


def srun_line(text: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith("srun ")]
    return shlex.split(line)


def test_the_recipes_request() -> None:
    asked = options(script())
    assert asked["nodes"] == "8"
    assert asked["ntasks-per-node"] == "8"
    assert asked["mem"] == "0"
    assert "exclusive" in asked
    assert asked["job-name"] == "nemo-bench-70b-bf16-64gpu"
    # Not by default: the account's own; GPUs, which some clusters refuse; singleton, which would serialise a sweep.
    assert not {"account", "partition", "gpus-per-node", "gres", "dependency", "qos"} & set(asked)
    assert "--kill-on-bad-exit=1" in srun_line(script())


@pytest.mark.parametrize(
    ("name", "value", "option"),
    [
        ("SLURM_ACCOUNT", "acc", "account"),
        ("SBATCH_ACCOUNT", "acc", "account"),
        ("SLURM_PARTITION", "batch", "partition"),
        ("SBATCH_PARTITION", "batch", "partition"),
        ("SLURM_GPUS_PER_NODE", "8", "gpus-per-node"),
        ("SBATCH_QOS", "high", "qos"),
        ("SBATCH_RESERVATION", "tonight", "reservation"),
        ("SBATCH_CONSTRAINT", "h100", "constraint"),
        ("SBATCH_TIMELIMIT", "00:20:00", "time"),
    ],
)
def test_what_the_environment_names(name: str, value: str, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert options(script())[option] == value


def test_gpus_per_node_may_be_null_as_in_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("null", ""):
        monkeypatch.setenv("SLURM_GPUS_PER_NODE", value)
        assert "gpus-per-node" not in options(script())
    monkeypatch.setenv("SLURM_GPUS_PER_NODE", "h100:8")
    assert options(script())["gpus-per-node"] == "h100:8"


def test_an_empty_variable_is_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PARTITION", "")
    assert "partition" not in options(script())
    monkeypatch.setenv("SBATCH_PARTITION", "batch")
    assert options(script())["partition"] == "batch"


def test_the_command_line_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PARTITION", "batch")
    assert options(script("cluster.partition=debug"))["partition"] == "debug"


def test_gres_stands_in_for_gpus_per_node() -> None:
    asked = options(script("cluster.gpus_per_node=8", "cluster.gres='gpu:8'"))
    assert asked["gres"] == "gpu:8" and "gpus-per-node" not in asked


def test_any_other_option_can_be_added_or_taken_out() -> None:
    asked = options(
        script(
            "+cluster.additional_parameters={mail-type: END, switches: 2, exclusive: false}", "cluster.comment='a b'"
        )
    )
    assert (asked["mail-type"], asked["switches"], asked["comment"]) == ("END", "2", "a b")
    assert "exclusive" not in asked


def test_the_container_is_named_on_srun_not_on_sbatch() -> None:
    text = script("cluster.container.mounts=['/data:/data']")
    line = srun_line(text)
    assert f"--container-image={STAGE}/nvidia+nemo+25.11.sqsh" in line
    assert f"--container-mounts={STAGE}:{STAGE},{PROJECT}:{PROJECT},/data:/data" in line
    assert {"--container-writable", "--no-container-mount-home"} <= set(line)
    assert line[line.index("-u") - 1] == "python3"  # the container's interpreter, not ours
    assert not any("container" in option for option in options(text))


def test_without_a_container_the_nodes_run_this_interpreter() -> None:
    line = srun_line(script("cluster.container=null"))
    assert sys.executable in line and not any("container" in word for word in line)


def test_checkpoints_bring_a_warning_and_a_requeue() -> None:
    assert "no-requeue" in options(script()) and "signal" not in options(script())
    asked = options(script("checkpoint.every_n_steps=10", "cluster.signal_s=60"))
    assert asked["signal"] == "USR1@60" and "requeue" in asked


def test_awkward_paths_and_values_reach_the_shell_unharmed(tmp_path: Path) -> None:
    stage = tmp_path / 'it\'s a $HOME, "quoted"'
    cfg = composed("scale=64gpu", "cluster.container=null", "+cluster.env={ODD: 'a b$c'}")
    cfg.stage_path = str(stage)
    text = batch_script(cfg, stage / "run")
    assert srun_line(text)[-1] == str(stage / "run")
    # The shell reads it without an error, and hands the values on whole.
    head, _, _ = text.partition("# The ranks meet")
    shown = subprocess.run(
        ["bash", "-c", head.replace("rm -f", ": rm") + 'printf "%s" "$RUN"'], capture_output=True, text=True, check=True
    )
    assert shown.stdout == str(stage / "run")
    exports = "\n".join(line for line in text.splitlines() if line.startswith("export ODD"))
    shown = subprocess.run(["bash", "-c", exports + '\nprintf "%s" "$ODD"'], capture_output=True, text=True, check=True)
    assert shown.stdout == "a b$c"
