"""The machine and the software that a run ran on: `node.json`, and the revision of this project."""

from __future__ import annotations

import functools
import os
import platform
import re
import socket
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from nemo_bench.files import write_json
from nemo_bench.project import PROJECT
from nemo_bench.record.redaction import is_secret

NODE = "node.json"

# An allow list: a secret in an unexpected variable stays out of the record.
_KEPT_ENVIRONMENT = re.compile(
    r"^(SLURM|SBATCH|NCCL|NVTE|CUDA|CUBLAS|CUDNN|TORCH|PYTORCH|NVIDIA|NEMO|MEGATRON|OMP|MKL|GLOO|UCX|FI|PMI|PMIX|UB)_"
    r"|^(PATH|LD_LIBRARY_PATH|LD_PRELOAD|PYTHONPATH|PYTHONUNBUFFERED|STAGE_PATH|GSW_VERSION|VIRTUAL_ENV|CONDA_PREFIX"
    r"|RANK|LOCAL_RANK|WORLD_SIZE|MASTER_ADDR|MASTER_PORT|NODE_RANK|LOCAL_WORLD_SIZE|TOKENIZERS_PARALLELISM"
    r"|TRANSFORMERS_OFFLINE|HF_HUB_OFFLINE|HF_HOME|LANG|LC_ALL|TZ)$"
)

_PACKAGES = (
    *("torch", "nemo_toolkit", "megatron-core", "megatron-bridge", "transformer-engine", "apex", "triton"),
    *("lightning", "pytorch-lightning", "transformers", "tokenizers", "numpy", "hydra-core", "omegaconf"),
)


def write_node(run_dir: Path) -> None:
    """Write `node.json`, about the machine and software that this process runs on."""
    packages = {name: next(iter(metadata.Distribution.discover(name=name)), None) for name in _PACKAGES}
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    content = {
        "host": socket.gethostname(),
        "system": platform.platform(),
        "cpu": cpu[1] if cpu else platform.machine(),
        "cpu_cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": _gpus(),
        "python": platform.python_version(),
        "packages": {name: package.version for name, package in packages.items() if package},
        "environment": kept_environment(dict(os.environ)),
    }
    write_json(run_dir / NODE, content)


def kept_environment(environment: dict[str, str]) -> dict[str, str]:
    """Return the variables that a benchmark can depend on, without anything that looks like a secret."""
    kept = (name for name in sorted(environment) if _KEPT_ENVIRONMENT.match(name) and not is_secret(name))
    return {name: environment[name] for name in kept}


@functools.cache  # a sweep records it for each point
def git_revision() -> dict[str, Any] | None:
    """Return this project's revision, and whether its files differ from it; None outside a checkout."""
    # Without locks: a kill would leave one behind.
    describe = ["git", "--no-optional-locks", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    text = _output(describe, cwd=PROJECT)
    return {"revision": text.strip().removesuffix("-dirty"), "modified": "-dirty" in text} if text else None


def cpu_wait_share() -> float | None:
    """Return the share of its time in which this process's first thread waited for a core; None if unknown."""
    try:
        ran_ns, waited_ns, _ = map(int, Path("/proc/self/schedstat").read_text().split())
    except OSError:
        return None
    return round(waited_ns / (ran_ns + waited_ns), 4)


def _gpus() -> list[dict[str, str]]:
    fields = ("name", "driver_version", "memory.total", "power.limit")
    out = _output(["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"])
    return [dict(zip(fields, line.split(", "))) for line in (out or "").splitlines()]


def _output(command: list[str], cwd: Path | None = None) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=cwd, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
