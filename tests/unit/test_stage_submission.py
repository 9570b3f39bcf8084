"""What is said of a command's job when it has ended: followed to its end, whether or not it left anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_bench.cluster import jobs
from nemo_bench.cluster.jobs import CommandJob, follow_to_end
from nemo_bench.errors import RunFailed


@pytest.fixture
def slurm_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A squeue that says what is in this file, and no sacct."""
    folder = tmp_path / "bin"
    folder.mkdir()
    said = folder / "said"
    said.write_text("")
    (folder / "squeue").write_text(f'#!/bin/sh\nwhile read -r line; do echo "$line"; done < {said}\n')
    (folder / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    # It waits that long for what a shared file system shows late.
    monkeypatch.setattr(jobs, "_SETTLE_S", -1.0)
    monkeypatch.setattr(jobs, "FOLLOW_INTERVAL_S", 0.01)
    return said


def job(tmp_path: Path, job_id: str, state: str = "PENDING") -> CommandJob:
    folder = tmp_path / job_id
    folder.mkdir()
    return CommandJob("fill", job_id, folder, "python setup_stage.py", state)


def ended(one: CommandJob, exit_code: int, log: str) -> None:
    one.log.write_text(log)
    (one.folder / "exit.json").write_text(json.dumps({"exit_code": exit_code, "job_id": one.job_id}))


def test_a_job_without_a_log(tmp_path: Path, slurm_says: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = job(tmp_path, "7")
    slurm_says.write_text("7|CANCELLED\n")
    with pytest.raises(RunFailed, match=r"^job 7 did not complete \(CANCELLED\)") as failure:
        follow_to_end([one])
    assert failure.value.exit_code == 1
    assert capsys.readouterr().out == f"{one.log} is not there: the job is CANCELLED\n"


def test_a_job_that_slurm_has_forgotten_is_not_waited_for(
    tmp_path: Path, slurm_says: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RunFailed, match=r"^job 7 did not complete \(UNKNOWN\)"):
        follow_to_end([job(tmp_path, "7", "UNKNOWN")])


def test_the_ends_of_all_logs(tmp_path: Path, slurm_says: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = job(tmp_path, "7"), job(tmp_path, "8")
    ended(good, 0, "image: made\n")
    follow_to_end([good])
    assert capsys.readouterr().out == f"==> {good.log} <==\nimage: made\n"
    ended(bad, 2, "no enroot\n")
    with pytest.raises(RunFailed, match=r"^job 8 did not complete \(FAILED\)") as failure:
        follow_to_end([good, bad])
    assert failure.value.exit_code == 2 and "no enroot" in capsys.readouterr().out
