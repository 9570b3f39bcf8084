"""profile=nsys in a Slurm job: the batch script is as ever, and the ranks that were chosen run under nsys."""

from __future__ import annotations

from pathlib import Path

from nemo_bench.record import folder as record

from ..integration.conftest import SMALL
from ..nsys import calls, install
from .cluster import SlurmCluster
from .conftest import SHARED, Scripts


def test_chosen_ranks_run_under_nsys_and_their_end_is_seen(slurm: SlurmCluster, tmp_path: Path) -> None:
    stage = tmp_path / "stage"
    stage.mkdir()
    scripts = Scripts(slurm, stage)
    install(tmp_path / "bin")
    # GPUs that the nodes do not have, since a CPU is not profiled by nsys: Lightning ends every rank with that word.
    scripts.submit(
        "scale=local",
        *SHARED,
        *SMALL,
        "data=mock",
        "gpu=h100",
        "precision=bf16",
        "trainer.num_nodes=2",
        "profile=nsys",
        "profile.ranks=[1]",
        f"cluster.setup=['export PATH={tmp_path}/bin:$PATH']",
    )
    job_id, run_dir = scripts.last()
    assert slurm.wait_for_end(job_id, 120) == "FAILED"
    ((_, arguments),) = calls(tmp_path / "bin").items()
    assert f"--output={run_dir}/profile/rank1" in arguments
    assert arguments[-4:] == ["-u", "-m", "nemo_bench.training.rank", str(run_dir)]
    # Its log is its own, and none but it has left something to look at.
    assert (run_dir / "rank1.out").stat().st_size > 0
    assert {path.name for path in (run_dir / record.PROFILE).iterdir()} <= {"rank1.nsys-rep"}
