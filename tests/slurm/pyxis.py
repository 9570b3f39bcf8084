"""NVIDIA's PyXis and enroot for the test cluster, built from their sources, and what they need: an image, a registry.

The sources lie in the folder that NEMO_BENCH_PYXIS_SOURCES names, or in `../shared/pyxis` beside the checkout:
`build.sh PREFIX` there installs both.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .cluster import BOUND_TO_US, free_ports, wait_for

PROJECT = Path(__file__).resolve().parents[2]
# What is needed besides Slurm, and the Debian package that has it.
NEEDED = {
    **{command: command for command in ("gcc", "make", "jq", "parallel", "curl", "zstd")},
    **{command: command for command in ("docker-registry", "skopeo", "umoci")},
    "mksquashfs": "squashfs-tools",
    "/usr/include/slurm/spank.h": "libslurm-dev",
    "/usr/include/bsd/string.h": "libbsd-dev",
}
# Where nemo:24.09 has it.
PROGRAM = "opt/NeMo/examples/nlp/language_modeling/megatron_gpt_pretraining.py"
# The image's interpreter is this one, which has to be mounted.
PYTHON = "/opt/bin/python3"
# The image has nothing but a shell: the rest of the system is this machine's.
MOUNTED = ("/usr", sys.prefix, sys.base_prefix)


def sources() -> Path:
    return Path(os.environ.get("NEMO_BENCH_PYXIS_SOURCES") or PROJECT.parent / "shared" / "pyxis")


def no_sources() -> str | None:
    """Why there is nothing to build, or None."""
    if (sources() / "build.sh").is_file():
        return None
    return "no sources of PyXis and enroot (NEMO_BENCH_PYXIS_SOURCES=FOLDER, or ../shared/pyxis, with a build.sh)"


def why_not() -> str | None:
    """Why they cannot be built and used on this machine, or None."""
    missing = [name for name in NEEDED if not (Path(name).exists() or shutil.which(name))]
    return f"PyXis needs: apt-get install {' '.join(NEEDED[name] for name in missing)}" if missing else None


def install(prefix: Path) -> Path:
    """Build and install both into a folder, which also gets the containers, and return it."""
    done = subprocess.run(["bash", sources() / "build.sh", prefix], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("cache", "tmp"):
        (prefix / name).mkdir(exist_ok=True)
    # The nodes are one machine: each has its own containers, by its own host name.
    settings = {
        **{"RUNTIME_PATH": f"{prefix}/run/$(hostname)", "DATA_PATH": f"{prefix}/data/$(hostname)"},
        **{"CACHE_PATH": f"{prefix}/cache", "TEMP_PATH": f"{prefix}/tmp", "ALLOW_HTTP": "yes"},
    }
    text = "".join(f"ENROOT_{name} {value}\n" for name, value in settings.items())
    (prefix / "etc" / "enroot" / "enroot.conf").write_text(text)
    return prefix


def make_root(root: Path) -> Path:
    """Make a container's root file system: a shell and its libraries, an interpreter, NeMo 1's program."""
    for name in ("bin", "lib", "lib64"):
        (root / "usr" / name).mkdir(parents=True)
        (root / name).symlink_to(f"usr/{name}")
    libraries = subprocess.run(["ldd", "/bin/sh"], capture_output=True, text=True, check=True).stdout
    for file in ["/bin/sh", *re.findall(r"/\S+", libraries)]:
        _put(root, file, Path(file).read_bytes())
    _put(root, PYTHON, f'#!/bin/sh\nexec {sys.executable} "$@"\n'.encode())
    _put(root, PROGRAM, (PROJECT / "tests" / "nemo_24_09" / "program.py").read_bytes())
    # An image's variables win over those of the job, unless srun is told otherwise.
    _put(root, "etc/environment", b"OMP_NUM_THREADS=7\nPYTHONPATH=/nowhere\n")
    return root


def _put(root: Path, name: str, content: bytes) -> None:
    path = root / name.lstrip("/")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    path.chmod(0o755)


def squash(root: Path, image: Path) -> None:
    subprocess.run(["mksquashfs", root, image, "-quiet", "-no-progress"], check=True, stdout=subprocess.DEVNULL)


@contextmanager
def registry(folder: Path, root: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Serve an image of two layers, the second one large; give its name and the registry's process."""
    layout, bundle, address = folder / "oci", folder / "bundle", f"127.0.0.1:{free_ports(1)}"
    image = ("--image", f"{layout}:25.11")
    _run("umoci", "init", "--layout", layout)
    _run("umoci", "new", *image)
    _run("umoci", "unpack", "--rootless", *image, bundle)
    shutil.copytree(root, bundle / "rootfs", symlinks=True, dirs_exist_ok=True)
    _run("umoci", "repack", "--refresh-bundle", *image, bundle)
    (bundle / "rootfs" / "opt" / "noise").write_bytes(os.urandom(30_000_000))
    _run("umoci", "repack", *image, bundle)

    configuration = folder / "registry.yml"
    storage = f"{{filesystem: {{rootdirectory: {folder}/blobs}}}}"
    configuration.write_text(f"{{version: 0.1, storage: {storage}, http: {{addr: '{address}'}}}}\n")
    with (folder / "registry.log").open("wb") as log:
        process = subprocess.Popen([*BOUND_TO_US, "docker-registry", "serve", configuration], stdout=log, stderr=log)
    try:
        serving = ["curl", "--silent", "--fail", f"http://{address}/v2/"]
        wait_for(lambda: subprocess.run(serving, stdout=subprocess.DEVNULL).returncode == 0, "the registry", 30)
        name = f"{address}/nvidia/nemo:25.11"
        # enroot asks for Docker's manifest.
        copy = ("copy", "--insecure-policy", "--format", "v2s2", "--dest-tls-verify=false")
        _run("skopeo", *copy, f"oci:{layout}:25.11", f"docker://{name}")
        yield name, process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def _run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
