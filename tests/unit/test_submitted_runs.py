"""What a report says of a submitted run, by the job's last words and by what its ranks left."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from nemo_bench.files import write_json
from nemo_bench.record.folder import EXIT, RUN, STEPS, RunFolder, Status
from nemo_bench.report.runs import load_run

RUN_OF_30_STEPS = Path(__file__).parents[1] / "runs/nemo-2.7.3/bf16/70b/1/20261122-172402-5f1a"
ENDED = "slurmstepd: error: *** JOB 12 ON n1 CANCELLED AT 2026-11-24T10:00:00 DUE TO TIME LIMIT ***\n"
CANCELLED = ENDED.replace(" DUE TO TIME LIMIT", "")
WORDS = "CANCELLED AT 2026-11-24T10:00:00"


@pytest.mark.parametrize(
    "row",
    [
        (0, 0, None, None, "submitted", "submitted at step 0 of 30", None),
        (12, 0, None, None, "submitted", "submitted at step 12 of 30", None),
        (12, 3600, None, None, "submitted", "submitted at step 12 of 30: no step for 60 min, and the last took", None),
        (12, 3600, None, ENDED, "killed", f"killed at step 12 of 30: {WORDS} DUE TO TIME LIMIT", None),
        (12, 0, None, CANCELLED, "killed", f"killed at step 12 of 30: {WORDS}", None),
        (12, -90, None, ENDED.replace("TIME LIMIT", "JOB REQUEUE"), "submitted", "submitted at step 12 of 30", None),
        (30, 0, None, ENDED, "killed", None, f"killed after its last step, 30 of 30: {WORDS} DUE TO TIME LIMIT"),
        (4, 0, 0, "", "failed", "failed at step 4 of 30: its ranks ended with exit status 0 at step 4 of 30", None),
        (30, 0, 0, "", "completed", None, None),
        (30, 0, 1, "srun: error: n2: task 1: Killed\n", "failed", None, "failed after its last step, 30 of 30: srun: "),
        (12, 0, 1, "srun: error: n2: task 1: Killed\n", "failed", "failed at step 12 of 30: srun: error: n2: ", None),
    ],
)
def test_how_a_submitted_run_stands(row: tuple[Any, ...], tmp_path: Path) -> None:
    steps, age_s, exit_code, log, state, why, warning = row
    folder = RunFolder(Path(shutil.copytree(RUN_OF_30_STEPS, tmp_path / "run")))
    (folder.path / "events.jsonl").unlink()
    folder.log(0).write_text("")
    lines = (folder.path / STEPS).read_text().splitlines(keepends=True)
    (folder.path / STEPS).write_text("".join(lines[:steps]))
    os.utime(folder.path / STEPS, (time.time() - age_s,) * 2)
    write_json(folder.path / RUN, {**folder.read(), "max_steps": 30, "status": vars(Status("submitted"))})
    if log is not None:
        (folder.path / "slurm-12.out").write_text(log)
    if exit_code is not None:
        (folder.path / EXIT).write_text(json.dumps({"exit_code": exit_code, "ended_at": "2026-11-24T10:00:00Z"}))
    run = load_run(folder.path)
    assert run.state == state
    assert run.why_not_final is None if why is None else str(run.why_not_final).startswith(why)
    assert warning is None or any(text.startswith(warning) for text in run.warnings)


@pytest.mark.parametrize(("nodes", "remarks"), [(1, 0), (2, 1)])
def test_sockets_between_nodes_are_a_reason_of_slowness(nodes: int, remarks: int, tmp_path: Path) -> None:
    run = Path(shutil.copytree(RUN_OF_30_STEPS, tmp_path / "run"))
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("num_nodes: 1\n", f"num_nodes: {nodes}\n"))
    with open(run / "rank0.out", "a") as log:
        log.write("n1:711:902 [0] NCCL INFO Using network Socket\n")
    assert len([text for text in load_run(run).remarks if "TCP sockets between the nodes" in text]) == remarks
