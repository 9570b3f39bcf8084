"""Jobs in containers: `srun --container-image` by NVIDIA's PyXis and enroot, and an image from a registry."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_bench.record import folder as record
from nemo_bench.report.runs import load_run

from ..integration.conftest import SMALL
from . import pyxis
from .cluster import SlurmCluster, wait_for
from .conftest import PROJECT, SHARED, Scripts, skip_unless_required, started

NEMO_1 = os.environ.get("NEMO_BENCH_NEMO_1")
POINT = (
    *("scale=local", "hydra/launcher=submitit_slurm", "cluster=slurm", *SHARED, *SMALL, "trainer.devices=1"),
    *("+cluster.env={OMP_NUM_THREADS: '1'}", "hydra.launcher.wait=true"),
)


def mounts(*more: str) -> str:
    return f"cluster.container.mounts=[{','.join([*(f'{path}:{path}' for path in pyxis.MOUNTED), *more])}]"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pyxis.make_root(tmp_path_factory.mktemp("image") / "root")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """A cluster of two nodes that starts containers."""
    if reason := pyxis.no_sources():
        pytest.skip(reason)
    if reason := pyxis.why_not():
        skip_unless_required(reason)
    prefix = pyxis.install(tmp_path_factory.mktemp("pyxis"))
    with started(tmp_path_factory.mktemp("slurm-pyxis"), live_nodes=2, total_nodes=2, pyxis=prefix) as cluster:
        yield cluster
    shutil.rmtree(prefix)


@pytest.fixture(scope="module")
def scripts(slurm: SlurmCluster, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Scripts:
    """One stage folder for all, with the image of each entrypoint at its place."""
    stage = tmp_path_factory.mktemp("stage")
    for version in ("24.09", "25.11"):
        pyxis.squash(root, stage / f"nvidia+nemo+{version}.sqsh")
    return Scripts(slurm, stage)


def test_two_nodes_train_in_the_image(scripts: Scripts) -> None:
    python = f"cluster.container.python={pyxis.PYTHON}"  # nowhere but in the image
    done = scripts.run("train.py", *POINT, mounts(), python, "trainer.num_nodes=2", "trainer.max_steps=6")
    assert done.returncode == 0 and " 6/6" in done.stdout, done.stdout + done.stderr
    _, run_dir = scripts.last()
    assert [row["step"] for row in record.read_lines(run_dir / record.STEPS)[0]] == list(range(6))
    environment = json.loads((run_dir / "node.json").read_text())["environment"]
    seen = {name: environment[name] for name in ("SLURM_NNODES", "WORLD_SIZE", "OMP_NUM_THREADS", "PYTHONPATH")}
    # The job's own values, not those of the image.
    assert seen == {"SLURM_NNODES": "2", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}


PYTHON = "cluster.container.python"
CAUSES = {
    "forgotten mount": (["cluster.container.mounts=[]"], f"the node has no {sys.executable}: a wrong interpreter"),
    "missing mount": ([mounts("/no/data:/data")], "the node does not have /no/data"),
    "missing image": (["cluster.container.image=127.0.0.1:9/nemo:1"], "the container image could not be imported: 127"),
    "image on no node": (
        ["cluster.container.image=${stage_path}/a.sqsh", "cluster.setup=['rm $STAGE_PATH/a.sqsh']"],
        "the node does not have {stage}/a.sqsh",
    ),
    "missing interpreter": (["cluster.container.python=/opt/no/python"], "the node has no /opt/no/python"),
    "wrong interpreter": (
        [f"{PYTHON}={sys.base_prefix}/bin/python3"],
        "the interpreter of the ranks has no module hydra",
    ),
    "read-only container": (
        [mounts("${stage_path}:${stage_path}:ro"), "cluster.container.writable=false"],
        "the ranks cannot write '{stage}/results/",
    ),
}


def test_a_container_that_cannot_run_ends_with_its_cause(scripts: Scripts, root: Path) -> None:
    """All at once: each waits for Slurm most of the time."""
    shutil.copy(scripts.stage / "nvidia+nemo+25.11.sqsh", scripts.stage / "a.sqsh")
    common = (*POINT, "data=mock", mounts(), f"cluster.container.python={sys.executable}")
    processes = {name: scripts.start("train.py", *common, *overrides) for name, (overrides, _) in CAUSES.items()}
    for name, process in processes.items():
        out, _ = process.communicate(timeout=120)
        cause = CAUSES[name][1].format(stage=scripts.stage)
        assert process.returncode == 1 and f"    {cause}" in out and "first error, in " in out, f"{name}: {out}"
        assert "Traceback" not in out, out


def test_an_import_from_a_registry_is_interrupted_and_goes_on(
    scripts: Scripts, slurm: SlurmCluster, root: Path, tmp_path: Path
) -> None:
    assert slurm.pyxis is not None
    cache, image = slurm.pyxis / "cache", scripts.stage / "imported.sqsh"
    with pyxis.registry(tmp_path, root) as (name, server):
        overrides = ("parts=[image]", f"entrypoint.container={name}", f"entrypoint.image={image.name}", "image_gib=0.1")
        importing = scripts.start("setup_stage.py", *overrides)
        wait_for(lambda: len(list(cache.glob("?" * 64))) >= 2, "the first layer", 60)
        server.send_signal(signal.SIGSTOP)
        importing.send_signal(signal.SIGINT)
        out, _ = importing.communicate(timeout=60)
        assert importing.returncode == 130 and "Traceback" not in out and not image.exists(), out
        assert list((slurm.pyxis / "tmp").iterdir()) == []
        server.send_signal(signal.SIGCONT)
        again = scripts.run("setup_stage.py", *overrides)
    assert again.returncode == 0 and "image: made" in again.stdout, again.stdout + again.stderr
    assert "2 missing layers" not in again.stderr
    shown = slurm.run("srun", f"--container-image={image}", "sh", "-c", "echo /opt/*", check=True).stdout
    assert shown == "/opt/NeMo /opt/bin /opt/noise\n"


@pytest.mark.skipif(not NEMO_1, reason="NEMO_BENCH_NEMO_1 names no interpreter with NeMo 2.0.0 (make test-nemo-1)")
def test_nemo_1s_program_runs_at_its_path_in_the_image(scripts: Scripts) -> None:
    assert NEMO_1 is not None
    environment = Path(NEMO_1).parents[1]
    container = (mounts(f"{environment}:{environment}"), f"cluster.container.python={NEMO_1}")
    steps = ("trainer.max_steps=6", "data.num_workers=0")
    done = scripts.run("train.py", "entrypoint=nemo_24_09", *POINT, *container, *steps)
    assert done.returncode == 0, done.stdout + done.stderr
    _, run_dir = scripts.last()
    run = load_run(run_dir)
    assert run.final and run.steps.step == [*range(6)]
    assert f"/{pyxis.PROGRAM} " in (run_dir / "job.sbatch").read_text()
    assert json.loads((run_dir / "node.json").read_text())["packages"]["nemo_toolkit"] == "2.0.0"
