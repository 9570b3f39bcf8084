"""The test cluster itself: what the other tests in this folder rely on, and what Slurm does about signals."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.slurm.cluster import SlurmCluster, free_ports, processes_of, wait_for
from tests.slurm.conftest import require_slurm

RECORDER = Path(__file__).with_name("recorder.py")
PROJECT = Path(__file__).resolve().parents[2]

# Every rank but the first says hello to the first one's node, by its name; the first counts them.
RENDEZVOUS = """
import os, socket, sys, time
first, port = sys.argv[1], int(sys.argv[2])
rank, ranks = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
if rank == 0:
    server = socket.create_server(("", port), backlog=ranks)
    names = {socket.gethostname()}
    for _ in range(ranks - 1):
        client, _ = server.accept()
        names.add(client.makefile().readline().strip())
    print(ranks, "ranks on", len(names), "nodes", flush=True)
else:
    deadline = time.monotonic() + 60
    while True:
        try:
            client = socket.create_connection((first, port), timeout=60)
            break
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    client.sendall(socket.gethostname().encode() + b"\\n")
"""


@dataclass(frozen=True)
class Event:
    """A line of the recorder's log, or of the batch script's own."""

    time: float
    restart: int
    who: str
    what: str


class Recorded:
    """A running job whose ranks, and batch script, write down their signals."""

    def __init__(self, slurm: SlurmCluster, folder: Path, *options: str, ending: str = "0", on_usr1: str = ":") -> None:
        self.slurm = slurm
        self.log = folder / "signals.log"
        note = f'echo "$(date +%s.%3N) ${{SLURM_RESTART_COUNT:-0}} batch $1" >> {shlex.quote(str(self.log))}'
        # A shell runs its traps between commands only, and `wait` is the one that a signal ends.
        script = f"""
            note() {{ {note}; }}
            trap 'note SIGTERM' TERM
            trap 'note SIGUSR1; {on_usr1}' USR1
            srun {shlex.join([sys.executable, str(RECORDER), str(self.log), ending])} &
            while kill -0 $!; do wait $!; code=$?; done 2> /dev/null
            exit $code
        """
        self.job = slurm.submit(*options, f"--output={folder}/job.out", script=script)
        ranks = slurm.job_record(self.job)["NumTasks"]
        wait_for(lambda: len(self.events(what="start")) == int(ranks), f"the start of {ranks} ranks", 60)

    def events(self, *, restart: int = 0, who: str = "", what: str = "") -> list[Event]:
        if not self.log.exists():
            return []
        rows = [line.split() for line in self.log.read_text().splitlines() if line.count(" ") == 3]
        events = [Event(float(at), int(count), name, event) for at, count, name, event in rows]
        return sorted(
            (e for e in events if e.restart == restart and who in ("", e.who) and what in ("", e.what)),
            key=lambda e: e.time,
        )

    def signals(self, who: str) -> list[str]:
        """The signals that a rank or the batch script got, without the SIGCONT that comes with any."""
        return [e.what for e in self.events(who=who) if e.what not in ("start", "SIGCONT")]


# The slow part of Slurm: time limits are looked at every 30 s. These jobs run beside the other tests.


@dataclass(frozen=True)
class Timed:
    warned: Recorded
    stubborn: Recorded
    graced: Recorded
    ends_at: float


@pytest.fixture(scope="module", autouse=True)
def timed(slurm: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Timed]:
    """Jobs whose end is a matter of time, on the two nodes that the other tests can do without."""
    start = [tmp_path_factory.mktemp(name) for name in ("warned", "stubborn", "graced")]
    warned = Recorded(slurm, start[0], "--nodelist=n18", "--signal=USR1@50", "--time=0:05")
    stubborn = Recorded(slurm, start[1], "--nodelist=n18", ending="stay")
    graced = Recorded(slurm, start[2], "--partition=low", "--nodelist=n17", "--gres=gpu:8", ending="stay")
    slurm.run("scontrol", "update", f"JobId={warned.job}", "EndTime=now+70seconds", check=True)
    slurm.run("scontrol", "update", f"JobId={stubborn.job}", "EndTime=now+1seconds", check=True)
    ends_at = time.time() + 70
    slurm.submit("--partition=high", "--nodelist=n17", "--gres=gpu:8", script="true")
    yield Timed(warned, stubborn, graced, ends_at)
    slurm.run("scancel", warned.job, stubborn.job, graced.job)


def test_live_nodes_are_ready(slurm: SlurmCluster) -> None:
    rows = slurm.run("sinfo", "-h", "-N", "-p", "gpu", "-o", "%N %t %c %G", check=True).stdout.splitlines()
    assert len(rows) == slurm.live_nodes
    assert {tuple(row.split()[2:]) for row in rows} == {("64", "gpu:8")}
    assert {row.split()[1] for row in rows} <= {"idle", "mix"}


def test_the_callers_own_slurm_is_left_out(slurm: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SBATCH_PARTITION", "SQUEUE_FORMAT"):
        monkeypatch.setenv(name, "1")
    assert [name for name in slurm.environment if name.startswith(("SLURM", "SBATCH", "SQUEUE"))] == ["SLURM_CONF"]


@pytest.mark.parametrize(("nodes", "tasks"), [(2, 2), (16, 8)])
def test_ranks_meet_at_the_first_node(slurm: SlurmCluster, tmp_path: Path, nodes: int, tasks: int) -> None:
    program = tmp_path / "rendezvous.py"
    program.write_text(RENDEZVOUS)
    output = tmp_path / "job.out"
    script = f"""
        first=$(scontrol show hostnames "$SLURM_NODELIST" | head -n 1)
        srun {shlex.join([sys.executable, "-S", str(program)])} "$first" {free_ports(1)}
    """
    job = slurm.submit(f"--nodes={nodes}", f"--ntasks-per-node={tasks}", f"--output={output}", script=script)
    assert slurm.wait_for_end(job) == "COMPLETED", output.read_text()
    assert output.read_text() == f"{nodes * tasks} ranks on {nodes} nodes\n"


def test_2048_gpus_are_accepted_and_pend(slurm: SlurmCluster) -> None:
    options = ("--partition=closed", "--nodes=256", "--ntasks-per-node=8", "--gres=gpu:8")
    tried = slurm.run("sbatch", "--test-only", *options, "--wrap=true")
    assert tried.returncode == 0, tried.stderr
    assert "2048 processors on nodes n[1-256]" in tried.stderr
    job = slurm.submit(*options, script="true")
    record = slurm.job_record(job)
    slurm.run("scancel", job, check=True)
    assert (record["JobState"], record["Reason"]) == ("PENDING", "PartitionDown")
    assert (record["NumNodes"], record["NumTasks"], record["TresPerNode"]) == ("256-256", "2048", "gres:gpu:8")


def test_2056_gpus_are_refused(slurm: SlurmCluster) -> None:
    refused = slurm.run("sbatch", "--partition=closed", "--nodes=257", "--gres=gpu:8", "--wrap=true")
    assert refused.returncode == 1
    assert "Batch job submission failed: Requested node configuration is not available" in refused.stderr


def test_a_cancelled_job_leaves_nothing(slurm: SlurmCluster, tmp_path: Path) -> None:
    job = Recorded(slurm, tmp_path, "--nodes=2", "--ntasks-per-node=2")
    slurm.run("scancel", job.job, check=True)
    assert slurm.wait_for_end(job.job) == "CANCELLED"
    assert [set(job.signals(who)) for who in "0123"] == [{"SIGTERM"}] * 4
    wait_for(lambda: not processes_of(tmp_path), "the end of the ranks", 10)


# Preemption. Jobs ask for all GPUs of nodes by name, so that there is something to fight over.

NODES = ("--nodelist=n[1-2]", "--gres=gpu:8")


def displace(slurm: SlurmCluster) -> str:
    return slurm.submit("--partition=high", *NODES, script="sleep 1")


def test_a_job_preempted_without_grace_comes_back(slurm: SlurmCluster, tmp_path: Path) -> None:
    """SIGCONT and SIGTERM to all at once; requeued although it ended with 0 by itself."""
    low = Recorded(slurm, tmp_path, "--partition=scavenge", *NODES)
    high = displace(slurm)
    assert slurm.wait_for_end(high) == "COMPLETED"
    assert [set(low.signals(who)) for who in ("0", "1")] == [{"SIGTERM"}] * 2  # from the job's end and the step's
    wait_for(lambda: len(low.events(restart=1, what="start")) == 2, "the second start", 60)
    assert slurm.job_record(low.job)["Restarts"] == "1"
    slurm.run("scancel", low.job, check=True)


def test_in_its_grace_time_a_job_that_ends_is_not_requeued(slurm: SlurmCluster, tmp_path: Path) -> None:
    """SIGCONT and SIGTERM to the ranks only; the job then ends as if nothing had happened."""
    low = Recorded(slurm, tmp_path, "--partition=low", *NODES, ending="3")
    high = displace(slurm)
    assert slurm.wait_for_end(low.job) == "FAILED"
    assert [low.signals(who) for who in ("0", "1", "batch")] == [["SIGTERM"], ["SIGTERM"], []]
    record = slurm.job_record(low.job)
    assert (record["ExitCode"], record["Restarts"]) == ("3:0", "0")
    assert slurm.wait_for_end(high) == "COMPLETED"


def test_ranks_get_their_own_signal_on_preemption(slurm: SlurmCluster, tmp_path: Path) -> None:
    """--signal=USR1 in the place of SIGTERM, whatever the time that it names."""
    low = Recorded(slurm, tmp_path, "--partition=low", "--signal=USR1@60", *NODES)
    high = displace(slurm)
    assert slurm.wait_for_end(low.job) == "COMPLETED"
    assert [low.signals(who) for who in ("0", "1", "batch")] == [["SIGUSR1"], ["SIGUSR1"], []]
    assert slurm.wait_for_end(high) == "COMPLETED"


def test_a_batch_script_that_is_warned_can_requeue_itself(slurm: SlurmCluster, tmp_path: Path) -> None:
    """--signal=B:USR1 to the batch script; ranks hear of it by the requeue's SIGTERM."""
    options = ("--partition=low", "--signal=B:USR1@60", *NODES)
    low = Recorded(slurm, tmp_path, *options, on_usr1="scontrol requeue $SLURM_JOB_ID")
    high = displace(slurm)
    assert slurm.wait_for_state(low.job, "PENDING") == "PENDING"
    assert low.signals("batch")[0] == "SIGUSR1"
    assert [set(low.signals(who)) for who in ("0", "1")] == [{"SIGTERM"}] * 2
    assert slurm.job_record(low.job)["Restarts"] == "1"
    slurm.run("scancel", low.job, check=True)
    assert slurm.wait_for_end(high) == "COMPLETED"


# Accounting, and the cluster's end


def test_sacct_knows_how_jobs_ended(slurm_with_accounting: SlurmCluster) -> None:
    slurm = slurm_with_accounting
    good = slurm.submit(script="srun true")
    bad = slurm.submit(script="exit 3")
    stopped = slurm.submit(script="sleep 60")
    assert slurm.wait_for_state(stopped, "RUNNING")
    slurm.run("scancel", stopped, check=True)
    for job in (good, bad, stopped):
        slurm.wait_for_end(job)

    def seen() -> dict[str, str]:
        rows = slurm.run("sacct", "-X", "-n", "-P", "-o", "JobID,State,ExitCode", check=True).stdout.splitlines()
        return dict(row.split("|", 1) for row in rows)

    # A cancelled job's exit code is 0:0 or 0:15, as it happens; its state names who cancelled it.
    jobs = {good: "COMPLETED|0:0", bad: "FAILED|3:0", stopped: "CANCELLED by 0|0:"}
    wait_for(lambda: all(seen().get(job, "").startswith(end) for job, end in jobs.items()), "sacct to know", 30)


def test_an_unknown_account_is_refused(slurm_with_accounting: SlurmCluster) -> None:
    assert slurm_with_accounting.run("sbatch", "--test-only", "--account=nemo", "--wrap=true").returncode == 0
    refused = slurm_with_accounting.run("sbatch", "--account=nobody", "--wrap=true")
    assert refused.returncode == 1
    assert "Invalid account or account/partition combination specified" in refused.stderr


def _runs(pid: int, name: str) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip() == name
    except OSError:
        return False


def test_nothing_outlives_the_tests(tmp_path: Path) -> None:
    """Not even tests that were killed: daemons, job steps, ranks and what ranks left in the background."""
    require_slurm()
    program = f"""
from pathlib import Path
from tests.slurm.cluster import SlurmCluster
with SlurmCluster(Path({str(tmp_path / "cluster")!r}), live_nodes=2, total_nodes=2) as cluster:
    job = cluster.submit("--nodes=2", script="srun bash -c 'setsid sleep 600 & sleep 600'")
    cluster.wait_for_state(job, "RUNNING")
    while len(cluster.pids("sleep")) < 4:
        pass
    print("running", flush=True)
    cluster.run("srun", "sleep", "600")
"""
    child = subprocess.Popen([sys.executable, "-c", program], cwd=PROJECT, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "running\n"
    wait_for(lambda: len([pid for pid in processes_of(tmp_path) if _runs(pid, "srun")]) >= 4, "both sruns", 10)
    wait_for(lambda: [pid for pid in processes_of(tmp_path) if _runs(pid, "slurmd")], "daemons", 1)
    child.send_signal(signal.SIGKILL)
    child.wait()
    wait_for(lambda: not processes_of(tmp_path), "the end of all processes", 10)


# Last, because they take longest


def test_a_rank_is_warned_before_its_time_limit(slurm: SlurmCluster, timed: Timed) -> None:
    """--signal=USR1@50: between 50 s and 20 s before the limit, since limits are looked at every 30 s.

    Not less ahead: a warning that is due at the same look as the end comes together with SIGTERM.
    """
    assert slurm.wait_for_end(timed.warned.job, 90) == "COMPLETED"
    (warning,) = timed.warned.events(what="SIGUSR1")
    assert 15 <= timed.ends_at - warning.time <= 82
    assert timed.warned.signals("0") == ["SIGUSR1"]


def test_a_job_ends_at_its_time_limit(slurm: SlurmCluster, timed: Timed) -> None:
    assert slurm.wait_for_end(timed.stubborn.job, 60) == "TIMEOUT"
    assert set(timed.stubborn.signals("0")) == {"SIGTERM"}


def test_a_job_that_sits_out_its_grace_time_is_requeued(slurm: SlurmCluster, timed: Timed) -> None:
    """SIGTERM at once to the rank, and again, now to the batch script as well, when the grace time has passed."""
    wait_for(lambda: slurm.job_record(timed.graced.job)["Restarts"] == "1", "the requeue", 60)
    first, *later = timed.graced.events(who="0", what="SIGTERM")
    assert later and later[-1].time - first.time >= slurm.grace_seconds - 1
    assert set(timed.graced.signals("batch")) == {"SIGTERM"}
