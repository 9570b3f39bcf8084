"""The container image: `enroot import` of a registry's image into a squash file."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nemo_bench.errors import BenchError
from nemo_bench.files import size_text
from nemo_bench.stage.config import PartName, StageConfig
from nemo_bench.stage.files import Room, say
from nemo_bench.stage.manifest import Entry
from nemo_bench.stage.part import Part, inside

# The superblock of squashfs 4.0: magic, major version, bytes used.
_SUPERBLOCK = struct.Struct("<4s24xH10xQ48x")
_SQUASHFS_MAGIC, _SQUASHFS_VERSION = b"hsqs", 4
_TAIL_BYTES = 64 << 10
_TAIL_LINES = 12
# enroot removes its temporary folders when it is terminated.
_GRACE_S = 10.0
_ENROOT_CONF = Path("/etc/enroot/enroot.conf")


def enroot_uri(reference: str) -> str:
    """A registry reference as enroot spells it: `nvcr.io/nvidia/nemo:25.11` is `docker://nvcr.io#nvidia/nemo:25.11`.

    As for docker, the first component names a registry where it has a dot or a port, or is `localhost`, and a digest
    wins over a tag; enroot 3 takes a digest in the tag's place. A reference with a scheme of enroot's own (docker://,
    dockerd://, podman://) stays as it is.

    Raises:
        BenchError: it is no reference.
    """
    if re.fullmatch(r"(docker|dockerd|podman)://\S+", reference):
        return reference
    match = re.fullmatch(
        r"(?:([^/@\s]+)/)?([a-z0-9._-]+(?:/[a-z0-9._-]+)*)(:[\w][\w.-]*)?(?:@(sha256:[0-9a-f]{64}))?", reference
    )
    if match is None:
        raise BenchError(
            f"entrypoint.container={reference} is no image reference: REGISTRY/NAME:TAG, "
            "for example nvcr.io/nvidia/nemo:25.11"
        )
    first, name, tag, digest = match.groups()
    if first is not None and not ("." in first or ":" in first or first == "localhost"):
        first, name = None, f"{first}/{name}"
    return f"docker://{first + '#' if first else ''}{name}{f':{digest}' if digest else tag or ''}"


class ImagePart(Part):
    """`<stage>/<entrypoint.image>`."""

    kind = PartName.image
    place_key = "entrypoint.image"

    def __init__(self, cfg: StageConfig, stage: Path) -> None:
        self.cfg = cfg
        self.reference = cfg.entrypoint.container
        self.uri = enroot_uri(self.reference)
        self.place = inside(stage, cfg.entrypoint.image, "entrypoint.image")

    def difference(self, entry: Entry) -> str | None:
        recorded = entry.details["container"]
        if recorded in (None, self.reference):
            return None
        return f"is {recorded}, not entrypoint.container={self.reference}"

    def version(self, entry: Entry) -> str:
        return entry.details["container"] or f"as found ({self.reference}?)"

    def plan(self, destination: Path) -> str:
        return f"{shlex.join(self._command(destination))}\n  about {size_text(self._estimate())} (image_gib)"

    def room(self, destination: Path) -> list[Room]:
        # enroot's folders get at least as much, where they are on a file system of their own: compressed layers in its
        # cache, unpacked ones in its temporary folder.
        folders = {"the image": destination.parent, **{f"enroot's {k}": v for k, v in enroot_folders().items()}}
        needs: dict[int, Room] = {}
        for what, folder in folders.items():
            needs.setdefault(_device(folder), Room(folder, self._estimate(), f"{what}, an estimate: image_gib"))
        return list(needs.values())

    def make(self, made: Path, lock: int) -> dict[str, Any]:
        executable = shutil.which(self.cfg.enroot)
        if executable is None:
            raise BenchError(
                f"{self.cfg.enroot} is not on this machine, and it makes the container image from {self.reference}: "
                "run this on a node that has it (hydra/launcher=submitit_slurm submits it as a job), name its path "
                "(enroot=...), or bring a bundle from another cluster (bundle=FILE)"
            )
        command = self._command(made)
        say(f"image: {shlex.join(command)}")
        status, tail = _run(command, lock)
        if status != 0:
            raise BenchError(self._failure(status, tail))
        if not made.exists():
            raise BenchError(f"enroot ended well and left no file: `{shlex.join(command)}` by hand may show why")
        _check_squashfs(made)
        return {"container": self.reference, "enroot": _version(executable)}

    @property
    def adopt(self) -> Callable[[Path], dict[str, Any]]:
        return self._adopt  # made by hand, or by the recipe's own setup.sh

    def _adopt(self, path: Path) -> dict[str, Any]:
        _check_squashfs(path)
        return {"container": None, "enroot": None}

    def _estimate(self) -> int:
        return int(self.cfg.image_gib * 2**30)

    def _command(self, output: Path) -> list[str]:
        return [self.cfg.enroot, "import", "--output", str(output), self.uri]

    def _failure(self, status: int, tail: list[str]) -> str:
        text = "\n".join(tail)
        lines = [f"enroot could not import {self.reference} (exit status {status}). Its last lines:"]
        lines += [f"  | {line}" for line in tail]
        if re.search(r"\b40[13]\b|unauthorized|denied", text, re.IGNORECASE):
            credentials = Path(os.environ.get("ENROOT_CONFIG_PATH") or _xdg("XDG_CONFIG_HOME", ".config") / "enroot")
            registry = self.uri.removeprefix("docker://").partition("#")[0].rpartition("@")[2]
            login = (
                "machine nvcr.io login $oauthtoken password <key from https://org.ngc.nvidia.com/setup/api-keys>"
                if "nvcr.io" in registry
                else f"machine {registry} login <user> password <password>"
            )
            lines.append(f"the registry refused access: {credentials / '.credentials'} must hold the line")
            lines.append(f"  {login}")
        if "no space left" in text.lower():
            folders = ", ".join(f"{name}={folder}" for name, folder in enroot_folders().items())
            lines.append(f"a disk is full: the stage folder's, or one of enroot's own ({folders})")
        return "\n".join(lines)


def _check_squashfs(path: Path) -> None:
    with open(path, "rb") as file:
        head, size_bytes = file.read(_SUPERBLOCK.size), os.fstat(file.fileno()).st_size
    if not head.startswith(_SQUASHFS_MAGIC):
        raise BenchError(f"the image is no squash file (it does not begin with {_SQUASHFS_MAGIC.decode()})")
    if len(head) < _SUPERBLOCK.size:
        raise BenchError(f"the image is truncated: {size_bytes} of at least {_SUPERBLOCK.size} bytes")
    _, version, used_bytes = _SUPERBLOCK.unpack(head)
    if version != _SQUASHFS_VERSION:
        raise BenchError(f"the image is no squash file of version {_SQUASHFS_VERSION}, but of version {version}")
    if size_bytes < used_bytes:  # more is well: files are padded
        raise BenchError(f"the image is truncated: {size_bytes:,} of {used_bytes:,} bytes")


def _device(folder: Path) -> int:
    return next(above for above in (folder, *folder.parents) if above.exists()).stat().st_dev


# --- enroot's own ways --------------------------------------------------------------------------------------


def _xdg(variable: str, below_home: str) -> Path:
    return Path(os.environ.get(variable) or Path.home() / below_home)


def enroot_folders() -> dict[str, Path]:
    """Where enroot keeps layers and unpacks them, by the variable that says so: environment, enroot.conf, default.

    Of a value that only a shell can expand, the part before that: it is on the same file system.
    """
    try:
        conf = _ENROOT_CONF.read_text()
    except OSError:
        conf = ""
    default = {
        "ENROOT_CACHE_PATH": _xdg("XDG_CACHE_HOME", ".cache") / "enroot",
        "ENROOT_TEMP_PATH": Path(os.environ.get("TMPDIR") or "/tmp"),
    }
    folders = {}
    for name, folder in default.items():
        configured = re.search(rf"^{name}[ \t=]+(\S.*)$", conf, re.MULTILINE)
        value = os.environ.get(name) or os.path.expandvars(configured[1].strip() if configured else str(folder))
        folders[name] = Path(re.split(r"[$`]", value)[0].strip("\"'") or "/")
    return folders


def _version(executable: str) -> str | None:
    try:
        done = subprocess.run([executable, "version"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _run(command: list[str], lock: int) -> tuple[int, list[str]]:
    """Runs `command`, shows what it says as it says it, and returns its exit status and its last lines."""
    reader, writer = _terminal() if sys.stderr.isatty() else os.pipe()
    try:
        # In a session of its own: it starts many processes, and all have to end with it.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=writer, stderr=writer, pass_fds=(lock,), start_new_session=True
        )
    except OSError as error:
        os.close(reader)
        raise BenchError(f"{command[0]} cannot be started: {error}") from error
    finally:
        os.close(writer)
    try:
        tail = b""
        for block in _blocks(reader):
            sys.stderr.buffer.write(block)
            sys.stderr.buffer.flush()
            tail = (tail + block)[-_TAIL_BYTES:]
        status = process.wait()
    except BaseException:
        _end(process)
        raise
    finally:
        os.close(reader)
    text = tail.decode("utf-8", "replace").replace("\r\n", "\n")
    # Progress bars overwrite their line.
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in text.split("\n")]
    return status, [line for line in lines if line][-_TAIL_LINES:]


def _terminal() -> tuple[int, int]:
    """A terminal as wide as ours: into a pipe enroot would write no progress."""
    import fcntl
    import pty
    import termios

    reader, writer = pty.openpty()
    size = fcntl.ioctl(sys.stderr.fileno(), termios.TIOCGWINSZ, b"\0" * 8)
    fcntl.ioctl(writer, termios.TIOCSWINSZ, size)
    return reader, writer


def _blocks(reader: int) -> Iterator[bytes]:
    with contextlib.suppress(OSError):  # EIO: the last process has closed the terminal
        while block := os.read(reader, 4096):
            yield block


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
