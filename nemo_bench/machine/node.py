"""What a rank's node and GPU say of themselves: /sys, /proc and NVML. None where a facility is not there."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

from nemo_bench.record.node import kept_environment

# Xid numbers of NVIDIA's catalogue that speak of hardware, not of a program's mistake.
HARDWARE_XIDS = (48, 62, 63, 64, 74, 79, 92, 94, 95, 109, 119, 120, 140, 143)
READ_FILE = "read_me.bin"  # in the run folder, to be read by every node
_ITS_OWN = re.compile(r"SLURM|PMI|(LOCAL_|NODE_)?RANK$|.*_FD$|HOSTNAME|CUDA_VISIBLE_DEVICES|GPU_DEVICE_ORDINAL")


def node_facts(folder: Path) -> dict[str, Any]:
    """Return what is one node's: asked of one rank there."""
    ports = {}
    for port in sorted(Path("/sys/class/infiniband").glob("*/ports/*")):
        state, rate = (_text(port / name) or "" for name in ("state", "rate"))
        ports[f"{port.parents[1].name}/{port.name}"] = f"{state.partition(': ')[2]}, {rate}"
    enroot = _text(Path("/etc/enroot/enroot.conf"))
    plugins = [_text(path) or "" for path in Path("/etc/slurm").glob("plugstack.conf*") if path.is_file()]
    return {
        "kernel": os.uname().release,
        "driver": (_text(Path("/proc/driver/nvidia/version")) or "").partition("\n")[0] or None,
        "cpu_governor": _text(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        "hca_ports": ports or None,
        "enroot": None if enroot is None else re.findall(r"^\s*(ENROOT_\w+.*\S)", enroot, re.MULTILINE),
        "pyxis": re.findall(r"^\s*(\w+.*pyxis.*\S)", "\n".join(plugins), re.MULTILINE) or None,
        "xids": _xids(),
        "stage_read_gb_s": _read_gb_s(folder / READ_FILE),
    }


def environment() -> dict[str, str]:
    """Return the environment that the job really has, without what differs by rank."""
    kept = kept_environment(dict(os.environ))
    return {name: value for name, value in kept.items() if not _ITS_OWN.match(name)}


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _xids() -> list[str] | None:
    """Return the hardware errors in the kernel's log: GPU, number. None where it may not be read."""
    try:
        done = subprocess.run(["dmesg"], capture_output=True, text=True, timeout=10, errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = re.findall(r"NVRM: Xid \(PCI:([\da-fA-F:.]+)\): (\d+)", done.stdout)
    errors = sorted({f"{gpu}: Xid {number}" for gpu, number in lines if int(number) in HARDWARE_XIDS})
    return None if done.returncode else errors


def _read_gb_s(path: Path) -> float | None:
    """Return the speed at which this node reads a file of the stage folder, past its own cache."""
    with contextlib.suppress(OSError), open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start, size = time.perf_counter(), 0
        while part := file.read(4 << 20):
            size += len(part)
        return size / (time.perf_counter() - start) / 1e9
    return None


def gpu_facts(nvml: Any, handle: Any) -> dict[str, Any]:
    """Return what NVML says of a GPU that is at work; None for what it does not know."""

    def ask(name: str, *arguments: Any) -> Any:
        try:
            return getattr(nvml, f"nvmlDeviceGet{name}")(handle, *arguments)
        except (nvml.NVMLError, AttributeError):
            return None

    links = range(getattr(nvml, "NVML_NVLINK_MAX_LINKS", 18))
    limits = [ask("PowerManagementLimit"), ask("PowerManagementDefaultLimit")]
    power_limit_w, default_power_limit_w = (None if limit is None else limit / 1000 for limit in limits)
    _, _, pending, failed = ask("RemappedRows") or (None,) * 4
    errors = {
        name: sum(ask("NvLinkErrorCounter", link, kind) or 0 for link in links)
        for kind, name in enumerate(("replay", "recovery", "crc"))
    }
    return {
        "name": ask("Name"),
        "serial": ask("Serial"),
        "uuid": ask("UUID"),
        "power_limit_w": power_limit_w,
        "default_power_limit_w": default_power_limit_w,
        "max_sm_clock_mhz": ask("MaxClockInfo", nvml.NVML_CLOCK_SM),
        "uncorrected_ecc": ask("TotalEccErrors", nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC),
        "row_remap_pending": pending,
        "row_remap_failed": failed,
        "pcie": [ask("CurrPcieLinkGeneration"), ask("CurrPcieLinkWidth")],
        "max_pcie": [ask("MaxPcieLinkGeneration"), ask("MaxPcieLinkWidth")],
        "nvlinks": sum(ask("NvLinkState", link) or 0 for link in links),
        "nvlink_errors": errors if any(errors.values()) else None,
    }
