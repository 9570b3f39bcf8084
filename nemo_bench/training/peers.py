"""The ranks of a run watched by each other while they train: who is slower than its peers, which link, who has stopped.

It costs a gather of three numbers a rank every five steps, between steps, and on a GPU two events around each
collective that the computation's stream waits for; links are measured where collectives take longer than they did.
docs/slower.md says why not by nvidia-resiliency-ext.
"""

from __future__ import annotations

import faulthandler
import os
import re
import socket
import statistics
import threading
import time
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch.distributed import P2POp, batch_isend_irecv, irecv, isend

from nemo_bench.config import TrainConfig
from nemo_bench.record.folder import EVENTS, SILENCE_S, STALLED, STRAGGLER, RunFolder, read_lines
from nemo_bench.record.ranks import UNSTEADY_STEPS
from nemo_bench.record.stall import SHOWN, who_keeps_it
from nemo_bench.training.gpu import log
from nemo_bench.training.hooks import Hooks, RankTelemetry, Step

WINDOW, SLOW_S = 5, 5.0  # steps and seconds for which a rank must lag: shorter tells of the moment
# Slower than the median of its peers; cores of a CPU are shared with other programs.
SLOWER = {"cuda": 0.1, "cpu": 1.0}
FELT = 0.05  # of a step, at least, that the others wait for a rank
SLOWER_LINK = {"cuda": 1.0, "cpu": 9.0}  # than others; on CPUs a message waits for a core at both ends
NCCL_BYTES = 2**30  # for the connections of a rank with its neighbours, ample
STALL_STEPS, STALL_S = 10, 15.0  # no step for so many medians, and so many seconds
SETTLED_S, DEPUTY_S = 2.0, 5.0  # until all stacks are written; until a deputy speaks
_COLLECTIVES = re.compile("^(?!__).*(reduce|gather|broadcast|alltoall)")


class Waits:
    """How long other ranks hold this one up: its thread on a CPU, the stream of its computation on a GPU."""

    def __init__(self, on_gpu: bool) -> None:
        self.seconds, self.stream = 0.0, torch.cuda.current_stream() if on_gpu else None
        self.events: list[Any] = []
        # On a GPU a collective that is not asynchronous makes the stream wait itself.
        group, work = torch.distributed.ProcessGroup, torch.distributed.Work
        timed = [(group, name) for name in dir(group) if on_gpu and _COLLECTIVES.search(name)]
        for owner, name in [*timed, (work, "wait")]:
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def held(*args: Any, **kwargs: Any) -> Any:
            began, stream = time.perf_counter(), self.stream
            if stream is None:
                result = call(*args, **kwargs)
                self.seconds += time.perf_counter() - began
                return result
            if stream != torch.cuda.current_stream() or torch.cuda.is_current_stream_capturing():
                return call(*args, **kwargs)
            self.events.append(stream.record_event(torch.cuda.Event(enable_timing=True)))
            result = call(*args, **kwargs)
            self.events.append(stream.record_event(torch.cuda.Event(enable_timing=True)))
            return result

        return held

    def take(self) -> float:
        """Return the seconds since the last call; a GPU is idle."""
        seconds, events, self.seconds, self.events = self.seconds, self.events, 0.0, []
        return seconds + sum(float(begin.elapsed_time(end)) for begin, end in zip(events[::2], events[1::2])) / 1e3


def lags(values: Iterable[float], kinds: Iterable[Hashable]) -> list[float]:
    """Return by which share each value exceeds the median of its kind; of two values the lower one."""
    pairs, peers = [*zip(values, kinds)], dict[Hashable, list[float]]()
    for value, kind in pairs:
        peers.setdefault(kind, []).append(value)
    usual = {kind: statistics.median_low(others) for kind, others in peers.items()}
    return [value / usual[kind] - 1 for value, kind in pairs]


class PeerWatch(Hooks):
    """Compare the ranks, and say whom the others wait for when steps stop; it stands behind the telemetry.

    The rank that records the run speaks for all, and the one at the other end where that one has stopped.
    """

    def __init__(self, cfg: TrainConfig, run: RunFolder, rank: int, records: bool, telemetry: RankTelemetry) -> None:
        self.cfg, self.run, self.rank, self.telemetry = cfg, run, rank, telemetry
        self.speaks, self.said_stall = records, False
        self.own_s: list[float] = []
        self.waited_s: list[float] = []
        self.seconds: list[float] = []
        self.slow_since: dict[int, float] = {}
        self.named: set[int] = set()
        self.least_held_s, self.held_back_s, self.link_is_named = float("inf"), 0.0, False

    def train_start(self, first_step: int) -> None:
        self.places: list[Any] = [(socket.gethostname(), int(os.environ["LOCAL_RANK"]), self.speaks)]
        if self.cfg.world_size > 1:
            self.places *= self.cfg.world_size
            torch.distributed.all_gather_object(self.places, self.places[0])
        on_gpu = self.cfg.gpu.device == "cuda"
        # Without them all ranks of a job take the same time.
        self.waits = Waits(on_gpu) if self.cfg.trainer.time_collectives else None
        self._wait_for(first_step, SILENCE_S)
        self.began = self.compared = time.monotonic()
        if self.speaks or self.places[-1 - self.rank][2]:
            threading.Thread(target=self._watch, name="stall", daemon=True).start()

    def step_end(self, step: Step) -> None:
        self.seconds = [*self.seconds[-20:], step.seconds]
        if self.waits:
            waited = self.waits.take()
            self.telemetry.rows[-1]["own_time_s"] = own = time.monotonic() - self.began - waited
            if len(self.places) > 1 and len(self.seconds) > UNSTEADY_STEPS:
                self.own_s.append(own)
                self.waited_s.append(waited)
        if len(self.own_s) == WINDOW:
            self._compare(step.number)
        usual_s = max(STALL_S, STALL_STEPS * statistics.median_low(self.seconds))
        # Others wait for a rank that writes its profile.
        self._wait_for(step.number + 1, usual_s if self.cfg.profile.kind == "none" else SILENCE_S)
        if self.waits:
            self.waits.take()
        self.began = time.monotonic()

    def validation_start(self, after_step: int) -> None:
        self._wait_for(after_step + 1, SILENCE_S)

    checkpoint = validation_start

    def train_end(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self.deadline = float("inf")

    def _wait_for(self, step: int, limit_s: float) -> None:
        """Begin to wait for a step; every rank leaves its stack in its log where that lasts too long."""
        faulthandler.dump_traceback_later(limit_s)
        if self.said_stall:
            self._say("resumed", f"steps go on after step {step}")
        self.said_stall, self.step, self.waiting_since = False, step, time.monotonic()
        self.deadline = self.waiting_since + limit_s + SETTLED_S + (0.0 if self.speaks else DEPUTY_S)

    def _watch(self) -> None:
        """Say whom the others wait for when a step lasts too long."""
        while True:
            time.sleep(0.5)
            if time.monotonic() > self.deadline:
                self.deadline = float("inf")
                events = read_lines(self.run.path / EVENTS)[0]
                self.said_stall = not events or events[-1]["event"] != STALLED  # by the other that watches
                if self.said_stall:
                    who = who_keeps_it(self.run, len(self.places), self._place)
                    text = f"step {self.step + 1} lasts for {time.monotonic() - self.waiting_since:,.0f} s: {who}"
                    self._say(STALLED, text, after_step=self.step - 1)

    def _gathered(self, *numbers: float) -> Any:
        """Return these numbers of all ranks."""
        mine = torch.tensor(numbers, device=self.cfg.gpu.device)
        gathered = [torch.empty_like(mine) for _ in self.places]
        torch.distributed.all_gather(gathered, mine)
        return torch.stack(gathered).tolist()  # on a GPU, which is idle then

    def _compare(self, step: int) -> None:
        """Gather each rank's own time, waits and clock; name ranks that lag, else a link that holds all ranks up."""
        clock_mhz = self.telemetry.step.get("sm_clock_mhz") or 0.0
        numbers = self._gathered(statistics.median(self.own_s), statistics.median(self.waited_s), clock_mhz)
        own_s, waited_s, clocks = zip(*numbers)
        begun, self.compared, self.own_s, self.waited_s = self.compared, time.monotonic(), [], []
        size = len(own_s) // self.cfg.model.pipeline_model_parallel_size
        shares = lags(own_s, (rank // size for rank in range(len(own_s))))
        held_s, slow = min(waited_s), list[int]()
        for rank, (own, share) in enumerate(zip(own_s, shares)):
            more_s = own * share / (1 + share)
            if share > SLOWER[self.cfg.gpu.device] and more_s > FELT * (own + held_s):
                slow.append(rank)
        if not slow:
            self._compare_links(step, statistics.median(own_s), held_s)
        if not self.speaks:
            return
        self.slow_since = {rank: self.slow_since.get(rank, begun) for rank in slow}
        for rank in sorted(self.named.difference(slow)):
            self._say("recovered", f"{self._who(rank)} keeps up with its peers again")
        self.named &= {*slow}
        for rank in slow:
            if rank not in self.named and self.compared - self.slow_since[rank] > SLOW_S:
                self.named.add(rank)
                own = f"{own_s[rank]:.3g} s a step without waits"
                text = f"{self._who(rank)} is {shares[rank]:.0%} slower than its peers: {own}"
                if clocks[rank]:
                    text += f"; SM clock {clocks[rank]:.0f} MHz, median {statistics.median(clocks):.0f}"
                self._say(STRAGGLER, text, after_step=step, rank=rank)

    def _compare_links(self, step: int, own_s: float, held_s: float) -> None:
        """Name slow links once even the rank that waits least waits longer than it did; all ranks decide the same."""
        kind, ranks = self.cfg.gpu.device, range(len(self.places))
        self.least_held_s = min(self.least_held_s, held_s)
        is_slow = own_s + held_s > (1 + SLOWER[kind]) * (own_s + self.least_held_s)
        self.held_back_s = self.held_back_s + WINDOW * (own_s + held_s) if is_slow else 0.0
        event, texts = "recovered", list[str]()
        if self.held_back_s > SLOW_S and not self.link_is_named and self._have_room():
            event, self.held_back_s = STRAGGLER, 0.0
            between_hosts = [self.places[rank][0] != self.places[rank - 1][0] for rank in ranks]
            for rank, share in enumerate(lags(self._message_times_s(), between_hosts)):
                if share > SLOWER_LINK[kind]:
                    way = f"from {self._who(ranks[rank - 1])} to {self._who(rank)}"
                    texts.append(f"{way} a message takes {share + 1:.3g} times as long as elsewhere")
        if texts or (self.link_is_named and not is_slow):
            self.link_is_named = bool(texts)
            if self.speaks:
                times = f"collectives take {held_s:.3g} s a step, at best {self.least_held_s:.3g}"
                self._say(event, "; ".join([times, *texts[:SHOWN]]), after_step=step)

    def _have_room(self) -> bool:
        """Return whether NCCL can connect the ranks anew: it takes memory that the run may have left it none of."""
        on_gpu = self.cfg.gpu.device == "cuda"
        return not on_gpu or min(self._gathered(torch.cuda.mem_get_info()[0]))[0] > NCCL_BYTES

    def _message_times_s(self) -> list[float]:
        """Return how long a message takes to each rank from the one before it, the best of three."""
        ranks, times, on_gpu = len(self.places), list[float](), self.cfg.gpu.device == "cuda"
        message = torch.zeros(1 << (26 if on_gpu else 20), dtype=torch.uint8, device=self.cfg.gpu.device)
        before, after = (self.rank - 1) % ranks, (self.rank + 1) % ranks
        receives, turns = P2POp(irecv, message, before), (list[P2POp](), list[P2POp]())
        turns[self.rank % 2].append(P2POp(isend, message, after))
        turns[before % 2].append(receives)
        for actions in turns * 3:
            torch.distributed.barrier()
            start = time.perf_counter()
            for work in batch_isend_irecv(actions) if actions else ():
                work.wait()
            message[:1].tolist()  # on a GPU it has come then
            if receives in actions:
                times.append(time.perf_counter() - start)
        return [seconds for (seconds,) in self._gathered(min(times))]

    def _who(self, rank: int) -> str:
        return f"rank {rank} ({self._place(rank)})"

    def _place(self, rank: int) -> str:
        host, local_rank, _ = self.places[rank]
        return f"{'GPU' if self.cfg.gpu.device == 'cuda' else 'process'} {local_rank} of {host}"

    def _say(self, event: str, text: str, **details: Any) -> None:
        log(text)
        self.run.write_event(event, text=text, **details)
