"""Train twenty steps from NeMo 2's initial weights with NeMo 2 and with a Megatron-Bridge, and compare the losses.

    python tests/same_losses.py FOLDER BRIDGE_PYTHON BRIDGE_PACKAGES [OVERRIDE ...]

The data are this project's local ones, the learning rate is constant. `tests/stacks.sh` calls it for each Bridge.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path[0] = str(PROJECT)  # in the place of this folder, whose datasets.py would hide a package
CONSTANT_RATE = ("model.optim.lr=1e-3", "model.optim.min_lr=1e-3", "model.optim.warmup_steps=0")


def rank(weights: Path, run_dir: Path) -> None:
    """Train as one rank from `weights`, or from its own initial ones, which it leaves there."""
    from nemo_bench.training import incompatibilities
    from nemo_bench.training.rank import main

    repair = incompatibilities.install

    def repair_and_watch(stack: str) -> None:
        repair(stack)  # without which megatron-core is not imported everywhere
        import torch
        from megatron.core.distributed import DistributedDataParallel

        wrap = DistributedDataParallel.__init__

        def wrap_given(
            self: Any, config: Any, ddp_config: Any, module: torch.nn.Module, *rest: Any, **more: Any
        ) -> None:
            if weights.exists():
                missing, unknown = module.load_state_dict(torch.load(weights), strict=False)
                assert not unknown and all("_extra_state" in name for name in missing), (missing, unknown)
            else:
                tensors = {name: value for name, value in module.state_dict().items() if torch.is_tensor(value)}
                torch.save({name.rpartition("module.")[2]: value for name, value in tensors.items()}, weights)
            wrap(self, config, ddp_config, module, *rest, **more)

        DistributedDataParallel.__init__ = wrap_given

    incompatibilities.install = repair_and_watch
    main(run_dir)


def losses(python: str, packages: Path | None, weights: Path, *overrides: str) -> list[float]:
    """Train with an interpreter and an overlay of packages; return the loss of each step."""
    from nemo_bench.launch.batch_script import rank_environment
    from nemo_bench.launch.point import new_run, prepare_data
    from tests.composing import composed

    cfg = prepare_data(composed(*overrides, *CONSTANT_RATE, "trainer.limit_val_batches=0", "trainer.max_steps=20"))
    run = new_run(replace(cfg, stage_path=str(weights.parent)), list(overrides))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
    env = {**rank_environment(cfg, os.environ), "MASTER_ADDR": "127.0.0.1"}
    env |= {name: str(value) for name, value in place.items()}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(packages or ""), env["PYTHONPATH"]]))
    command = [python, __file__, "rank", str(weights), str(run.path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{run.path}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return [json.loads(line)["loss"] for line in (run.path / "steps.jsonl").read_text().splitlines()]


def main(folder: Path, bridge_python: str, packages: Path, *overrides: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "weights.pt"
    weights.unlink(missing_ok=True)
    of_both = [override for override in overrides if not override.startswith("entrypoint=")]
    nemo = losses(sys.executable, None, weights, "entrypoint=nemo2", *of_both)
    bridge = losses(bridge_python, packages, weights, *overrides)
    largest = max(abs(a - b) / a for a, b in zip(nemo, bridge, strict=True))
    print(f"{len(nemo)} steps, {nemo[0]:.6f} -> {nemo[-1]:.6f}, largest relative difference {largest:.1e}")


if __name__ == "__main__":
    if sys.argv[1] == "rank":
        rank(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main(Path(sys.argv[1]).resolve(), sys.argv[2], Path(sys.argv[3]).resolve(), *sys.argv[4:])
