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
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent
sys.path.insert(0, str(PROJECT))

from omegaconf import OmegaConf  # noqa: E402

from benchmarks.fork_server import ForkServer  # noqa: E402
from nemo_bench.checks.problems import problems  # noqa: E402
from nemo_bench.cli import quoted_path  # noqa: E402
from nemo_bench.cluster import processes  # noqa: E402
from nemo_bench.cluster.processes import Outcome, ProcessGroup  # noqa: E402
from nemo_bench.config import TrainConfig, typed  # noqa: E402
from nemo_bench.entrypoints import entrypoint_of  # noqa: E402
from nemo_bench.errors import BenchError, ConfigurationRefused, RunFailed  # noqa: E402
from nemo_bench.files import dated_name  # noqa: E402
from nemo_bench.launch import point  # noqa: E402
from nemo_bench.launch.batch_script import rank_environment  # noqa: E402
from nemo_bench.launch.plan import results_dir  # noqa: E402
from nemo_bench.record.folder import STEPS, RunFolder, Status, read_lines  # noqa: E402
from nemo_bench.report.runs import load_run  # noqa: E402


@dataclass(frozen=True)
class Case:
    """A configuration to be trained, and the run folder that will hold it."""

    name: str
    overrides: list[str]
    cfg: TrainConfig
    run: RunFolder

    def start(self, server: ForkServer, gpus: list[int]) -> contextlib.AbstractContextManager[ProcessGroup]:
        """Record the run and fork its ranks onto `gpus`; they end with the context at the latest."""
        cfg = point.prepare_data(self.cfg)
        self.run.create(
            config_yaml=OmegaConf.to_yaml(OmegaConf.structured(cfg)),
            command=["python", "train.py", *self.overrides],
            overrides=self.overrides,
            max_steps=cfg.trainer.max_steps,
        )
        environment = rank_environment(cfg, os.environ)
        if cfg.gpu.device == "cuda":
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
        command = entrypoint_of(cfg).rank_command(self.cfg, self.run.path, sys.executable)
        return processes.started(command, environment, self.run.path, cfg.trainer.devices, server.popen)


def compose(name: str, overrides: list[str], stage: Path) -> Case:
    """Compose a case and check it as train.py does.

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
    if cfg.entrypoint.stack not in ("nemo2", "megatron_bridge") or cfg.profile.kind == "nsys":
        raise BenchError("ranks are forked from NeMo 2 or Bridge: no other program and no nsys; train.py runs them")
    if refused := problems(cfg):
        raise ConfigurationRefused(refused)
    return Case(name, overrides, cfg, RunFolder(results_dir(cfg).parent / name / dated_name()))


@dataclass
class Running:
    """A case whose ranks run on `gpus`."""

    case: Case
    gpus: list[int]
    ranks: ProcessGroup
    stop: contextlib.ExitStack  # ends the ranks
    started: float

    def end(self, outcome: Outcome | None) -> None:
        """End the ranks and record how the run ended; None: it took too long, or was interrupted."""
        self.stop.close()
        failed = outcome is None or outcome.failed_rank is not None
        self.case.run.set_status(Status("failed" if failed else "completed", exit_code=int(failed)))


def fork_server(case: Case) -> ForkServer:
    """Start the server of a case's stack and device, in the environment that the case's ranks have."""
    what = "megatron_bridge" if case.cfg.entrypoint.stack == "megatron_bridge" else case.cfg.gpu.device
    return ForkServer(what, rank_environment(case.cfg, os.environ))


def run_all(
    server: ForkServer, cases: list[Case], gpus: int, timeout_s: float, done: Callable[[Case, dict[str, Any]], None]
) -> None:
    """Run every case, as many side by side as there are GPUs for, and call `done` with the numbers of each."""
    waiting, running, free = list(cases), list[Running](), list(range(gpus))
    try:
        while waiting or running:
            while waiting and waiting[0].cfg.trainer.devices <= len(free):
                case, stop = waiting.pop(0), contextlib.ExitStack()
                held = [free.pop(0) for _ in range(case.cfg.trainer.devices)]
                ranks = stop.enter_context(case.start(server, held))
                running.append(Running(case, held, ranks, stop, time.monotonic()))
            time.sleep(0.1)
            for run in list(running):
                outcome, wall_s = run.ranks.poll(), time.monotonic() - run.started
                if outcome is not None or wall_s > timeout_s:
                    running.remove(run)
                    free += run.gpus
                    run.end(outcome)
                    done(run.case, {**numbers_of(run.case.run), "wall_s": round(wall_s, 1)})
    finally:
        for run in running:
            run.end(None)


def numbers_of(run: RunFolder) -> dict[str, Any]:
    """Return the median step time (s), and what follows from it."""
    summary = load_run(run.path)
    times, derived = summary.times, summary.numbers
    if times is None or derived is None:
        errors = [f"{error['type']}: {error['message']}"[:300] for error in run.rank_errors()]
        return {"failed": [summary.why_not_final or "no steps", *errors[:1]]}
    rows, _ = read_lines(run.path / STEPS)
    return {
        "step_time_s": times.median_s,
        "spread": (times.p95_s - times.p5_s) / times.median_s,
        "steps": times.counted,
        "tflops_per_gpu": derived.tflops_per_gpu,
        "mfu": derived.mfu,
        **{key: rows[-1].get(key) for key in ("peak_memory_gib", "power_w", "loss", "grad_norm")},
    }


def script(name: str, *arguments: str, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Run a program of peers/ and return what it writes to its --output."""
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


def parser_of_options() -> argparse.ArgumentParser:
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
    return parser


def chosen_cases(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[Case]:
    """Return the cases of the command line, composed and checked; ends with a message where one cannot run."""
    content = OmegaConf.to_container(OmegaConf.load(HERE / "gpu_speed.yaml"))
    assert isinstance(content, dict)
    cases = {
        name: [f"scale={options.gpus}gpu", *content["common"].split(), *case["overrides"].split()]
        for name, case in content["cases"].items()
        if case["gpus"] == options.gpus and options.only.search(name)
    }
    if options.case:
        cases = {name: overrides.split() for name, _, overrides in (case.partition(":") for case in options.case)}
    if not cases:
        parser.error(f"no case of gpu_speed.yaml is for {options.gpus} GPUs and matches {options.only.pattern!r}")
    try:
        composed = [
            compose(name, [*overrides, *options.override], options.output.absolute())
            for name, overrides in cases.items()
        ]
    except BenchError as error:
        parser.error(str(error))
    if len({case.cfg.entrypoint.stack for case in composed}) > 1:
        parser.error("NeMo 2 and Megatron-Bridge have packages of their own: their cases need a call each")
    gpus = options.side_by_side or options.gpus
    if names := [case.name for case in composed if case.cfg.trainer.devices > gpus]:
        parser.error(f"{', '.join(names)}: more GPUs than --gpus or --side-by-side give ({gpus})")
    return composed


def main() -> None:
    parser = parser_of_options()
    options = parser.parse_args()
    cases, output = chosen_cases(parser, options), options.output / "gpu_speed.json"
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output: {error}")
    results: dict[str, Any] = {"command": " ".join(sys.argv), "cases": []}

    def done(case: Case, numbers: dict[str, Any]) -> None:
        results["cases"].append({"case": case.name, "run": str(case.run.path), **numbers})
        print(json.dumps({"case": case.name, **numbers}), flush=True)
        output.write_text(json.dumps(results, indent=2) + "\n")

    if not options.no_matrix_rate:
        results["matrix_rate_before"] = script("matrix_rate.py")
    try:
        with processes.explained_signals("all ranks were ended"), fork_server(cases[0]) as server:
            run_all(server, cases, options.side_by_side or options.gpus, options.timeout, done)
    except RunFailed as ended:
        sys.exit(ended.exit_code)
    if options.peers:
        environment = {**os.environ, **({"PYTHONPATH": options.peers_path} if options.peers_path else {})}
        results["peers"] = []
        for peer, precision in (("torchtitan", "bf16"), ("torchtitan", "fp8"), ("transformers", "bf16")):
            numbers = script(f"{peer}_slice.py", "--precision", precision, environment=environment)
            results["peers"].append({"peer": f"{peer} {precision}", **numbers})
            print(json.dumps(results["peers"][-1])[:600], flush=True)
    if not options.no_matrix_rate:
        results["matrix_rate_after"] = script("matrix_rate.py")
    output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
