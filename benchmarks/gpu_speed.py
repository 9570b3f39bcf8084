"""Step times on this machine's GPUs, case by case, beside the machine's own matrix rate and other frameworks.

    python benchmarks/gpu_speed.py --gpus 1 --output results/gpu_speed        every case for one GPU
    python benchmarks/gpu_speed.py --gpus 1 --only 'bf16' --peers             some, and the peers beside them
    python benchmarks/gpu_speed.py --case 'mine: model=8b precision=fp8'      one of your own

Each case (gpu_speed.yaml) is a configuration of train.py, run by the very code that its ranks run, and leaves a run
record under OUTPUT, which report.py reads. NeMo is imported once, and each rank is forked from there: imports take
40 s. Nothing touches the GPUs before the fork.

A warm GPU draws all the power it may, and then its clocks decide; so the matrix rate (8192^3, bf16) that the ratios
refer to is the sustained one, measured before the first case and after the last.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent
sys.path.insert(0, str(PROJECT))

from omegaconf import OmegaConf  # noqa: E402

from nemo_bench.checks.configuration import configuration_problems, machine_problems  # noqa: E402
from nemo_bench.cli import quoted_path  # noqa: E402
from nemo_bench.cluster import lifeline, processes  # noqa: E402
from nemo_bench.config import TrainConfig, typed  # noqa: E402
from nemo_bench.entrypoints import entrypoint_of, nemo2  # noqa: E402
from nemo_bench.errors import BenchError, ConfigurationRefused  # noqa: E402
from nemo_bench.launch import point  # noqa: E402
from nemo_bench.record import folder as record  # noqa: E402
from nemo_bench.report.numbers import summarise  # noqa: E402


def compose(overrides: list[str], stage: Path) -> TrainConfig:
    """A case's configuration, checked as train.py checks it.

    Raises:
        BenchError: it cannot be composed, or run in forked ranks.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        with hydra.initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
            raw = hydra.compose("train", [*overrides, f"stage_path={quoted_path(stage)}", "results_version=gpu_speed"])
        cfg = typed(raw)
    except (HydraException, OmegaConfBaseException) as error:
        raise BenchError(f"{' '.join(overrides)}\n  {error}") from None
    if entrypoint_of(cfg) is not nemo2.ENTRYPOINT or cfg.profile.kind == "nsys":
        raise BenchError("ranks are forked from NeMo 2: no other entrypoint and no nsys here; train.py runs them")
    if problems := configuration_problems(cfg) + machine_problems(cfg):
        raise ConfigurationRefused(problems)
    return cfg


def preload(environment: dict[str, str]) -> None:
    """Imports what a rank imports, without a first call to CUDA: the driver does not survive a fork."""
    os.environ.update({"PYTORCH_NVML_BASED_CUDA_CHECK": "1", **environment, **os.environ})
    import torch

    from nemo_bench.training import weight_gradient

    weight_gradient.install()
    with contextlib.suppress(ImportError), mock.patch("torch.cuda.is_available", return_value=False):
        import modelopt.torch.quantization  # noqa: F401  asks the GPU what it is; nothing here uses it
    from nemo import lightning  # noqa: F401
    from nemo.collections import llm  # noqa: F401

    import nemo_bench.training.callbacks
    import nemo_bench.training.trainer  # noqa: F401

    if torch.cuda.is_initialized():
        raise SystemExit("an import has initialised CUDA: ranks cannot be forked from here")


_LIFELINE = os.pipe()


@dataclass
class Case:
    """One case under way: its ranks, and the GPUs they hold."""

    name: str
    run_dir: Path
    gpus: list[int]
    ranks: set[int]
    started: float
    failed: bool = False


def start(name: str, overrides: list[str], stage: Path, gpus: list[int]) -> Case:
    """Records a run and forks its ranks onto `gpus`."""
    cfg = compose(overrides, stage)
    point.prepare_data(cfg)
    run_dir = record.RunFolder.new(point.results_dir(cfg).parent / name).path
    record.RunFolder(run_dir).create(
        config_yaml=OmegaConf.to_yaml(OmegaConf.structured(cfg)),
        command=["python", "train.py", *overrides],
        overrides=overrides,
        ranks=cfg.world_size,
    )
    environment = point.rank_environment(cfg)
    if cfg.gpu.device == "cuda":
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
    port = processes.free_port()
    ranks = {
        _fork(run_dir, {**environment, **processes.rank_variables(rank, cfg.trainer.devices, port)})
        for rank in range(cfg.trainer.devices)
    }
    return Case(name, run_dir, gpus, ranks, time.monotonic())


def _fork(run_dir: Path, environment: dict[str, str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.close(_LIFELINE[1])  # the benchmark alone holds that end: ranks see it go, however it goes
    environment[lifeline.VARIABLE] = str(_LIFELINE[0])
    os.setsid()
    with open(record.RunFolder(run_dir).log(int(environment["RANK"])), "wb", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1) for fd in (1, 2))  # a test runner has others
    os.environ.update(environment)
    from nemo_bench.training import rank as rank_program

    with contextlib.suppress(SystemExit):
        rank_program.main(run_dir)
        os._exit(0)
    os._exit(1)


def run_all(
    cases: dict[str, list[str]], stage: Path, gpus: int, timeout_s: float, done: Callable[[dict[str, Any]], None]
) -> None:
    """Runs every case, as many side by side as there are GPUs for, and calls `done` with the numbers of each."""
    waiting, running, free = list(cases.items()), list[Case](), list(range(gpus))
    try:
        while waiting or running:
            while waiting and (needed := compose(waiting[0][1], stage).trainer.devices) <= len(free):
                name, overrides = waiting.pop(0)
                running.append(start(name, overrides, stage, [free.pop(0) for _ in range(needed)]))
            pid, status = os.waitpid(-1, os.WNOHANG)
            time.sleep(0 if pid else 0.1)
            for case in list(running):
                if pid in case.ranks:
                    case.ranks.discard(pid)
                    case.failed = case.failed or status != 0
                late = time.monotonic() > case.started + timeout_s
                if not case.ranks or case.failed or late:
                    _end(case)
                    running.remove(case)
                    free += case.gpus
                    found = {"case": case.name, "run": str(case.run_dir), **numbers(case.run_dir)}
                    done({**found, "wall_s": round(time.monotonic() - case.started, 1)})
    finally:
        for case in running:
            _end(case)


def _end(case: Case) -> None:
    failed = case.failed or bool(case.ranks)
    for pid in case.ranks:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    record.RunFolder(case.run_dir).set_status(record.Status("failed" if failed else "completed", exit_code=int(failed)))


def numbers(run_dir: Path) -> dict[str, Any]:
    """Median step time (s), and what follows from it."""
    found = summarise(run_dir)
    times, derived = found.times, found.numbers
    if times is None or derived is None:
        errors = [f"{error['type']}: {error['message']}"[:300] for error in record.RunFolder(run_dir).rank_errors()]
        return {"failed": [found.why_not_final or "no steps", *errors[:1]]}
    rows, _ = record.read_lines(run_dir / record.STEPS)
    return {
        "step_time_s": times.median_s,
        "spread_s": times.spread_s,
        "steps": times.counted,
        "tflops_per_gpu": derived.tflops_per_gpu,
        "mfu": derived.mfu,
        **{key: rows[-1].get(key) for key in ("peak_memory_gib", "power_w", "loss", "grad_norm")},
    }


def script(name: str, *arguments: str, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """What a program of peers/ writes to its --output, run in a process of its own."""
    output = Path(f"/tmp/{os.getpid()}-{time.monotonic_ns()}.json")
    command = [sys.executable, str(HERE / "peers" / name), *arguments, "--output", str(output)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        return {"failed": (done.stdout + done.stderr).splitlines()[-12:]}
    content = json.loads(output.read_text())
    output.unlink()
    assert isinstance(content, dict)
    return content


def _expression(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=1, help="cases of gpu_speed.yaml for this many GPUs")
    parser.add_argument(
        "--only", default="", type=_expression, help="a regular expression: of these, the cases that it finds"
    )
    parser.add_argument("--case", action="append", default=[], help="'NAME: OVERRIDES', in place of gpu_speed.yaml's")
    parser.add_argument("--override", action="append", default=[], help="KEY=VALUE for every case")
    parser.add_argument("--side-by-side", type=int, default=0, metavar="GPUS", help="run cases side by side on these")
    parser.add_argument("--peers", action="store_true", help="torchtitan and Transformers on the same slice")
    parser.add_argument("--peers-path", default="", help="PYTHONPATH of the peers")
    parser.add_argument("--no-matrix-rate", action="store_true")
    parser.add_argument("--timeout", type=float, default=240, help="seconds for a case")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()

    given = OmegaConf.to_container(OmegaConf.load(HERE / "gpu_speed.yaml"))
    assert isinstance(given, dict)
    cases = {
        name: [f"scale={options.gpus}gpu", *given["common"].split(), *case["overrides"].split()]
        for name, case in given["cases"].items()
        if case["gpus"] == options.gpus and options.only.search(name)
    }
    if options.case:
        cases = {name: overrides.split() for name, _, overrides in (case.partition(":") for case in options.case)}
    if not cases:
        parser.error(f"no case of gpu_speed.yaml is for {options.gpus} GPUs and matches {options.only.pattern!r}")
    stage = options.output.absolute()
    checked = {name: [*overrides, *options.override] for name, overrides in cases.items()}
    gpus = options.side_by_side or options.gpus
    try:
        composed = [compose(case, stage) for case in checked.values()]
    except BenchError as error:
        parser.error(str(error))
    if needed := [name for name, cfg in zip(checked, composed) if cfg.trainer.devices > gpus]:
        parser.error(f"{', '.join(needed)}: more GPUs than --gpus or --side-by-side give ({gpus})")
    try:
        stage.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output: {error}")
    given_environment = dict(os.environ)  # of the programs beside ours, which what ours imports must not change

    results: dict[str, Any] = {"command": " ".join(sys.argv), "cases": []}
    if not options.no_matrix_rate:
        results["matrix_rate_before"] = script("matrix_rate.py", environment=given_environment)
    started = time.monotonic()
    preload(composed[0].entrypoint.env)
    print(f"imports: {time.monotonic() - started:.0f} s", flush=True)

    def done(found: dict[str, Any]) -> None:
        results["cases"].append(found)
        print(json.dumps({key: value for key, value in found.items() if key != "run"}), flush=True)
        (stage / "gpu_speed.json").write_text(json.dumps(results, indent=2) + "\n")

    try:
        with processes.termination_raises():
            run_all(checked, stage, gpus, options.timeout, done)
    except processes.Terminated as ended:
        sys.exit(128 + ended.signum)
    if options.peers:
        peers = given_environment | ({"PYTHONPATH": options.peers_path} if options.peers_path else {})
        for name, program, precision in (
            ("torchtitan bf16", "torchtitan_slice.py", "bf16"),
            ("torchtitan fp8", "torchtitan_slice.py", "fp8"),
            ("transformers bf16", "transformers_slice.py", "bf16"),
        ):
            found = {"peer": name, **script(program, "--precision", precision, environment=peers)}
            results.setdefault("peers", []).append(found)
            print(json.dumps(found)[:600], flush=True)
    if not options.no_matrix_rate:
        results["matrix_rate_after"] = script("matrix_rate.py", environment=given_environment)
    (stage / "gpu_speed.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
