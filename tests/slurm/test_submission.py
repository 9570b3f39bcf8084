"""`train.py hydra/launcher=submitit_slurm` and `jobs.py` against a real Slurm."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from itertools import pairwise
from pathlib import Path

import pytest

from nemo_bench.record import folder as record

from ..integration.conftest import SMALL, processes_of
from ..nsys import calls, install
from .cluster import SlurmCluster, process_name, wait_for
from .conftest import CLOSED, SHARED, SUBMIT, Scripts

TABLE = ("precision=bf16,fp8", "scale=64gpu,128gpu,256gpu,512gpu,1024gpu,2048gpu", "data=mock")
ONE_GPU = ("model=8b", "scale=1gpu", "model.context_parallel_size=1", "data=mock", "check_memory=false", *SHARED)


def test_the_whole_table_each_point_with_its_own_nodes(scripts: Scripts, slurm: SlurmCluster) -> None:
    shown = scripts.submit(*TABLE, *CLOSED, SLURM_GPUS_PER_NODE="8")
    jobs = scripts.submitted()
    assert "12 jobs submitted" in shown and "PENDING" in shown
    for job in jobs:
        asked = slurm.job_record(job["id"])
        assert asked["JobState"] == "PENDING"
        assert int(asked["NumNodes"].split("-")[0]) == job["nodes"] == job["gpus"] // 8
        assert asked["TresPerNode"].endswith("gpu:8")
    assert sorted(job["gpus"] for job in jobs) == sorted([64, 128, 256, 512, 1024, 2048] * 2)
    # Listed, then cancelled, by the id alone.
    assert scripts.jobs("list").count("PENDING") == 12
    ids = [job["id"] for job in jobs]
    assert scripts.jobs("cancel", *ids).split()[1:] == ids
    assert scripts.jobs().count("CANCELLED") == 12


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("model=8b scale=2048gpu trainer.num_nodes=257", "Requested node configuration is not available"),
        ("scale=64gpu cluster.partition=nosuch", "invalid partition specified: nosuch"),
        ("scale=64gpu cluster.time=400-00:00:00", "time limit"),
        ("scale=64gpu +cluster.additional_parameters.nosuch=1", "unrecognized option '--nosuch=1'"),
    ],
)
def test_what_the_scheduler_refuses_is_said_in_its_words(scripts: Scripts, overrides: str, words: str) -> None:
    for launch in ("launch=run", "launch=dry"):
        assert words.lower() in scripts.submit("data=mock", *CLOSED, *overrides.split(), launch, code=2).lower()
    assert scripts.jobs().startswith("no job was submitted")


def test_no_point_is_submitted_when_one_is_wrong(scripts: Scripts, slurm: SlurmCluster) -> None:
    before = slurm.run("squeue", "-h", "-t", "all").stdout
    said = scripts.submit("scale=64gpu,8gpu,128gpu", "data=mock", *CLOSED, code=2)
    assert "1 problem in 1 of 3 points; nothing was submitted" in said and "scale=8gpu data=mock" in said
    assert slurm.run("squeue", "-h", "-t", "all").stdout == before
    assert list(scripts.stage.iterdir()) == []


def test_a_resubmitted_job_has_the_configuration_it_had(scripts: Scripts, slurm: SlurmCluster) -> None:
    scripts.submit("scale=64gpu", "data=mock", "model.optim.lr=1.5e-4", *CLOSED)
    job_id, run_dir = scripts.last()
    assert "cancel it first" in scripts.jobs("resubmit", job_id, code=2)
    scripts.jobs("cancel", job_id)
    assert scripts.jobs("resubmit").startswith("no job to resubmit")  # a cancelled one was meant to end
    # Of two commands at once, one submits it.
    both = [scripts.start("jobs.py", "resubmit", job_id) for _ in range(2)]
    shown = "".join(process.communicate(timeout=60)[0] for process in both)
    ((again, name),) = re.findall(r"^job (\d+): (\S+) again$", shown, re.MULTILINE)
    assert again != job_id and name == run_dir.name and "no job to resubmit" in shown
    assert slurm.job_record(again)["NumNodes"].startswith("8")
    (new,) = {path.parent for path in scripts.stage.glob("results/**/run.json")} - {run_dir}
    assert (new / "config.yaml").read_text() == (run_dir / "config.yaml").read_text()
    scripts.jobs("cancel", again)


def test_two_nodes_of_two_tasks_train_to_the_last_step(scripts: Scripts, slurm: SlurmCluster) -> None:
    """DP2 x TP2 over gloo, followed to the end."""
    shown = scripts.submit(
        "scale=local",
        *SUBMIT,  # scale=local brings cluster=local along; the command line wins
        *SHARED,
        *SMALL,
        "trainer.num_nodes=2",
        "trainer.devices=2",
        "model.tensor_model_parallel_size=2",
        "trainer.max_steps=6",
        "hydra.launcher.wait=true",
    )
    assert "all 1 jobs completed" in shown and "  6/6  " in shown and "evidence: " in shown
    job_id, run_dir = scripts.last()
    assert slurm.job_state(job_id) == "COMPLETED"
    assert record.RunFolder(run_dir).status().state == "completed"
    steps, _ = record.read_lines(run_dir / record.STEPS)
    assert [row["step"] for row in steps] == list(range(6))
    assert sorted(path.name for path in run_dir.glob("rank*.out")) == [f"rank{rank}.out" for rank in range(4)]
    assert (run_dir / "rank0.out").read_text().count("train_step_timing in s: ") == 6
    environment = json.loads((run_dir / "node.json").read_text())["environment"]
    assert (environment["SLURM_NTASKS"], environment["WORLD_SIZE"]) == ("4", "4")


def test_a_stopped_rank_is_named_and_a_killed_one_fails_the_job_at_once(scripts: Scripts, slurm: SlurmCluster) -> None:
    scripts.submit("scale=local", *SHARED, *SMALL, "trainer.num_nodes=2", "trainer.max_steps=100000")
    job_id, run_dir = scripts.last()
    slurm.wait_for_state(job_id, "RUNNING")
    wait_for(lambda: (run_dir / "rank1.out").exists(), "rank 1 to start", 60)
    ranks = wait_for(lambda: _ranks(run_dir) if len(_ranks(run_dir)) == 2 else [], "both ranks", 60)
    wait_for(lambda: record.RunFolder(run_dir).progress().steps > 4, "some steps", 120)
    os.kill(ranks[-1], signal.SIGSTOP)
    wait_for(
        lambda: "left no stack" in (record.RunFolder(run_dir).status().reason or ""), "the stopped rank's name", 60
    )
    logs = "".join(path.read_text() for path in run_dir.glob("rank*.out"))
    assert re.search(r"nemo_bench: step \d+ lasts for \d+ s: rank [01] \(process 0 of \S+\) left no stack", logs)
    os.kill(ranks[-1], signal.SIGKILL)
    assert slurm.wait_for_end(job_id) == "FAILED"
    wait_for(lambda: not _ranks(run_dir), "all ranks to be gone", 30)
    assert record.RunFolder(run_dir).status().state == "failed"
    assert "was killed" in scripts.jobs("log", job_id)
    assert "FAILED: srun: error: " in scripts.jobs()


def _ranks(run_dir: Path) -> list[int]:
    return [pid for pid in processes_of(run_dir) if process_name(pid) != "srun"]


def test_an_error_in_a_rank_is_named_and_the_chosen_rank_runs_under_nsys(
    scripts: Scripts, slurm: SlurmCluster, tmp_path: Path
) -> None:
    install(tmp_path / "bin")
    # A GPU that the nodes do not have, since a CPU is not profiled by nsys: Lightning says so on every rank.
    gpu = ("gpu=h100", "precision=bf16", "data=mock", "trainer.num_nodes=2")
    setup = f"cluster.setup=['export PATH={tmp_path}/bin:$PATH']"
    scripts.submit("scale=local", *SHARED, *SMALL, *gpu, "profile=nsys", "profile.ranks=[1]", setup)
    job_id, run_dir = scripts.last()
    assert slurm.wait_for_end(job_id, 120) == "FAILED"
    assert re.search(r"rank [01] on n\d+: ", scripts.jobs("log", job_id))
    assert re.search(r"rank [01] on n\d+: ", record.RunFolder(run_dir).status().reason or "")
    ((_, arguments),) = calls(tmp_path / "bin").items()
    assert f"--output={run_dir}/profile/rank1" in arguments
    assert arguments[-4:] == ["-u", "-m", "nemo_bench.training.rank", str(run_dir)]
    assert (run_dir / "rank1.out").stat().st_size > 0
    assert {path.name for path in (run_dir / record.PROFILE).iterdir()} <= {"rank1.nsys-rep"}


def test_a_preempted_job_is_requeued_resumes_and_finishes(scripts: Scripts, slurm: SlurmCluster) -> None:
    steps = ("trainer.max_steps=30", "checkpoint.every_n_steps=5")
    node = f"cluster.nodelist=n{slurm.live_nodes}"
    scripts.submit("scale=local", *SHARED, *SMALL, *steps, "cluster.partition=low", node)
    job_id, run_dir = scripts.last()
    wait_for(lambda: record.RunFolder(run_dir).last_checkpoint(), "a checkpoint", 120)
    taker = slurm.submit("-p", "high", "-w", f"n{slurm.live_nodes}", "--exclusive", script="sleep 1")
    slurm.wait_for_state(job_id, "PENDING", 60)
    slurm.wait_for_end(taker)
    assert slurm.wait_for_end(job_id, 180) == "COMPLETED"
    assert slurm.job_record(job_id)["Restarts"] == "1"
    # It went on from its last checkpoint, not from the beginning.
    done = [row["step"] for row in record.read_lines(run_dir / record.STEPS)[0]]
    assert (done[0], done[-1]) == (0, 29)
    assert min([after for before, after in pairwise(done) if after <= before], default=5) >= 5
    assert record.RunFolder(run_dir).status().state == "completed"


def test_a_restarted_controller_a_requeue_and_a_lost_node_are_waited_for(scripts: Scripts, slurm: SlurmCluster) -> None:
    """Slurm requeues what has checkpoints."""
    steps = ("trainer.max_steps=2", "checkpoint.every_n_steps=2", "cluster.setup=['sleep 5']")
    point = ("scale=local", *SHARED, *SMALL, "data=mock", *steps, "hydra.launcher.wait=true")
    waiting = scripts.start("train.py", *SUBMIT, *point)
    wait_for(lambda: [job for job in scripts.submitted() if job["id"]], "the submission", 60)
    job_id, run_dir = scripts.last()
    slurm.wait_for_state(job_id, "RUNNING")
    slurm.restart_controller()
    slurm.run("scontrol", "requeue", job_id, check=True)
    slurm.wait_for_state(job_id, "RUNNING")
    node = slurm.job_record(job_id)["NodeList"]
    slurm.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost", check=True)
    said, _ = waiting.communicate(timeout=200)
    slurm.run("scontrol", "update", f"NodeName={node}", "State=RESUME")  # unless its slurmd has brought it back
    assert waiting.returncode == 0 and "all 1 jobs completed" in said, said
    assert slurm.job_record(job_id)["Restarts"] == "2"
    assert [row["step"] for row in record.read_lines(run_dir / record.STEPS)[0]][-2:] == [0, 1]


def test_a_time_limit_is_seen(scripts: Scripts, slurm: SlurmCluster) -> None:
    scripts.submit("scale=local", *SHARED, *SMALL, "data=mock", "cluster.setup=['sleep 300']")
    job_id, _ = scripts.last()
    slurm.wait_for_state(job_id, "RUNNING")
    slurm.run("scontrol", "update", f"JobId={job_id}", "EndTime=now+1seconds", check=True)
    assert "1 of 1 jobs did not complete" in scripts.jobs("follow", job_id, code=1)  # Slurm looks every 30 s
    assert slurm.job_state(job_id) == "TIMEOUT"
    assert "TIMEOUT" in scripts.jobs()


def test_a_cancelled_job_stays_cancelled(scripts: Scripts, slurm: SlurmCluster) -> None:
    """Also where ranks take SIGTERM for a preemption, and save: the requeue that they ask for is not made."""
    scripts.submit("scale=local", *SHARED, *SMALL, "trainer.max_steps=100000", "checkpoint.every_n_steps=3")
    job_id, run_dir = scripts.last()
    wait_for(lambda: record.RunFolder(run_dir).last_checkpoint(), "a checkpoint", 120)
    scripts.jobs("cancel", job_id)
    assert slurm.wait_for_end(job_id) == "CANCELLED"
    wait_for(lambda: not _ranks(run_dir), "all ranks to be gone", 30)
    assert slurm.job_state(job_id) == "CANCELLED"
    assert slurm.job_record(job_id)["Restarts"] == "0"


def test_ctrl_c_while_waiting_leaves_the_jobs(scripts: Scripts, slurm: SlurmCluster) -> None:
    wait = "hydra.launcher.wait=true"
    process = scripts.start("train.py", *SUBMIT, "scale=64gpu", "data=mock", *CLOSED, wait)
    assert process.stdout is not None
    while "PENDING" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(2)  # it waits now
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and "the jobs go on" in rest
    job_id, _ = scripts.last()
    assert slurm.job_state(job_id) == "PENDING"
    scripts.jobs("cancel", job_id)


def test_accounts_are_checked_and_sacct_is_asked(slurm_with_accounting: SlurmCluster, tmp_path: Path) -> None:
    scripts = Scripts(slurm_with_accounting, tmp_path)
    assert "Invalid account" in scripts.submit(*ONE_GPU, code=2, SLURM_ACCOUNT="nosuch")
    # A batch script that ends before srun leaves no exit.json: Slurm's own books say how.
    scripts.submit(*ONE_GPU, "cluster.setup=['exit 3']", SLURM_ACCOUNT="nemo")
    job_id, run_dir = scripts.last()
    assert slurm_with_accounting.wait_for_end(job_id) == "FAILED"
    wait_for(lambda: "FAILED" in slurm_with_accounting.run("sacct", "-X", "-n", "-o", "State").stdout, "sacct", 20)
    assert not (run_dir / record.EXIT).exists()
    assert "FAILED" in scripts.jobs()
