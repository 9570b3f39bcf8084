"""Run single ranks of a run under NVIDIA Nsight Systems: such a rank replaces itself with `nsys profile <itself>`.

srun starts one command for all ranks, and in a container `nsys` is the container's.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from nemo_bench.config import ProfileConfig
from nemo_bench.errors import BenchError
from nemo_bench.record.folder import PROFILE

# Set for the rank that runs under nsys.
VARIABLE = "NEMO_BENCH_UNDER_NSYS"


def command(profile: ProfileConfig, run_dir: Path, rank: int | str) -> list[str]:
    """Return `nsys profile` and its options; it writes `<run>/profile/rank<N>.nsys-rep`."""
    return [
        *("nsys", "profile", f"--output={run_dir / PROFILE / f'rank{rank}'}", "--force-overwrite=true"),
        *(f"--trace={profile.trace}", "--sample=none", "--cpuctxsw=none"),
        # Between cudaProfilerStart and cudaProfilerStop. The default, stop-shutdown, would end the rank as well.
        *("--capture-range=cudaProfilerApi", "--capture-range-end=stop", "--cuda-graph-trace=node"),
        *profile.nsys_args,
    ]


def wrap(profile: ProfileConfig, run_dir: Path, rank: int) -> None:
    """Go on as `nsys profile <this command>` if nsys is to profile this rank; raise BenchError if there is no nsys."""
    wrapped = os.environ.pop(VARIABLE, None) is not None
    if wrapped or profile.kind != "nsys" or rank not in profile.ranks:
        return
    if shutil.which("nsys") is None:
        where = "on PATH where the ranks run (in the container, where there is one)"
        raise BenchError(f"profile=nsys: there is no `nsys` {where}\ninstall it there; profile=torch needs nothing")
    (run_dir / PROFILE).mkdir(exist_ok=True)
    # Transformer Engine names its parts for nsys where it is asked to.
    environment = {"NVTE_NVTX_ENABLED": "1", **os.environ, VARIABLE: "1"}
    words = [*command(profile, run_dir, rank), sys.executable, *sys.orig_argv[1:]]
    os.execvpe(words[0], words, environment)
