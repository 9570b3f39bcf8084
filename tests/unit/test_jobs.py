"""What is said of jobs: whatever Slurm answers, and whatever they left in their folders."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from rich.console import Console

from jobs import run as run_command
from nemo_bench.cluster import job, jobs, slurm
from nemo_bench.cluster.job import Job
from nemo_bench.config import ComposedPoint
from nemo_bench.errors import BenchError
from nemo_bench.launch import submission
from nemo_bench.record.folder import RunFolder, timestamp

from ..composing import PROJECT

H200 = Path(__file__).parents[1] / "runs/nemo-2.7.3/bf16/70b/1/20261122-172402-5f1a"


class Cluster:
    """Slurm's commands as shell scripts, and a stage folder."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.stage = folder / "bin", folder / "stage"
        self.bin.mkdir()
        self.says("squeue", "")

    def has(self, command: str, body: str) -> None:
        path = self.bin / command
        path.write_text(f'#!/bin/sh\necho "$@" >> {path}.calls\n{body}\n')
        path.chmod(0o755)

    def says(self, command: str, text: str) -> None:
        self.has(command, f"echo {shlex.quote(text)}")

    def job(self, job_id: str | None, *, run: bool = False, steps: int = 0, **details: Any) -> Path:
        folder = self.stage / ("results/24.09/fp8/70b/128" if run else "results.stage_setup") / f"folder-{job_id}"
        content = {"id": job_id, "name": "fill", "submitted_at": timestamp(), **details}
        if run:
            content |= {"point": "70b fp8 128gpu", "max_steps": 50, "requeue": False}
            record = RunFolder(folder)
            record.create(config_yaml="", command=[], overrides=[], max_steps=50, state="submitted")
            for step in range(steps):
                record.write_step({"step": step, "train_step_timing_s": 11.0})
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "job.json").write_text(json.dumps(content))
        return folder

    def jobs(self) -> list[Job]:
        return jobs.submitted(self.stage)

    def listing(self, width: int = 300) -> str:
        console = Console(width=width, record=True)
        console.print(jobs.table(self.jobs()))
        return console.export_text()


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    cluster = Cluster(tmp_path)
    monkeypatch.setenv("PATH", str(cluster.bin))
    monkeypatch.setattr(job, "SETTLE_S", -1.0)
    monkeypatch.setattr(jobs, "TICK_S", 0.01)
    monkeypatch.setattr(Job, "watcher", slurm.Books())
    return cluster


def left(folder: Path, job_id: str, *, exit_code: int | None = None, log: str | None = None) -> None:
    if exit_code is not None:
        (folder / "exit.json").write_text(json.dumps({"exit_code": exit_code, "job_id": job_id, "ended_at": "now"}))
    if log is not None:
        (folder / f"slurm-{job_id}.out").write_text(log)


# How Slurm shows the batch scripts of `Cluster.job("7")`, whatever leads to the stage folder.
FILL, RUN = "/x/results.stage_setup/folder-7/job.sbatch", "/x/fp8/70b/128/folder-7/job.sbatch"
TIME_LIMIT = "slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-11-24T10:00:00 DUE TO TIME LIMIT ***\n"


@pytest.mark.parametrize(
    ("squeue", "sacct", "exit_code", "log", "state"),
    [
        (f"7|RUNNING|{FILL}", None, None, None, "RUNNING"),
        (f"7|RUNNING|{FILL}", f"7|PENDING|sbatch {FILL}", None, None, "RUNNING"),  # squeue is fresher
        ("", f"7|CANCELLED by 0|sbatch --parsable {FILL}", None, None, "CANCELLED"),
        ("", None, 0, None, "COMPLETED"),
        ("", None, 3, None, "FAILED"),
        ("", None, None, TIME_LIMIT, "TIMEOUT"),
        ("", None, None, TIME_LIMIT.replace(" DUE TO TIME LIMIT", ""), "CANCELLED"),
        ("", None, None, TIME_LIMIT.replace("TIME LIMIT", "NODE FAILURE"), "NODE_FAIL"),
        ("", None, None, "nothing of note\n", "UNKNOWN"),
        ("7|RUNNING|/home/somebody/else.sh", None, None, None, "UNKNOWN"),  # ids start over
        (f"7|PREEMPTED|{FILL}", None, None, None, "REQUEUED"),
        (f"70|RUNNING|{FILL}", None, None, None, "UNKNOWN"),
    ],
)
def test_a_jobs_state(
    cluster: Cluster, squeue: str, sacct: str | None, exit_code: int | None, log: str | None, state: str
) -> None:
    cluster.says("squeue", squeue)
    if sacct is not None:
        cluster.says("sacct", sacct)
    left(cluster.job("7"), "7", exit_code=exit_code, log=log)
    (job,) = cluster.jobs()
    assert (job.state, job.active) == (state, state in ("RUNNING", "REQUEUED"))


def test_a_completed_run_is_listed_with_its_result_which_is_found_once(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = cluster.job("7", run=True)
    shutil.copytree(H200, folder, dirs_exist_ok=True)
    left(folder, "7", exit_code=0)
    shown = re.sub(r" +", " ", cluster.listing())
    assert "step time (s) TFLOP/s MFU verdict" in shown
    assert re.search(r"7 COMPLETED 70b fp8 128gpu 30/50 1\.\d+ \d{3}\.\d 6\d\.\d% NO REFERENCE", shown), shown
    monkeypatch.setattr(jobs, "build_report", None)
    assert re.sub(r" +", " ", cluster.listing()) == shown
    for arguments, text in ((["--path"], f"{folder}\n"), ([], "what the 24.09 recipe reads")):
        command = [sys.executable, str(PROJECT / "jobs.py"), "--stage", str(cluster.stage), "show", "7", *arguments]
        assert text in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_repeats_are_jobs_and_runs_of_their_own(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.has("sbatch", "echo $$")
    overrides = ["scale=64gpu", "data=mock", "cluster.container=null", f"stage_path={cluster.stage}", "repeats=3"]
    with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
        point = ComposedPoint(compose("train", overrides), overrides)
    submission.submit_points([point], wait=False)
    assert "3 of 3 jobs submitted" in capsys.readouterr().out
    submitted = cluster.jobs()
    assert len({job.job_id for job in submitted}) == len({job.folder for job in submitted}) == 3
    assert len({job.what for job in submitted}) == 1


STOPPED = "no step for 60 min, and the last took 11 s"
NOT_BEGUN = "no first step for 60 min: the end of rank 0's log says where it stands"


@pytest.mark.parametrize(
    "row",
    [
        (f"7|RUNNING|{RUN}", None, None, 12, 100, "RUNNING", None),
        (f"7|RUNNING|{RUN}", None, None, 12, 3600, "RUNNING", STOPPED),
        (f"7|RUNNING|{RUN}", None, None, 50, 3600, "RUNNING", None),
        (f"7|RUNNING|{RUN}", None, None, 0, 3600, "RUNNING", NOT_BEGUN),
        (f"7|RUNNING|{RUN}", None, None, 0, 100, "RUNNING", None),
        ("", 0, None, 50, 3600, "COMPLETED", None),
        # A rank, or the whole step, that ends with 0 too early.
        ("", 0, None, 4, 0, "INCOMPLETE", "its ranks ended with exit status 0 at step 4 of 50"),
        (f"7|COMPLETED|{RUN}", 0, None, 0, 0, "INCOMPLETE", "its ranks ended with exit status 0 at step 0 of 50"),
        ("", None, TIME_LIMIT, 31, 0, "TIMEOUT", "CANCELLED AT 2026-11-24T10:00:00 DUE TO TIME LIMIT"),
        ("", 1, "srun: error: n2: task 1: Killed\n", 4, 0, "FAILED", "srun: error: n2: task 1: Killed"),
        ("", 2, "", 4, 0, "FAILED", "exit status 2"),
    ],
)
def test_a_runs_state_and_the_reason_for_it(cluster: Cluster, row: tuple[Any, ...]) -> None:
    squeue, exit_code, log, steps, age_s, state, reason = row
    cluster.says("squeue", squeue)
    folder = cluster.job("7", run=True, steps=steps)
    left(folder, "7", exit_code=exit_code, log=log)
    newest = folder / ("steps.jsonl" if steps else "events.jsonl")
    newest.touch()
    os.utime(newest, (time.time() - age_s,) * 2)
    (job,) = cluster.jobs()
    assert (job.state, job.reason, job.progress.steps) == (state, reason, steps)


def test_of_two_jobs_of_one_id_slurm_means_the_one_whose_script_it_runs(cluster: Cluster) -> None:
    cluster.job("7", submitted_at="2026-01-01T00:00:00Z").rename(cluster.stage / "results.stage_setup/old")
    cluster.job("7")
    cluster.says("squeue", f"7|RUNNING|{FILL}")
    assert [job.state for job in cluster.jobs()] == ["UNKNOWN", "RUNNING"]
    assert jobs.find(cluster.jobs(), "7", cluster.stage).active
    with pytest.raises(BenchError, match=r"no job 99 was submitted from .*; the last ones: 7, 7"):
        jobs.find(cluster.jobs(), "99", cluster.stage)


@pytest.mark.parametrize("damage", ["", "{", "[]", "null"])
@pytest.mark.parametrize(
    "name", ["job.json", "config.yaml", "exit.json", "run.json", "steps.jsonl", "rank3.error.json"]
)
def test_a_damaged_file_ends_no_listing_hides_no_log_and_is_no_traceback(
    cluster: Cluster, name: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = cluster.job("7", run=True)
    left(folder, "7", exit_code=1, log="srun: error: n2: task 1: Killed\n")
    (folder / name).write_text(damage)
    left(cluster.job("8"), "8", exit_code=0)
    assert "COMPLETED" in cluster.listing()
    if name != "job.json":  # which has the id
        run_command("log", cluster.stage, ["7"])
        assert "task 1: Killed" in capsys.readouterr().out
        with pytest.raises(BenchError):
            run_command("resubmit", cluster.stage, ["7"])


def test_an_interrupted_submission_is_found_by_its_script(cluster: Cluster) -> None:
    folder = cluster.job(None)
    assert "UNKNOWN: its submission was interrupted" in cluster.listing() and not cluster.jobs()[0].active
    cluster.says("squeue", f"9|PENDING|{folder}/job.sbatch\n")
    (job,) = cluster.jobs()
    assert job.job_id == "9" and json.loads((folder / "job.json").read_text())["id"] == "9"


SCRIPT = "#!/bin/bash\n#SBATCH --job-name=fill\n"


@pytest.mark.parametrize("answer", ["12", "12;lab", "Welcome 99\n12", "Submitted batch job 12"])
def test_the_id_is_the_last_word_that_sbatch_prints(cluster: Cluster, tmp_path: Path, answer: str) -> None:
    cluster.says("sbatch", answer)
    assert jobs.submit(SCRIPT, tmp_path).job_id == "12"
    assert json.loads((tmp_path / "job.json").read_text())["id"] == "12"


@pytest.mark.parametrize(
    ("sbatch", "words"),
    [
        ("echo 'sbatch: error: Socket timed out on send/recv operation' >&2; exit 1", "Socket timed out"),
        ("exec /bin/sleep 60", "no answer within"),
        ("echo nothing", "did not say"),
    ],
)
def test_without_a_clear_answer_the_job_is_looked_for(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sbatch: str, words: str
) -> None:
    monkeypatch.setattr(slurm, "TIMEOUT_S", 0.5)
    cluster.has("sbatch", sbatch)
    with pytest.raises(BenchError, match=words):
        jobs.submit(SCRIPT, tmp_path)
    assert json.loads((tmp_path / "job.json").read_text())["id"] is None
    cluster.says("squeue", f"13|{tmp_path}/job.sbatch\n")
    assert jobs.submit(SCRIPT, tmp_path).job_id == "13"


@pytest.mark.parametrize("command", ["sbatch", "squeue"])
def test_what_this_shell_is_told_of_itself_reaches_no_command_of_slurm(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    outer = {"SLURM_JOB_ID", "SLURM_NTASKS", "SBATCH_EXCLUSIVE", "SRUN_DEBUG", "PMIX_RANK", "PMI_SIZE"}
    outer |= {"CUDA_VISIBLE_DEVICES", "HYDRA_FULL_ERROR"}
    for name in (*outer, "SLURM_CONF", "HF_TOKEN"):
        monkeypatch.setenv(name, "5")
    cluster.says("sbatch", "12")
    cluster.has(command, f"/usr/bin/env > {tmp_path}/environment; echo 12")
    jobs.submit(SCRIPT, tmp_path)
    cluster.job("7")
    cluster.jobs()
    given = {line.partition("=")[0] for line in (tmp_path / "environment").read_text().splitlines()}
    assert {"SLURM_CONF", "HF_TOKEN"} <= given and not outer & given


@pytest.mark.parametrize("squeue", ["exec /bin/sleep 60", "exit 1"])
def test_a_slurm_that_does_not_answer_is_said_in_time(
    cluster: Cluster, squeue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "TIMEOUT_S", 0.5)
    cluster.has("squeue", squeue)
    left(cluster.job("7"), "7", exit_code=0)
    shown = cluster.listing()
    assert "Slurm does not answer" in shown and "COMPLETED" in shown


def test_an_ascii_locale_submits_from_a_stage_folder_with_other_letters(cluster: Cluster) -> None:
    cluster.says("sbatch", "12")
    stage = cluster.stage / "é 你好"
    stage.mkdir(parents=True)
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PATH": str(cluster.bin)}
    submit = ("train.py", "scale=64gpu", "data=mock", "cluster.container=null", "hydra/launcher=submitit_slurm")
    for script, *arguments in (submit, ("jobs.py",)):
        command = [sys.executable, str(PROJECT / script), *arguments]
        done = subprocess.run(command, env={**locale, "STAGE_PATH": str(stage)}, cwd=stage, capture_output=True)
        assert done.returncode == 0 and done.stderr == b"" and b"12  " in done.stdout, done.stderr
    assert f"RUN='{stage}/" in next(stage.glob("results/*/*/*/*/*/job.sbatch")).read_text()


def test_a_thousand_runs_are_listed_with_one_question_to_slurm(cluster: Cluster) -> None:
    first = cluster.job("0", run=True, steps=50)
    left(first, "0", exit_code=0)
    for number in range(1, 1000):
        folder = cluster.job(str(number), run=True)
        for name in ("steps.jsonl", "exit.json"):
            (folder / name).write_bytes((first / name).read_bytes())
    begin = time.process_time()
    shown = cluster.listing()
    assert time.process_time() - begin < 3
    assert shown.count("COMPLETED") == 1000 and len((cluster.bin / "squeue.calls").read_text().splitlines()) == 1
