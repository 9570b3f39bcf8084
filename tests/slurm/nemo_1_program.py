"""Stands for NeMo 1's program in a Slurm job: reads its configuration as that does, and prints that one's lines.

    python nemo_1_program.py --config-path=FOLDER --config-name=FILE OVERRIDE...

With FAIL_RANK set, that rank ends with an error, and the others wait for it.
"""

from __future__ import annotations

import os
import sys
import time

from hydra import compose, initialize_config_dir


def main(config_path: str, config_name: str, overrides: list[str]) -> None:
    with initialize_config_dir(config_path, version_base=None):
        cfg = compose(config_name.removesuffix(".yaml"), overrides)
    rank = os.environ["SLURM_PROCID"]
    if fail := os.environ.get("FAIL_RANK"):
        if rank == fail:
            raise ValueError(f"no user buffers on {os.environ['SLURMD_NODENAME']}")
        time.sleep(600)
    steps = cfg.trainer.max_steps
    for step in range(steps) if rank == "0" else ():
        samples = (step + 1) * cfg.model.global_batch_size
        print(
            f"\rEpoch 0: : {100 * (step + 1) // steps}%|█| {step + 1}/{steps} [00:10<00:00, reduced_train_loss=6.000, "
            f"global_step={step}.000, consumed_samples={samples}.0, train_step_timing in s=11.20]",
            end="",
        )
    if rank == "0":
        print(f"`Trainer.fit` stopped: `max_steps={steps}` reached.")
        print(f"[NeMo I 2024-10-20 10:00:00] train_step_timing in s: {[11.18] * steps}")


if __name__ == "__main__":
    path, name = (word.partition("=")[2] for word in sys.argv[1:3])
    main(path, name, sys.argv[3:])
