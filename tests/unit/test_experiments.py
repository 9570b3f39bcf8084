"""Every experiment composes, passes the checks and fits; a published point is judged by its own table."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_bench.checks.problems import problems
from nemo_bench.config import TrainConfig
from nemo_bench.launch.point import new_run
from nemo_bench.pipeline import layers_of_chunks
from nemo_bench.record.folder import STEPS, Status
from nemo_bench.report import model, references
from nemo_bench.report.build import build_report
from nemo_bench.report.references import ReferencePoint

from ..composing import PROJECT, composed

FOLDER = PROJECT / "conf" / "experiment"
NAMES = sorted(str(path.relative_to(FOLDER).with_suffix("")) for path in FOLDER.rglob("*.yaml"))
# Those that others start from: they choose no scale, or no model.
BASES = ("llama31_405b", "dgxc_25_04/nemo2", *(f"dgxc_26_06/{name}" for name in ("bridge", "full_iteration", "fsdp")))
OPEN_SCALE = [name for name in NAMES if re.search(r"dgxc_25_04/.*(bf16|fp8)$|dgxc_25_05/.*gb200$", name)]
POINTS = [name for name in NAMES if name not in (*BASES, *OPEN_SCALE)]
# The table of each folder of experiments.
TABLES = {"": "nvidia-24.09", "dgxc_25_04": "nvidia-25.04", "dgxc_25_05": "nvidia-25.05"}


def folder_of(name: str) -> str:
    return name.rpartition("/")[0]


def key_of(point: ReferencePoint) -> tuple[object, ...]:
    return point.model, point.precision, point.gpus, point.gpu, point.global_batch_size


@pytest.mark.parametrize("name", POINTS)
def test_a_point_is_what_its_name_says_passes_the_checks_and_fits(name: str) -> None:
    for chosen in ([], ["entrypoint=nemo_24_09"])[: 1 + (folder_of(name) == "")]:
        cfg = composed(f"experiment={name}", *chosen)
        assert [problem for problem in problems(cfg) if not problem.missing] == []
        parts = Path(name).name.split("_")
        assert parts[1:3] == [cfg.model.name, cfg.precision.name]
        assert cfg.gpu.name in (*parts, "h100") and (f"{cfg.world_size}gpu" in parts or "26" in name)


def test_a_preset_takes_any_scale() -> None:
    cfg = composed("experiment=dgxc_25_04/llama31_405b_fp8", "scale=1024gpu")
    assert (cfg.model.global_batch_size, cfg.num_micro_batches) == (512, 64)
    assert [sum(chunks) for chunks in layers_of_chunks(cfg.model)] == [15, *[16] * 6, 15]
    cfg = composed("experiment=dgxc_26_06/llama31_70b_fp8_h100", "scale=256gpu")
    assert sum(map(sum, layers_of_chunks(cfg.model))) == 80 and cfg.model.global_batch_size == 1024


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[TrainConfig, model.Point]]]:
    """Each experiment of a published table as a run that took what was published, with its point in a report."""
    stage = tmp_path_factory.mktemp("stage")
    runs = {}
    for folder, table in TABLES.items():
        rows = {key_of(point): point for point in references.load(table).points}
        for name in (name for name in POINTS if folder_of(name) == folder):
            cfg = composed(f"experiment={name}", *["entrypoint=nemo_24_09"] * (folder == ""), f"stage_path={stage}")
            m = cfg.model
            row = rows[m.name, cfg.precision.name, cfg.world_size, cfg.gpu.name, m.global_batch_size]
            run = new_run(cfg, [])
            steps = [{"step": step, "loss": 6.0, "train_step_timing_s": row.step_time_s} for step in range(50)]
            (run.path / STEPS).write_text("\n".join(map(json.dumps, steps)) + "\n")
            run.set_status(Status("completed", exit_code=0))
            runs[run.path.name] = name, cfg
    yield {runs[point.runs[0]][0]: (runs[point.runs[0]][1], point) for point in build_report([stage]).points}


def test_every_published_point_has_an_experiment_and_is_judged_by_its_own_table(
    judged: dict[str, tuple[TrainConfig, model.Point]],
) -> None:
    # Two rows of 25.05, on H100s, are of experiments of 25.04: another container is all that differs.
    assert len(judged) == sum(len(references.load(table).points) for table in TABLES.values()) - 2 == 74
    for name, (cfg, point) in judged.items():
        table = TABLES[folder_of(name)]
        assert point.verdict.value == model.PASS, (name, point.verdict.why)
        row = point.reference
        assert row is not None and row.reference == table, name
        layout = {"TP": cfg.model.tensor_model_parallel_size, "PP": cfg.model.pipeline_model_parallel_size}
        assert {key: row.layout[key] for key in layout} == layout, name
        kinds = {text.partition(":")[0] for text in point.verdict.differences}
        assert kinds == set(), (name, point.verdict.differences)
