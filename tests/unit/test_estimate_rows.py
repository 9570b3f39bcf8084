"""The estimate at every point whose step time is known: published rows, and runs on H200s that the rates do not use.

Nothing is fitted to any of them; docs/estimate.md has the whole table and what was changed after looking.
"""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from statistics import fmean

import pytest

from nemo_bench.config import TrainConfig, load
from nemo_bench.estimate.layer import Layer, pass_ms
from nemo_bench.estimate.network import Network
from nemo_bench.estimate.rates import load_rates
from nemo_bench.estimate.step import estimate_of
from nemo_bench.report import references
from nemo_bench.report.bare_logs import Given
from nemo_bench.report.build import build_report
from nemo_bench.report.references import ReferencePoint
from nemo_bench.report.runs import load_run
from nemo_bench.report.tables import points_table

from ..composing import PROJECT, composed

GPU_SPEED = PROJECT / "benchmarks" / "results" / "gpu_speed"


def config_of(row: ReferencePoint) -> TrainConfig:
    """Return the point of a published row, with the settings that NVIDIA's software had."""
    base = composed(f"model={row.model}", f"precision={row.precision}", "scale=64gpu", "data=mock")
    cfg, layout = copy.deepcopy(base), row.layout
    m, chunks = cfg.model, layout.get("PP", 1) * layout.get("VP", 1)
    cfg.trainer.num_nodes = row.gpus // 8
    m.global_batch_size, m.micro_batch_size = row.global_batch_size, layout["MBS"]
    for name, size in row.architecture.items():
        setattr(m, name, size)
    m.tensor_model_parallel_size, m.context_parallel_size = layout["TP"], layout["CP"]
    m.pipeline_model_parallel_size = layout["PP"]
    m.virtual_pipeline_model_parallel_size = layout["VP"] if "VP" in layout and layout["PP"] > 1 else None
    m.defer_embedding_wgrad_compute = True
    # NeMo 2 gathers behind the optimizer; NeMo 1 did not.
    m.optim.overlap_param_gather_with_optimizer_step = row.reference.startswith("nvidia-25") and layout["PP"] > 1
    ends_are_layers = m.num_layers % chunks != 0
    m.account_for_embedding_in_pipeline_split = m.account_for_loss_in_pipeline_split = ends_are_layers
    return cfg


@cache
def ratios(table: str) -> dict[tuple[str, str, int, float], float]:
    """Return estimate over published step time, by model, precision, GPUs and published time."""
    points = [point for point in references.load(table).points if point.gpu == "h100"]
    return {
        (row.model, row.precision, row.gpus, row.step_time_s): estimate_of(config_of(row)).step_time_s / row.step_time_s
        for row in points
    }


def errors(table: str, precision: str = "") -> list[float]:
    return [abs(ratio - 1) for key, ratio in ratios(table).items() if precision in ("", key[1])]


@pytest.mark.parametrize(
    ("table", "precision", "rows", "mean", "largest"),
    [
        ("nvidia-25.04", "bf16", 17, 0.03, 0.06),
        ("nvidia-25.04", "", 34, 0.04, 0.10),
        ("nvidia-24.12", "bf16", 17, 0.035, 0.06),
        ("nvidia-24.09", "bf16", 17, 0.035, 0.06),
    ],
)
def test_published_rows_unfitted(table: str, precision: str, rows: int, mean: float, largest: float) -> None:
    found = errors(table, precision)
    assert len(found) == rows
    assert fmean(found) < mean and max(found) < largest


def test_one_measured_point_makes_the_larger_ones_of_its_series_right() -> None:
    smallest = {"70b": 64, "8b": 8, "405b": 512}
    table = ratios("nvidia-25.04")
    base = {key[:2]: ratio for key, ratio in table.items() if key[2] == smallest[key[0]]}
    found = [abs(ratio / base[key[:2]] - 1) for key, ratio in table.items() if key[2] > smallest[key[0]]]
    assert len(found) == 22
    assert fmean(found) < 0.01 and max(found) < 0.025


@cache
def own_ratio(run: Path) -> float:
    times = load_run(run).times
    assert times is not None
    return estimate_of(load(run / "config.yaml")).step_time_s / times.median_s


OWN = (
    *("tp2_bf16", "tp2_fp8", "pp2_vp2_bf16", "cp2_bf16", "dp2_bf16", "8b_dp2_bf16"),
    *("bf16_gbs32", "fp8_gbs32", "8b_fp8"),
)


def test_runs_on_h200s_that_gave_no_rates() -> None:
    found = {name: own_ratio(GPU_SPEED / name) - 1 for name in OWN}
    assert fmean(map(abs, found.values())) < 0.03, found
    assert max(map(abs, found.values())) < 0.06, found


def test_layers_over_four_gpus_without_user_buffers() -> None:
    measured = json.loads((GPU_SPEED.parent / "h200_x4_2026_11_28.json").read_text())["tensor_parallel_over_four"]
    for name, ranks in measured["with_nccl"].items():
        _, _, tokens, precision = name.split()
        cfg = composed("scale=4gpu", "model=70b_slice", f"precision={precision}", "data=mock", "gpu=h200")
        m, rates = cfg.model, load_rates("h200")
        m.tensor_model_parallel_size, m.sequence_parallel, m.tp_comm_overlap = 4, True, False
        m.seq_length = int(tokens[1:])
        estimate = sum(map(pass_ms, Layer(cfg, rates, Network(cfg, rates)).times(lag=0)))
        assert estimate == pytest.approx(fmean(rank["layer_ms"] for rank in ranks), rel=0.035), name


def test_a_report_shows_a_measured_point_beside_its_estimate() -> None:
    run = GPU_SPEED / "tp2_bf16"
    report = build_report([run], baseline=[], given=Given())
    assert report.points[0].estimate_s == estimate_of(load(run / "config.yaml")).step_time_s
    assert "estimate (s)" in points_table(report).columns
