"""`entrypoint=nemo_24_09` through a real Slurm; what stands in is the program alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from nemo_bench.record import folder as record
from nemo_bench.report.runs import load_run

from .cluster import SlurmCluster
from .conftest import PROJECT, SHARED, Scripts

PROGRAM = Path(__file__).parent / "nemo_1_program.py"
POINT = (
    *("entrypoint=nemo_24_09", f"entrypoint.program={PROGRAM}", "model=8b", "scale=8gpu", "data=mock"),
    *("trainer.num_nodes=2", "trainer.devices=2", "model.global_batch_size=8", "trainer.max_steps=20"),
    "cluster.srun_args=['--mpi=none']",  # the last one wins: this machine may have no PMIx
)


@pytest.fixture
def scripts(slurm: SlurmCluster, tmp_path: Path) -> Scripts:
    stage = tmp_path / "a stage's = $HOME"
    stage.mkdir()
    return Scripts(slurm, stage)


def test_a_job_leaves_a_run_folder_like_any_other(scripts: Scripts) -> None:
    shown = scripts.submit(*POINT, *SHARED, "hydra.launcher.wait=true")
    assert "all 1 jobs completed" in shown and "20/20" in shown
    _, run_dir = scripts.last()
    assert run_dir.parent == scripts.stage / "results" / "24.11" / "bf16" / "8b" / "4"
    assert sorted(path.name for path in run_dir.glob("rank*")) == [f"rank{rank}.out" for rank in range(4)]
    assert json.loads((run_dir / "node.json").read_text())["environment"]["SLURM_NTASKS"] == "4"
    run = load_run(run_dir)
    assert run.final and run.times is not None and run.times.median_s == 11.2
    assert (run.model, run.precision, run.gpus, run.entrypoint, run.version) == ("8b", "bf16", 4, "nemo_24_09", "24.11")
    (log,) = run_dir.parent.glob("log-nemo_llama3.1_8b_4_*.out")
    assert log.samefile(run_dir / "rank0.out")
    assert "20/20" in scripts.jobs() and "COMPLETED" in scripts.jobs()


def test_the_failing_rank_is_named_with_its_error(scripts: Scripts, slurm: SlurmCluster) -> None:
    scripts.submit(*POINT, *SHARED, "+cluster.env={FAIL_RANK: '2'}")
    job_id, run_dir = scripts.last()
    assert slurm.wait_for_end(job_id) == "FAILED"
    status = record.RunFolder(run_dir).status()
    assert (status.state, status.rank) == ("failed", 2)
    assert status.reason is not None and "ValueError: no user buffers on n" in status.reason
    assert "ValueError: no user buffers" in scripts.jobs("log", job_id)


def test_the_recipes_own_command_runs_the_point_in_its_job(scripts: Scripts, slurm: SlurmCluster) -> None:
    request = ("-N", "2", "--ntasks-per-node=2", "--mem=1", f"--output={scripts.stage}/launch.out")
    small = ("model.global_batch_size=8", "trainer.max_steps=20", "cluster.container=null", *POINT[-1:])
    variables = {"DTYPE": "bf16", "MODEL_SIZE": "8b", "STAGE_PATH": str(scripts.stage), "PYTHON": sys.executable}
    done = slurm.run(
        *("sbatch", "--parsable", *request, "launch.sh", f"entrypoint.program={PROGRAM}", "data=mock", *small),
        cwd=PROJECT,
        env=variables,
    )
    job_id = done.stdout.strip()
    assert slurm.wait_for_end(job_id) == "COMPLETED", (scripts.stage / "launch.out").read_text()
    (run_dir,) = (scripts.stage / "results/24.11/bf16/8b/4").glob("2*")
    assert load_run(run_dir).final and record.RunFolder(run_dir).status().state == "completed"
    assert "COMPLETED" in scripts.jobs() and job_id in scripts.jobs()
