"""The container image: `enroot import` of a registry's image into a squash file."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from functools import partial
from pathlib import Path

from nemo_bench.cluster.processes import ProcessGroup
from nemo_bench.errors import BenchError
from nemo_bench.stage.config import StageConfig
from nemo_bench.stage.stage import Part, place_inside, print_line

_GRACE_S = 10.0  # enroot removes its temporary folders when it is terminated


def image_part(cfg: StageConfig, stage_folder: Path) -> Part:
    """Return the part `<stage>/<entrypoint.image>`."""
    place = place_inside(stage_folder, cfg.entrypoint.image, "entrypoint.image")
    plan = f"{cfg.enroot} import {enroot_uri(cfg.entrypoint.container)}, about {cfg.image_gib:g} GiB (image_gib)"
    settings = {"entrypoint.container": cfg.entrypoint.container}
    return Part("image", place, settings, plan, partial(_import, cfg))


def enroot_uri(reference: str) -> str:
    """Return a registry reference in enroot's spelling: docker://nvcr.io#nvidia/nemo:25.11, or raise BenchError."""
    if re.fullmatch(r"(docker|dockerd|podman)://\S+", reference):
        return reference
    # As for docker, the first component is a registry if it has a dot or a port, or is `localhost`.
    name = r"[a-z0-9._-]+(?:/[a-z0-9._-]+)*(?::\w[\w.-]*)?"
    match = re.fullmatch(rf"(?:((?:[\w-]+[.:][\w.:-]*|localhost))/)?({name})", reference)
    if match is None:
        example = "REGISTRY/NAME:TAG, for example nvcr.io/nvidia/nemo:25.11"
        raise BenchError(f"entrypoint.container={reference} is not an image reference: use {example}")
    return "docker://" + "#".join(filter(None, match.groups()))


def _import(cfg: StageConfig, output: Path, lock: int) -> str:
    reference = cfg.entrypoint.container
    if shutil.which(cfg.enroot) is None:
        raise BenchError(
            f"{cfg.enroot} is not installed on this machine: run this on a node that has it "
            "(hydra/launcher=submitit_slurm submits it as a job), or give its path (enroot=...)"
        )
    free_gib = shutil.disk_usage(output.parent).free / 2**30
    if free_gib < cfg.image_gib:
        needed = f"{cfg.image_gib:g} needed for the image, an estimate (image_gib)"
        raise BenchError(f"not enough disk space in {output.parent}: {free_gib:.1f} GiB free, {needed}")
    command = [cfg.enroot, "import", "--output", str(output), enroot_uri(reference)]
    print_line(f"image: {shlex.join(command)}")
    # In its own session: it starts many processes, and all have to end with it.
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(lock,), start_new_session=True)
    try:
        status = process.wait()
    finally:
        ProcessGroup([process]).stop(_GRACE_S)
    if status != 0 or not output.exists():
        raise BenchError(_failure(reference, status))
    return reference


def _failure(reference: str, status: int) -> str:
    registry = enroot_uri(reference).partition("://")[2].rpartition("#")[0].rpartition("@")[2] or "registry-1.docker.io"
    key = "$oauthtoken password <key from https://org.ngc.nvidia.com/setup/api-keys>"
    login = f"{registry.partition(':')[0]} login {key if registry == 'nvcr.io' else '<user> password <password>'}"
    return (
        f"enroot could not import {reference} (exit status {status}); its own messages are above\n"
        "  access refused (401, 403): ~/.config/enroot/.credentials (or $ENROOT_CONFIG_PATH/.credentials) must hold\n"
        f"    machine {login}\n"
        "  no space left: enroot keeps layers in ENROOT_CACHE_PATH (~/.cache/enroot) and unpacks them in "
        "ENROOT_TEMP_PATH (/tmp)"
    )
