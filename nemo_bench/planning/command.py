"""`estimate.py`: from the composed configuration to what it prints and writes."""

from __future__ import annotations

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console

from nemo_bench.checks.problems import problems
from nemo_bench.config import typed_as
from nemo_bench.errors import BenchError, ConfigurationRefused
from nemo_bench.estimate.step import estimate_of
from nemo_bench.files import write_json, write_text
from nemo_bench.planning import display
from nemo_bench.planning.answer import Answer, Calibration, calibration_by
from nemo_bench.planning.config import EstimateConfig
from nemo_bench.planning.search import search
from nemo_bench.record.machine import latest_check

# By `calibrate=`: the points of a sweep share the factor of its first.
_calibrations: dict[str, Calibration] = {}


def run_estimate(raw: DictConfig) -> None:
    """Print the estimate of a point, or of the best layouts; write files where `output` says so.

    Raises BenchError for a point that breaks rules or cannot be estimated. What only a run needs may be missing.
    """
    cfg = typed_as(EstimateConfig, raw)
    if cfg.gpu.device == "cpu":
        raise BenchError(f"gpu={cfg.gpu.name}: estimates are of GPUs; choose a scale above local, such as scale=64gpu")
    console = Console(highlight=False)
    if cfg.machine_check:
        _take_own_rates(cfg, console)
    if cfg.action == "search":
        # The point itself need not work: layouts that do are what is asked for.
        display.print_search(console, cfg, search(cfg, _calibration(cfg)))
        return
    if broken := [problem for problem in problems(cfg) if not problem.missing]:
        raise ConfigurationRefused(broken)
    answer = Answer(cfg, estimate_of(cfg), _calibration(cfg))
    hydra = HydraConfig.get()
    folder = None if cfg.output is None else Path(cfg.output)
    if hydra.mode is RunMode.MULTIRUN:
        display.print_row(console, answer, first=hydra.job.num == 0)
        folder = folder and folder / f"{hydra.job.num} {answer.name}".replace(" ", "_")
    else:
        display.print_answer(console, answer)
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "estimate.json", answer.to_dict())
            write_text(folder / "schedule.html", display.schedule_page(answer))
        except OSError as error:
            raise BenchError(f"output={cfg.output}: {error.strerror}: name a folder that can be written") from None
        console.print(f"written: {folder}/ (estimate.json, schedule.html)", soft_wrap=True)


def _take_own_rates(cfg: EstimateConfig, console: Console) -> None:
    """Put what the last machine check of this cluster measured where the configuration names nothing else."""
    check = latest_check(cfg.stage_path, cfg.cluster.name, cfg.gpu.name)
    if check is None:
        return
    rates, gpu, cluster = {name: rate["middle"] for name, rate in check["rates"].items()}, cfg.gpu, cfg.cluster
    cluster.nvlink_gb_s = cluster.nvlink_gb_s or rates.get("in_node_gb_s")
    cluster.nic_gb_s = cluster.nic_gb_s or rates.get("network_gb_s")
    gpu.matrix_tflops = gpu.matrix_tflops or rates.get("bf16_tflops")
    gpu.slowest_matrix_tflops = gpu.slowest_matrix_tflops or check["rates"]["bf16_tflops"]["least"]
    values = (gpu.matrix_tflops, gpu.slowest_matrix_tflops, cluster.nvlink_gb_s, cluster.nic_gb_s)
    names = ("bf16 TFLOP/s", "its slowest GPU", "NVLink GB/s", "NIC GB/s")
    text = ", ".join(f"{name} {value:.4g}" for name, value in zip(names, values) if value)
    console.print(f"Machine check of {check['checked_at']}: {text} (machine_check=false leaves it out)", soft_wrap=True)


def _calibration(cfg: EstimateConfig) -> Calibration | None:
    key = str(cfg.calibrate)
    if cfg.calibrate is not None and key not in _calibrations:
        _calibrations[key] = calibration_by(cfg, key)
    return _calibrations.get(key)
