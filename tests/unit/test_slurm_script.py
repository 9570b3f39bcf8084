"""The batch script of a point: golden files for the recipe's ends, and every option of the request.

`NEMO_BENCH_WRITE_GOLDEN=1 pytest tests/unit/test_slurm_script.py` writes the golden files anew; read the diff.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_bench.config import TrainConfig
from nemo_bench.launch.batch_script import batch_script, rank_environment
from nemo_bench.launch.plan import results_dir
from nemo_bench.record.folder import EXIT, JOB

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
    for name, value in {"ACCOUNT": "account_name", "PARTITION": "batch", "GPUS_PER_NODE": "8"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
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


@pytest.mark.parametrize(
    ("environment", "overrides", "asked"),
    [
        # Not by default: the account's own; GPUs, which some clusters refuse; singleton, which would serialise a sweep.
        ("", "", dict.fromkeys(("account", "partition", "gpus-per-node", "gres", "dependency", "qos"))),
        ("SLURM_ACCOUNT=acc", "", {"account": "acc"}),
        ("SLURM_PARTITION=batch", "", {"partition": "batch"}),
        ("SBATCH_PARTITION=batch", "", {"partition": "batch"}),
        ("SLURM_PARTITION= SBATCH_PARTITION=batch", "", {"partition": "batch"}),  # an empty variable is unset
        ("SLURM_PARTITION=batch", "cluster.partition=debug", {"partition": "debug"}),
        ("SLURM_GPUS_PER_NODE=h100:8", "", {"gpus-per-node": "h100:8"}),
        ("SLURM_GPUS_PER_NODE=null", "", {"gpus-per-node": None}),  # as in the recipe
        ("SLURM_GPUS_PER_NODE=", "", {"gpus-per-node": None}),
        ("SLURM_JOB_ID=5 SLURM_GPUS_PER_NODE=4 SBATCH_GPUS_PER_NODE=8", "", {"gpus-per-node": "8"}),  # of an outer job
        ("SBATCH_QOS=high", "", {"qos": "high"}),
        ("SBATCH_RESERVATION=tonight SBATCH_CONSTRAINT=h100", "", {"reservation": "tonight", "constraint": "h100"}),
        ("SBATCH_TIMELIMIT=00:20:00", "", {"time": "00:20:00"}),
        ("", "cluster.gpus_per_node=8 cluster.gres='gpu:8'", {"gres": "gpu:8", "gpus-per-node": None}),
        ("", "+cluster.additional_parameters={mail-type:END,switches:2}", {"mail-type": "END", "switches": "2"}),
        ("", "+cluster.additional_parameters={exclusive:false}", {"exclusive": None}),
        # Checkpoints bring a warning and a requeue.
        ("", "", {"no-requeue": "", "requeue": None, "signal": None}),
        ("", "checkpoint.every_n_steps=10 cluster.signal_s=60", {"requeue": "", "signal": "USR1@60"}),
    ],
)
def test_what_environment_and_command_line_ask_for(
    environment: str, overrides: str, asked: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, _, value in (assignment.partition("=") for assignment in environment.split()):
        monkeypatch.setenv(name, value)
    requested = options(script(*overrides.split()))
    assert {option: requested.get(option) for option in asked} == asked


def test_without_a_container_the_nodes_run_this_interpreter() -> None:
    line = srun_line(script("cluster.container=null"))
    assert sys.executable in line and not any("container" in word for word in line)
    mounted = srun_line(script("cluster.container.mounts=['/data:/data']"))
    assert f"--container-mounts={STAGE}:{STAGE},{PROJECT}:{PROJECT},/data:/data" in mounted


def test_srun_gets_the_variables_that_it_hands_to_the_container(tmp_path: Path) -> None:
    """By an srun that records, for machines without PyXis (tests/slurm/test_containers.py)."""
    record = {"srun": 'printf "%s\\n" "$@" > args; env -0 > env; exit 3', "scontrol": "echo n1"}
    for name, line in record.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / JOB).write_text('{"id": null}')
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "n1"}
    text = batch_script(composed("scale=64gpu", "+cluster.env={ODD: 'a b$c'}"), tmp_path)
    assert subprocess.run(["bash", "-c", text], cwd=tmp_path, env=environment).returncode == 3
    arguments, given = (tmp_path / "args").read_text().splitlines(), (tmp_path / "env").read_text().split("\0")
    assert arguments == srun_line(text)[1:]
    (names,) = [word.partition("=")[2].split(",") for word in arguments if word.startswith("--container-env=")]
    assert set(names) <= {line.partition("=")[0] for line in given} and "ODD=a b$c" in given
    assert json.loads((tmp_path / JOB).read_text()) == {"id": "12"}
    assert json.loads((tmp_path / EXIT).read_text())["exit_code"] == 3


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), ("1", "2097152", "expandable_segments:True")),
        (("model=8b",), ("1", None, "expandable_segments:True")),  # CP2
        (("model=8b", "model.context_parallel_size=1"), (None, None, "expandable_segments:True")),
        (("gpu=b200",), ("32", "2097152", "expandable_segments:True")),
        (("gpu=gb200", "model=8b", "model.context_parallel_size=1"), ("32", None, "expandable_segments:True")),
        (("model.cuda_graph_impl=local",), ("1", "2097152", None)),
        (("model=8b", "model.optim.use_megatron_fsdp=true"), (None, None, None)),
        (("+entrypoint.env={PYTORCH_CUDA_ALLOC_CONF: null, NCCL_P2P_NET_CHUNKSIZE: 1}",), ("1", "1", None)),
        (("+cluster.env={CUDA_DEVICE_MAX_CONNECTIONS: 8}",), ("8", "2097152", "expandable_segments:True")),
    ],
)
def test_the_environment_follows_from_gpu_and_layout(
    overrides: tuple[str, ...], expected: tuple[str | None, ...]
) -> None:
    environment = rank_environment(composed("scale=64gpu", *overrides))
    names = ("CUDA_DEVICE_MAX_CONNECTIONS", "NCCL_P2P_NET_CHUNKSIZE", "PYTORCH_CUDA_ALLOC_CONF")
    assert tuple(environment.get(name) for name in names) == expected
    assert environment["NVTE_FWD_LAYERNORM_SM_MARGIN"] == "16"


def test_ranks_keep_to_the_cpus_of_their_gpu_and_gpus_may_boost() -> None:
    text = script("cluster.numa_gpus=4", "cluster.vboost=true")
    boost, srun = (shlex.split(line) for line in text.splitlines() if line.startswith("srun "))
    assert boost[1:3] == ["--ntasks=8", "--ntasks-per-node=1"] and boost[-3:] == ["boost-slider", "--vboost", "1"]
    at = srun.index("bash")
    command = [*srun[at : at + 4], "/bin/echo", "rank"]
    # numactl itself need not be here.
    command[2] = command[2].replace("exec numactl", "numactl() { echo $*; }; numactl")
    done = subprocess.run(command, env={"SLURM_LOCALID": "5"}, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["--cpunodebind=1", "--membind=1", "/bin/echo", "rank"]
    assert srun[at + 4] == "python3"
