"""Failed runs by their logs (failures.yaml): the first error and its file, and known causes that a user can add to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_bench.config import TrainConfig
from nemo_bench.launch.diagnosis import CAUSES, diagnose, explain, read_causes
from nemo_bench.record.folder import RunFolder

from ..composing import composed

BOOST = "[NeMo W 2026-11-18 20:22:20 nemo_logging:393] error_if_no_checkpoint: false\n"
TRACEBACK = 'Traceback (most recent call last):\n  File "rank.py", line 3, in <module>\n    train(cfg)\n'
AFTER = (
    "srun: error: n1: task 0: Exited with exit code 1\nsrun: Terminating StepId=12.0\n"
    "slurmstepd: error: *** STEP 12.0 ON n1 CANCELLED AT 2026-11-28T10:00:00 ***\n"
)
FAILURES: dict[str, list[dict[str, Any]]] = yaml.safe_load(Path(__file__).with_name("failures.yaml").read_text())


def expanded(text: str) -> str:
    return text.replace("TRACEBACK\n", TRACEBACK).replace("AFTER", AFTER)


@pytest.fixture(scope="module")
def cfg() -> TrainConfig:
    return composed("scale=8gpu", "model=8b", "data=mock")


@pytest.mark.parametrize("row", FAILURES["exceptions"], ids=lambda row: str(row["cause"]))
def test_a_known_exception_is_explained(row: dict[str, Any], cfg: TrainConfig) -> None:
    lines = explain(cfg, row["says"], {0: row["says"]})
    if row["cause"] is None:
        assert lines is None
    else:
        assert lines is not None and len(lines) >= 2 and lines[0].startswith(row["cause"]) and lines[0][-1] != ":"


def diagnosed(cfg: TrainConfig, folder: Path) -> tuple[str, list[str]]:
    cfg.stage_path = str(folder)
    return diagnose(cfg, RunFolder(folder), None, None)


@pytest.mark.parametrize("row", FAILURES["logs"], ids=lambda row: str(row["cause"]))
def test_a_known_cause_is_named_with_the_first_errors_line_and_file(
    row: dict[str, Any], cfg: TrainConfig, tmp_path: Path
) -> None:
    log, text = tmp_path / row["log"], expanded(row["says"])
    (tmp_path / "rank0.out").write_text(BOOST)
    log.write_text(f"{BOOST}{text}\n")
    with open(tmp_path / "slurm-12.out", "a") as job_log:
        job_log.write(AFTER)
    reason, advice = diagnosed(cfg, tmp_path)
    assert row["cause"] in reason and "$" not in reason
    assert len(advice) >= 2 and "$" not in advice[0]
    assert advice[-1] == f"first error, in {log}: {text.splitlines()[-1].removeprefix('[rank1]:')}"


@pytest.mark.parametrize("row", FAILURES["first_errors"], ids=lambda row: str(row["line"]))
def test_an_unknown_cause_keeps_its_own_words(row: dict[str, Any], cfg: TrainConfig, tmp_path: Path) -> None:
    for name, text in row["logs"].items():
        (tmp_path / name).write_text(BOOST + expanded(text))
    reason, advice = diagnosed(cfg, tmp_path)
    assert row["line"] in reason
    assert advice == [f"first error, in {tmp_path / next(iter(row['logs']))}: {reason}"]


def test_a_killed_rank_comes_before_the_exceptions_that_it_caused(cfg: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "rank0.out").write_text(TRACEBACK + "RuntimeError: Connection closed by peer\n")
    (tmp_path / "slurm-12.out").write_text("srun: error: n2: task 1: Killed\n" + AFTER)
    cfg.stage_path = str(tmp_path)
    error = {"rank": 0, "type": "RuntimeError", "message": "Connection closed by peer"}
    assert diagnose(cfg, RunFolder(tmp_path), 0, error)[0].startswith("rank 1 on n2 was killed")


@pytest.mark.parametrize(
    ("table", "cause", "remark"),
    [
        ("- pattern: 'execve.*(?P<file>/x\\S+):'\n  meaning: site says $file\n", "site says /x/python", "first error"),
        ("- pattern: '('\n  meaning: x\n", "the node has no /x/python", "causes.yaml is not a table of causes"),
        ("- meaning: x\n", "the node has no /x/python", "causes.yaml is not a table of causes"),
        ("a: b: c\n", "the node has no /x/python", "causes.yaml is not a table of causes"),
        ("- 3\n", "the node has no /x/python", "causes.yaml is not a table of causes"),
    ],
)
def test_a_user_adds_causes_that_come_first_and_a_bad_table_hides_nothing(
    table: str, cause: str, remark: str, cfg: TrainConfig, tmp_path: Path
) -> None:
    (tmp_path / "slurm-12.out").write_text("slurmstepd: error: execve(): /x/python: No such file or directory\n")
    (tmp_path / "causes.yaml").write_text(table)
    reason, advice = diagnosed(cfg, tmp_path)
    assert reason.startswith(cause) and any(remark in line for line in advice)


def test_every_entry_says_what_to_do_and_where_it_comes_from() -> None:
    causes = read_causes(CAUSES)
    assert all(cause.meaning and cause.source and (cause.remedy or cause.numbers) for cause in causes)
    assert len({cause.pattern for cause in causes}) == len(causes)
