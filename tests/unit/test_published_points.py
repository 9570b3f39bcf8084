"""Every file of conf/experiment, with every file of conf/entrypoint, is the point it is named for, and can be run."""

from __future__ import annotations

import pytest

from nemo_bench.checks.problems import problems
from nemo_bench.launch.plan import plan, point_name

from ..composing import PROJECT, composed

CONF = PROJECT / "conf"
ENTRYPOINTS = sorted(path.stem for path in (CONF / "entrypoint").glob("*.yaml"))


@pytest.mark.parametrize("experiment", sorted(path.stem for path in (CONF / "experiment").glob("*.yaml")))
def test_a_published_point_composes_and_passes_the_checks(experiment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAGE_PATH", "/lustre/nemo")
    for entrypoint in ENTRYPOINTS:
        cfg = composed(f"experiment={experiment}", f"entrypoint={entrypoint}")
        assert [problem for problem in problems(cfg) if not problem.missing] == []
        assert point_name(cfg).replace(" ", "_") == experiment.removeprefix("llama31_")
        assert cfg.entrypoint.image and "does not fit" not in plan(cfg)
