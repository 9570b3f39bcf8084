"""The ranks of a run watched by each other while they train: who is slower than its peers, and who has stopped.

It costs a gather of two numbers a rank every five steps, between steps, and on a GPU two events around each collective
that the computation's stream waits for. docs/slower.md says why not by nvidia-resiliency-ext.
"""

from __future__ import annotations

import faulthandler
import os
import re
import socket
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from nemo_bench.config import TrainConfig
from nemo_bench.record.folder import EVENTS, SILENCE_S, STALLED, STRAGGLER, EventLog, RunFolder, read_lines
from nemo_bench.record.ranks import UNSTEADY_STEPS
from nemo_bench.record.stall import who_keeps_it
from nemo_bench.training.gpu import log
from nemo_bench.training.hooks import Hooks, RankTelemetry, Step

WINDOW, SLOW_S = 5, 5.0  # steps and seconds for which a rank must lag: shorter tells of the moment
# Slower than the median of its peers; cores of a CPU are shared with other programs.
SLOWER = {"cuda": 0.1, "cpu": 1.0}
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


class PeerWatch(Hooks):
    """Compare the ranks, and say whom the others wait for when steps stop; it stands behind the telemetry.

    The rank that records the run speaks for all, and the one at the other end where that one has stopped.
    """

    def __init__(self, cfg: TrainConfig, run: RunFolder, rank: int, events: EventLog, telemetry: RankTelemetry) -> None:
        self.cfg, self.run, self.rank, self.telemetry = cfg, run, rank, telemetry
        self.speaks, self.events, self.said_stall = events.enabled, EventLog(run), False
        self.own_s: list[float] = []
        self.seconds: list[float] = []
        self.slow_since: dict[int, float] = {}
        self.named: set[int] = set()

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
            self.telemetry.rows[-1]["own_time_s"] = own = time.monotonic() - self.began - self.waits.take()
            self.own_s += [own] if len(self.places) > 1 and len(self.seconds) > UNSTEADY_STEPS else []
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

    def _compare(self, step: int) -> None:
        """Gather each rank's own time and clock; name those that lag behind the others of their pipeline stage."""
        numbers = [statistics.median(self.own_s), self.telemetry.step.get("sm_clock_mhz") or 0.0]
        mine = torch.tensor(numbers, device=self.cfg.gpu.device)
        gathered = [torch.empty_like(mine) for _ in self.places]
        torch.distributed.all_gather(gathered, mine)
        own_s, clocks = zip(*torch.stack(gathered).tolist())  # on a GPU, which is idle then
        begun, self.compared, self.own_s = self.compared, time.monotonic(), []
        if not self.speaks:
            return
        lags, size = {}, len(own_s) // self.cfg.model.pipeline_model_parallel_size
        for rank, own in enumerate(own_s):
            first = rank // size * size
            peers = [*own_s[first:rank], *own_s[rank + 1 : first + size]] or [own]
            lags[rank] = own / statistics.median(peers) - 1
        slow = [rank for rank, lag in lags.items() if lag > SLOWER[self.cfg.gpu.device]]
        self.slow_since = {rank: self.slow_since.get(rank, begun) for rank in slow}
        for rank in sorted(self.named.difference(slow)):
            self._say("recovered", f"rank {rank} ({self._place(rank)}) keeps up with its peers again")
        self.named &= {*slow}
        for rank in slow:
            if rank not in self.named and self.compared - self.slow_since[rank] > SLOW_S:
                self.named.add(rank)
                clock = (
                    f"; SM clock {clocks[rank]:.0f} MHz, median {statistics.median(clocks):.0f}" if clocks[rank] else ""
                )
                who, own = f"rank {rank} ({self._place(rank)})", f"{own_s[rank]:.3g} s a step without waits"
                text = f"{who} is {lags[rank]:.0%} slower than its peers: {own}{clock}"
                self._say(STRAGGLER, text, after_step=step, rank=rank)

    def _place(self, rank: int) -> str:
        host, local_rank, _ = self.places[rank]
        return f"{'GPU' if self.cfg.gpu.device == 'cuda' else 'process'} {local_rank} of {host}"

    def _say(self, event: str, text: str, **details: Any) -> None:
        log(text)
        self.events.write(event, text=text, **details)
