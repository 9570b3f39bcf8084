"""Ranks in step: a coordinator gives all ranks their next task, and knows who is silent. Lines of JSON over TCP.

Each rank beats from a thread of its own: one that waits in a collective for another beats on, the one that is stopped
does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import resource
import socket
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

BEAT_S = 2.0
SILENCE_S = 12.0  # imports hold Python's lock for seconds
TASK_S = 80.0  # the longest task, on healthy machines a few seconds
REST_S = 1.0  # once one is lost: others may tell more of it


class Lost(Exception):
    """A task, and the ranks that did not do it, each with why: the check ends without them."""


class Coordinator:
    """The server's end, for `limit_s` in all."""

    def __init__(self, world_size: int, limit_s: float) -> None:
        self.world_size, self.end_s = world_size, time.monotonic() + limit_s
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._heard_s: dict[int, float] = {}
        self.ended: list[int] = []  # the first first: where one ends, its launcher ends the others
        self._answers: dict[int, dict[str, Any]] = {}

    async def server(self, port: int) -> asyncio.Server:
        """Return the server, which the first answer of each rank reaches by itself."""
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a connection a rank
        return await asyncio.start_server(self._hear, port=port, backlog=4096, limit=1 << 24)

    async def ask(self, task: str, argument: Callable[[int], Any]) -> list[Any]:
        """Give each rank a task with its argument, and return all answers by rank; raise Lost without one."""
        for rank, writer in self._writers.items():
            writer.write(as_line({"task": task, "argument": argument(rank)}))
        return await self.answers(task)

    async def answers(self, task: str) -> list[Any]:
        deadline, end, lost = min(time.monotonic() + TASK_S, self.end_s), math.inf, dict[int, str]()
        while len(self._answers) < self.world_size and time.monotonic() < end:
            await asyncio.sleep(0.02)
            if (lost := self._lost(time.monotonic() > deadline)) and end == math.inf:
                end = time.monotonic() + REST_S
        if lost := lost or self._lost(False):
            raise Lost(task, lost)
        answers, self._answers = self._answers, {}
        return [answers[rank]["result"] for rank in range(self.world_size)]

    def _lost(self, is_late: bool) -> dict[int, str]:
        """Return the ranks that are to blame: others fail or wait for those that have ended or are silent."""
        waiting, now = sorted(set(range(self.world_size)) - self._answers.keys()), time.monotonic()
        silences_s = {rank: now - self._heard_s.get(rank, now) for rank in waiting}
        ended = {rank: "ended without an answer" for rank in self.ended[:1]}
        words = f"silent for {SILENCE_S:.0f} s: stopped, or its node hangs"
        silent = {rank: words for rank, silence_s in silences_s.items() if silence_s > SILENCE_S}
        failed = {rank: answer["error"] for rank, answer in self._answers.items() if "error" in answer}
        return ended or silent or failed or dict.fromkeys(waiting if is_late else (), "late: its time is up")

    async def _hear(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        rank = -1
        with contextlib.suppress(ConnectionError, asyncio.CancelledError), contextlib.closing(writer):
            while line := await reader.readline():
                content = json.loads(line)
                rank = content.get("rank", rank)
                self._writers[rank], self._heard_s[rank] = writer, time.monotonic()
                if content:
                    self._answers[rank] = content
        if rank >= 0:
            self.ended.append(rank)


def serve(place: tuple[str, int], rank: int, make: Callable[[], Any], limit_s: float) -> None:
    """Do the coordinator's tasks, methods of what `make` makes, until it ends.

    Raises OSError where it is not there, or silent, for `limit_s`.
    """
    end_s, lock, measures = time.monotonic() + limit_s, threading.Lock(), None
    while True:
        try:
            connection = socket.create_connection(place, timeout=limit_s)
            break
        except ConnectionError:  # the coordinator is about to start
            if time.monotonic() > end_s:
                raise
            time.sleep(0.2)

    def send(content: dict[str, Any]) -> None:
        with lock:
            connection.sendall(as_line(content))

    def beat() -> None:
        with contextlib.suppress(OSError):
            while True:
                time.sleep(BEAT_S)
                send({})

    send({"rank": rank, "result": socket.gethostname()})
    threading.Thread(target=beat, daemon=True).start()
    with connection.makefile("rb") as lines, contextlib.suppress(ConnectionError):
        for line in lines:
            content = json.loads(line)
            try:
                measures = measures or make()
                answer = {"result": getattr(measures, content["task"])(content["argument"])}
            except Exception as error:
                traceback.print_exc()
                answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
            send(answer)


def as_line(content: dict[str, Any]) -> bytes:
    return json.dumps(content).encode() + b"\n"
