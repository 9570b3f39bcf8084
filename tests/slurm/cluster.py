"""A real Slurm on loopback for tests: its own daemons, on ports of their own, in a folder of its own.

All of it lives in a PID namespace whose first process is a shell that runs what this class writes to it and ends when
its standard input does: whatever happens to the tests, SIGKILL included, the kernel kills every daemon, step and rank.
A mount namespace holds the cluster's /etc/hosts, in which the node names resolve, and each node has a host name of its
own. Ports are shared with the machine, so that commands outside the namespaces reach the cluster, too.
"""

from __future__ import annotations

import os
import random
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

# What a job never leaves again. PREEMPTED is not among them: a preempted job passes through it on its way back.
FINAL_STATES = frozenset(
    ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "REVOKED", "TIMEOUT")
)

# Variables by which a job that these tests themselves run in, or a user's shell, would speak to sbatch and the others.
CALLERS_OWN = ("SLURM", "SBATCH", "SRUN", "SALLOC", "SQUEUE", "SINFO", "SACCT", "SCANCEL", "SCONTROL", "MUNGE")

# Kills the command when the process that starts it dies.
BOUND_TO_US = ("setpriv", "--pdeathsig", "KILL", "--")

NAMESPACES = ("unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "--uts", "--")

SLURM_COMMANDS = ("slurmctld", "slurmd", "sbatch", "munged")
# mariadb-install-db calls my_print_defaults, which another package has.
ACCOUNTING_COMMANDS = ("slurmdbd", "mariadbd", "mariadb-install-db", "my_print_defaults")


def sbin_path() -> str:
    """PATH with the folders of the daemons, which a user's PATH may lack."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])


def why_not(*, accounting: bool = False) -> str | None:
    """Why a cluster cannot be started on this machine, or None."""
    wanted = SLURM_COMMANDS + (ACCOUNTING_COMMANDS if accounting else ())
    if missing := [command for command in wanted if shutil.which(command, path=sbin_path()) is None]:
        packages = "slurm-wlm" + (" slurmdbd mariadb-server-core mariadb-client-core" if accounting else "")
        return f"no {', '.join(missing)} on this machine (Debian: apt-get install {packages})"
    if os.geteuid() != 0:
        return "a Slurm cluster of a test's own needs root (namespaces, device files)"
    probe = subprocess.run([*NAMESPACES, "true"], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if probe.returncode != 0:
        return f"this root may not create namespaces (a container without --privileged?): {probe.stderr.strip()}"
    return None


def processes_of(folder: Path) -> list[int]:
    """Live processes that name this cluster's folder in their environment: daemons, steps and ranks.

    Knows nothing of namespaces, so that it can tell whether they kept their promise.
    """
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [pid for pid in pids if os.fsencode(folder) in _read(pid, "environ")]


def free_ports(count: int) -> int:
    """The first of `count` consecutive ports that nobody listens on, below those that the kernel hands out."""
    for _ in range(200):
        first = random.randrange(10_000, 32_000 - count)  # at random, so that two runs that start together differ
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("0.0.0.0", port))
        except OSError:
            continue
        return first
    raise RuntimeError(f"no {count} consecutive free ports found")


def wait_for(condition: Callable[[], T], what: str, timeout: float) -> T:
    """The condition's first true value; AssertionError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout:.0f} s for {what}")
        time.sleep(0.05)
    return value


@dataclass
class SlurmCluster:
    """A Slurm cluster for the length of a `with` block.

    Nodes `n1` .. `n<total_nodes>`, of which the first `live_nodes` have a slurmd and run jobs. Partitions:

    - `gpu` (default): the live nodes. Nobody preempts its jobs.
    - `high`: the live nodes; a job here takes the nodes of jobs in `low`, which are requeued after a grace time of 3 s.
    - `closed`: all nodes, and down. Takes every job that would fit the cluster, as pending, and refuses others.

    Slurm 22.05 looks at time limits every 30 s. A requeued job waits 10 s, the lifetime of Slurm's credentials. sacct
    knows of a job some seconds late.
    """

    folder: Path
    live_nodes: int
    total_nodes: int
    accounting: bool = False
    pyxis: Path | None = None  # where PyXis and enroot are installed; None: srun starts no containers
    _init: subprocess.Popen[str] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """The environment in which sbatch, srun, squeue and the others speak to this cluster and to no other."""
        env = {name: value for name, value in os.environ.items() if not name.startswith(CALLERS_OWN)}
        path = sbin_path() if self.pyxis is None else f"{self.pyxis}/bin{os.pathsep}{sbin_path()}"
        return {**env, "PATH": path, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def __enter__(self) -> SlurmCluster:
        try:
            self.start()
        except BaseException:
            logs = self.logs()
            self.stop()
            print(logs)
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        """Returns when all live nodes are idle."""
        self._write_configuration()
        folder = self.folder
        with (folder / "log" / "init.out").open("w") as log:
            self._init = subprocess.Popen(
                [*BOUND_TO_US, *NAMESPACES, "bash", "-s"],  # bash reaps orphans, as a first process must
                cwd=folder,
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
                start_new_session=True,  # Ctrl-C is for the tests, which then stop the cluster in order
            )
        self.tell("mount --bind hosts /etc/hosts")
        self.tell("echo controller > /proc/sys/kernel/hostname")
        munge = {"key-file": "munge.key", "socket": "run/munge.sock", "pid-file": "run/munged.pid"}
        munge |= {"log-file": "log/munged.log", "seed-file": "state/munge.seed"}
        options = [f"--{name}={folder / path}" for name, path in munge.items()]
        # --force: a test's folder is closed to other users, which munged takes for a mistake
        self._daemon("munged", "munged", "--foreground", "--force", *options)
        if self.accounting:
            self._start_accounting()
        self._listening(folder / "run" / "munge.sock")

        self._daemon("slurmctld", "slurmctld", "-D", "-c")
        self._listening(self._port)
        for node in range(1, self.live_nodes + 1):
            name = f"n{node}"
            rename = f"echo {name} > /proc/sys/kernel/hostname; exec slurmd -D -N {name}"
            self._daemon(f"slurmd-{name}", "unshare", "--uts", "--", "bash", "-c", rename)
        sinfo = ("sinfo", "-h", "-N", "-p", "gpu", "-t", "idle", "-o", "%T")
        self._wait(lambda: self.run(*sinfo).stdout.split() == ["idle"] * self.live_nodes, "idle nodes")

    def restart_controller(self) -> None:
        """Ends slurmctld in order and starts it anew, with the state that it saved."""
        (controller,) = [pid for pid in processes_of(self.folder) if process_name(pid) == "slurmctld"]
        os.kill(controller, signal.SIGTERM)
        ended = self.folder / "log" / "ended"
        wait_for(ended.exists, "slurmctld to end", 10)
        ended.unlink()
        self._daemon("slurmctld", "slurmctld", "-D")
        self._listening(self._port)

    def stop(self) -> None:
        """Cancels all jobs, gives their processes some seconds to go in order, then ends everything."""
        if self._init is None:
            return
        init, pipe = self._init, self._init.stdin
        try:
            self.run("scancel", "--user=root", timeout=10)
            wait_for(lambda: not self.run("squeue", "-h", timeout=10).stdout, "the end of all jobs", 4)
        except (AssertionError, subprocess.TimeoutExpired):
            pass  # the namespace's end is theirs, too
        finally:
            self._init = None
            assert pipe is not None
            pipe.close()
            init.wait(timeout=20)  # returns when the last process of the namespace is gone

    def _start_accounting(self) -> None:
        folder = self.folder
        database = f"--no-defaults --user=root --datadir={shlex.quote(str(folder / 'mysql'))}"
        self.tell("mount -t tmpfs -o mode=700 tmpfs mysql")  # the first start of a database is slow on a busy disk
        self.tell(f"mariadb-install-db {database} --auth-root-authentication-method=socket > log/install.out 2>&1")
        # No TCP port, and root knows itself by the socket: no password either.
        options = ["--skip-networking", f"--socket={folder}/run/mysql.sock", f"--pid-file={folder}/run/mariadbd.pid"]
        options += ["--innodb-buffer-pool-size=64M", "--innodb-lock-wait-timeout=900"]
        options += ["--innodb-flush-log-at-trx-commit=0"]  # nobody will read this database after a crash
        self._daemon("mariadbd", "mariadbd", *shlex.split(database), *options)
        self._listening(folder / "run" / "mysql.sock")
        self._listening(folder / "run" / "munge.sock")
        # slurmdbd.conf cannot name a socket; the client library's own variable can.
        self._daemon("slurmdbd", "env", f"MYSQL_UNIX_PORT={folder}/run/mysql.sock", "slurmdbd", "-D")
        self._listening(self._port + 1)  # an sacctmgr that comes too early hangs
        self.run("sacctmgr", "-i", "add", "cluster", "lab", check=True)
        self.run("sacctmgr", "-i", "add", "account", "nemo", "cluster=lab", check=True)
        user = ("add", "user", "root", "account=nemo", "cluster=lab", "defaultaccount=nemo")
        self.run("sacctmgr", "-i", *user, check=True)

    def tell(self, command: str) -> None:
        """Give the cluster's first process a line of shell."""
        assert self._init is not None and self._init.stdin is not None
        self._init.stdin.write(f"{command}\n")
        self._init.stdin.flush()

    def _daemon(self, name: str, *command: str) -> None:
        self.tell(f"(trap 'echo {name} >> log/ended' EXIT; {shlex.join(command)}) > log/{name}.out 2>&1 &")

    def _listening(self, address: Path | int) -> None:
        """Waits until somebody answers at this socket or port."""

        def answers() -> bool:
            family = socket.AF_INET if isinstance(address, int) else socket.AF_UNIX
            with socket.socket(family) as probe:
                probe.settimeout(5)
                target = ("127.0.0.1", address) if isinstance(address, int) else str(address)
                return probe.connect_ex(target) == 0

        self._wait(answers, f"a listener at {address}")

    def _wait(self, condition: Callable[[], bool], what: str, timeout: float = 60) -> None:
        def or_dead() -> bool:
            if self._init is None or self._init.poll() is not None:
                raise AssertionError(f"the cluster ended during the wait for {what}")
            if (ended := self.folder / "log" / "ended").exists():
                raise AssertionError(f"{ended.read_text()} ended during the wait for {what}")
            return condition()

        wait_for(or_dead, what, timeout)

    def _write_configuration(self) -> None:
        folder = self.folder
        spools = [f"spool/n{node}" for node in range(1, self.live_nodes + 1)]
        for name in ("dev", "log", "mysql", "run", "state", *spools):
            (folder / name).mkdir(parents=True)
        self._port = free_ports(2 + self.live_nodes)
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        names = ["controller", *(f"n{node}" for node in range(1, self.total_nodes + 1))]
        hosts = Path("/etc/hosts").read_text() + "\n".join(["", *(f"127.0.0.1 {name}" for name in names), ""])
        (folder / "hosts").write_text(hosts)
        for gpu in range(8):
            # of the kind of /dev/null
            os.mknod(folder / "dev" / f"nvidia{gpu}", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/dev/nvidia[0-7]\n")
        files = ["slurm.conf"]
        files += ["cloud.conf"] if self.total_nodes > self.live_nodes else []
        files += ["accounting.conf"] if self.accounting else []
        (folder / "slurm.conf").write_text("".join(self._rendered(name) for name in files))
        if self.pyxis is not None:
            plugin = f"{self.pyxis}/lib/spank_pyxis.so runtime_path={folder}/run/pyxis execute_entrypoint=0"
            (folder / "plugstack.conf").write_text(f"required {plugin}\n")
        dbd = folder / "slurmdbd.conf"
        dbd.touch(mode=0o600)  # slurmdbd refuses a file that others may read
        dbd.write_text(self._rendered("slurmdbd.conf"))

    def _rendered(self, name: str) -> str:
        template = Path(__file__).with_name("conf") / name
        live, port = self.live_nodes, self._port
        return template.read_text().format(
            **{"folder": self.folder, "port": port, "dbd_port": port + 1, "live": live, "total": self.total_nodes},
            **{"first_port": port + 2, "last_port": port + 1 + live, "first_cloud": live + 1},
        )

    def run(
        self,
        *args: str,
        check: bool = False,
        timeout: float = 60,
        cwd: Path | None = None,
        stdin: str = "",
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """A command on the cluster's login node, `env` on top of its environment; with `check`, it must succeed."""
        done = subprocess.run(
            [*BOUND_TO_US, *args],
            cwd=cwd or self.folder,
            env={**self.environment, **(env or {})},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert not check or done.returncode == 0, f"{shlex.join(args)}: {done.stdout}{done.stderr}"
        return done

    def submit(self, *options: str, script: str) -> str:
        """The id of a new batch job that runs this bash script."""
        text = f"#!/usr/bin/env bash\n{script}\n"
        return self.run("sbatch", "--parsable", *options, check=True, stdin=text).stdout.strip()

    def job_record(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` knows of a job."""
        line = self.run("scontrol", "show", "job", "-o", job_id, check=True).stdout.strip()
        # Values may hold spaces and equals signs: a key is a capitalised word at the start or after a space.
        return dict(re.findall(r"(?:^|(?<= ))([A-Z][\w/:]*)=(.*?)(?= [A-Z][\w/:]*=|$)", line))

    def job_state(self, job_id: str) -> str:
        return self.job_record(job_id)["JobState"]

    def wait_for_state(self, job_id: str, state: str, timeout: float = 60) -> None:
        def reached() -> bool:
            now = self.job_state(job_id)
            assert now == state or now not in FINAL_STATES, f"to be {state}: {self.job_record(job_id)}"
            return now == state

        wait_for(reached, f"job {job_id} to be {state}", timeout)

    def wait_for_end(self, job_id: str, timeout: float = 60) -> str:
        """The state in which the job ended."""
        ended = wait_for(lambda: {self.job_state(job_id)} & FINAL_STATES, f"the end of job {job_id}", timeout)
        return ended.pop()

    def logs(self) -> str:
        """The end of every daemon's log, for failures."""
        lines: list[str] = []
        for path in sorted((self.folder / "log").glob("*")):
            lines += [f"==> {path.name}", *path.read_text(errors="replace").splitlines()[-20:]]
        return "\n".join(lines)


def _read(pid: int, file: str) -> bytes:
    """A file of a process; of one that is gone, nothing."""
    try:
        return Path(f"/proc/{pid}/{file}").read_bytes()
    except OSError:
        return b""


def process_name(pid: int) -> str:
    """What a process is called: Debian's programs have other names than their links."""
    return _read(pid, "comm").decode().strip()
