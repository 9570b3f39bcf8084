"""A run folder with a profile: what the report shows of it, and what goes into the bundle."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from nemo_bench.record import folder as record
from nemo_bench.report import archive, page
from nemo_bench.report import profile as step_profile
from nemo_bench.report.build import build_report
from nemo_bench.report.runs import load_run

from ..traces import ALL_GATHER, GEMM, kernel, mark, write
from .test_archive import unpack

PLAIN = Path(__file__).parents[1] / "runs/nemo-2.7.3/fp32/tiny/1/20261122-165153-d39a"


@pytest.fixture
def profiled(tmp_path: Path) -> Path:
    """A real run folder, with the profiles of ranks 2 and 10 as profile=torch leaves them."""
    run = Path(shutil.copytree(PLAIN, tmp_path / "run"))
    folder = run / record.PROFILE
    folder.mkdir()
    for rank in (10, 2):
        step = mark(f"{step_profile.STEP_MARK}10", 0, 100_000)
        events = [step, kernel(GEMM, 0, 60_000), kernel(ALL_GATHER, 50_000, 75_000, stream=9)]
        trace = write(folder / f"rank{rank}.trace.json.gz", events)
        (folder / f"rank{rank}.json").write_text(json.dumps(asdict(step_profile.measure(trace, rank))))
    return run


def test_a_run_has_its_profiles_also_those_of_earlier_versions(profiled: Path) -> None:
    path = profiled / record.PROFILE / "rank2.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "notes": []}))
    profiles = {profile.rank: profile.exposed_communication_ms for profile in load_run(profiled).profiles}
    assert profiles == pytest.approx({2: 15.0, 10: 15.0})


def test_the_page_shows_the_table(profiled: Path) -> None:
    shown = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page.render(build_report([profiled]))))
    assert "Profile of rank 2, NVIDIA H200, steps 10" in shown and "Profile of rank 10" in shown
    assert "60 60.0% 60 1 nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT" in shown
    assert "exposed: 15 ms, 15.0% of the step" in shown
    assert "idle 25 25.0%" in shown
    assert "Profile of" not in page.render(build_report([PLAIN]))


def test_the_bundle_holds_the_tables_and_names_the_traces(profiled: Path, tmp_path: Path) -> None:
    path = tmp_path / "share.tar.zst"
    archive.write(build_report([profiled]), path, {})
    files = unpack(path)
    names = {name.partition("run/")[2] for name in files}
    assert {"profile/rank2.json", "profile/rank10.json", "steps.jsonl"} <= names
    left_out = json.loads(files["MANIFEST.json"])["left_out"]
    assert left_out == [f"runs/run/profile/rank{rank}.trace.json.gz" for rank in (10, 2)]
