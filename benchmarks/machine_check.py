"""Does the machine check find what is wrong, and nothing else? Ranks on CPUs, one a node, and faults of each kind.

    python benchmarks/machine_check.py --ranks 16 --tries 20 --output benchmarks/results/machine_check.json

As root. Each rank has a network namespace and a host name of its own; every two namespaces are joined by a veth pair.
Faults: a node that gets a fifteenth of its share of the cores (nice), a link of 20 Mbit/s in one direction (tc tbf), a
rank stopped by SIGSTOP. All lies in namespaces that end with this process. A rank is forked from a process that has
imported torch; all else is what check_machine.py runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from hydra import compose, initialize_config_dir  # noqa: E402

from benchmarks.fork_server import ForkedProcess, ForkServer  # noqa: E402
from nemo_bench.cluster import processes  # noqa: E402
from nemo_bench.config import TrainConfig, typed  # noqa: E402
from nemo_bench.files import write_json  # noqa: E402
from nemo_bench.launch.batch_script import rank_environment  # noqa: E402
from nemo_bench.machine.command import new_folder, rank_command  # noqa: E402
from nemo_bench.machine.schedule import tournament  # noqa: E402
from nemo_bench.record.folder import read_object, timestamp  # noqa: E402
from nemo_bench.record.machine import CHECK  # noqa: E402

INSIDE = "--inside-namespaces"
SLOW_LINK = "20mbit"
NICE = 12  # a fifteenth of the weight
FAULTS = ("none", "slow node", "slow link", "stopped rank")
# A fault, and random numbers that choose where: to what was named, and whether that is right.
Attempt = Callable[["Machine", str, random.Random], dict[str, Any]]


def address(node: int) -> str:
    return f"10.77.0.{node + 1}"


def mesh(nodes: int) -> str:
    """Return the shell commands that make a network namespace m<i> for each node, and a link v<j> to each other."""
    lines = [f"ip netns add m{node} && ip -n m{node} link set lo up" for node in range(nodes)]
    pairs = [(a, b) for a in range(nodes) for b in range(a + 1, nodes)]
    links = "\n".join(f"link add v{b} netns m{a} type veth peer name v{a} netns m{b}" for a, b in pairs)
    lines.append(f"ip -batch - <<'END'\n{links}\nEND")
    for node in range(nodes):
        batch = ["link add e0 type veth peer name e1", f"addr add {address(node)}/32 dev e0"]
        batch += ["link set e0 up", "link set e1 up"]
        for other in (other for other in range(nodes) if other != node):
            batch += [f"link set v{other} up"]
            batch += [f"route add {address(other)}/32 dev v{other} src {address(node)}"]
        lines.append("ip -n m{} -batch - <<'END'\n{}\nEND".format(node, "\n".join(batch)))
    return "\n".join(lines)


def tc(action: str, node: int, other: int) -> str:
    """Return the command that slows a node's link to another down, or takes that back: action add or del."""
    # A long queue: where packets are dropped, TCP stalls.
    limit = f"tbf rate {SLOW_LINK} burst 64k limit 16m" if action == "add" else ""
    return f"tc -n m{node} qdisc {action} dev v{other} root {limit}"


def processes_of(leader: int) -> list[int]:
    """Return the processes of a process group, the oldest first."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(entry.read_text().rpartition(")")[2].split()[2]) == leader:
                found.append(int(entry.parent.name))
    return sorted(found)


def slow_down(leader: int) -> None:
    """Give a process group a fifteenth of its share of the cores, thread by thread, and its session as a whole."""
    while not processes_of(leader):  # just forked, it leads no group yet
        time.sleep(0.01)
    for pid in processes_of(leader):
        with suppress(OSError):  # it has ended
            for task in Path(f"/proc/{pid}/task").iterdir():
                os.setpriority(os.PRIO_PROCESS, int(task.name), NICE)
        with suppress(OSError):  # not every kernel shares cores out by sessions
            Path(f"/proc/{pid}/autogroup").write_text(str(NICE))


class Machine:
    """Nodes of one rank each, in namespaces, with a fork server for each."""

    def __init__(self, ranks: int, stage: Path, stack: ExitStack) -> None:
        subprocess.run(["bash", "-ec", f"mount -t tmpfs tmpfs /run\n{mesh(ranks)}"], check=True)
        self.servers, self.pids = list[ForkServer](), dict[int, int]()
        for node in range(ranks):
            name = f'hostname n{node + 1}; exec "$@"'
            prefix = ["nsenter", f"--net=/run/netns/m{node}", "unshare", "--uts", "bash", "-c", name, "bash"]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            self.servers.append(stack.enter_context(ForkServer("torch", environment, prefix)))
        with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
            overrides = [f"trainer.num_nodes={ranks}", f"stage_path={stage}"]
            self.cfg: TrainConfig = typed(compose("check_machine", overrides))

    def popen(self, command: list[str], *, env: dict[str, str], **options: Any) -> ForkedProcess:
        rank = int(env["RANK"])
        place = {"MASTER_ADDR": address(0), "GLOO_SOCKET_IFNAME": "e0", "LOCAL_RANK": "0"}
        process = self.servers[rank].popen(command, env={**env, **place}, **options)
        self.pids[rank] = process.pid
        return process


def check(machine: Machine, fault: str, random_numbers: random.Random) -> dict[str, Any]:
    """Check the machine with a fault, and return who was named for what."""
    ranks = len(machine.servers)
    # A link that the tournament measures: with 16 nodes 48 of 120.
    _, opponents = random_numbers.choice(tournament(ranks, 1))
    node, other = random_numbers.choice([(a, b) for a, b in enumerate(opponents) if b is not None])
    folder = new_folder(machine.cfg)
    environment = {**rank_environment(machine.cfg, os.environ), "OMP_NUM_THREADS": "1"}
    command = rank_command(machine.cfg, folder, sys.executable)
    with processes.started(command, environment, folder, ranks, machine.popen) as group, ExitStack() as stack:
        if fault == "slow link":
            subprocess.run(tc("add", node, other).split(), check=True)
            stack.callback(subprocess.run, tc("del", node, other).split(), check=True)
        if fault == "slow node":
            slow_down(machine.pids[node])
        log = folder / f"rank{node}.out"
        while group.poll() is None and "measures" not in log.read_text():
            time.sleep(0.05)
        if fault == "stopped rank":
            time.sleep(random_numbers.uniform(0, 3))
            os.kill(processes_of(machine.pids[node])[-1], signal.SIGSTOP)  # rank 0 is the child of its coordinator
        while group.poll() is None:
            time.sleep(0.05)
    content = read_object(folder / CHECK)
    guilty = {"none": set(), "slow link": {node, other}}.get(fault, {node})
    named = {rank for each in content["findings"] for rank in each["ranks"]}
    return {
        "at": named_nodes(guilty),
        "findings": [f"{named_nodes(each['ranks'])} {each['what']}" for each in content["findings"]],
        "right": named == guilty,
    }


def named_nodes(ranks: Iterable[int]) -> list[str]:
    return [f"n{rank + 1}" for rank in sorted(ranks)]


def main(attempt: Attempt, description: str) -> None:
    """Try each fault until the file has as many tries as are asked for; each try has numbers of its own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=16)
    parser.add_argument("--tries", type=int, default=20, help="of each fault, and without any")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=FAULTS)
    parser.add_argument("--minutes", type=float, default=1e9, help="after which no try begins")
    parser.add_argument("--output", type=Path, help="the result, JSON; what it holds is not tried again")
    parser.add_argument(INSIDE, action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.inside_namespaces:
        namespaces = ("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--")
        os.execvp("unshare", [*namespaces, sys.executable, *sys.argv, INSIDE])
    rows: list[dict[str, Any]] = []
    if arguments.output and arguments.output.exists():
        rows = read_object(arguments.output)["runs"]
    end, done = time.monotonic() + 60 * arguments.minutes, {(row["fault"], row["try"]) for row in rows}
    with tempfile.TemporaryDirectory() as stage, ExitStack() as stack:
        machine = Machine(arguments.ranks, Path(stage), stack)
        for number in range(1, arguments.tries + 1):
            for fault in arguments.faults:  # in turn: what else this machine does changes
                if (fault, number) in done or time.monotonic() > end:
                    continue
                row, start = {"try": number, "fault": fault, "time": timestamp()}, time.monotonic()
                row |= attempt(machine, fault, random.Random(f"{fault} {number}"))
                taken, load = time.monotonic() - start, os.getloadavg()[0]
                rows.append({**row, "seconds": round(taken, 1), "load": round(load, 1)})
                print(json.dumps(rows[-1]), flush=True)
                if arguments.output:
                    write_json(arguments.output, content(arguments, rows))
    for fault, counts in content(arguments, rows)["summary"].items():
        print("{}: {right} of {tries} right".format(fault, **counts))


def content(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    summary: dict[str, dict[str, int]] = {}
    for fault in FAULTS:
        own = [row["right"] for row in rows if row["fault"] == fault]
        summary |= {fault: {"tries": len(own), "right": sum(own)}} if own else {}
    return {
        "benchmark": Path(sys.argv[0]).stem,
        "command": f"python {sys.argv[0]} --ranks {arguments.ranks} --tries {arguments.tries}, as root",
        "ranks": arguments.ranks,
        "cores": os.cpu_count(),
        "date": timestamp()[:10],
        "versions": {"python": platform.python_version(), "torch": metadata.version("torch")},
        "summary": summary,
        "runs": rows,
    }


if __name__ == "__main__":
    main(check, __doc__ or "")
