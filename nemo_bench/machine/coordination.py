"""Ranks in step: a coordinator beside rank 0 gives all ranks their next task, and knows who is silent.

Lines of JSON over TCP. Each rank beats from a thread of its own: one that waits in a collective for another
beats on, the one that is stopped does not. Standard library only.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

BEAT_S = 2.0
TASK_S = 60.0  # the longest task, on healthy machines a few seconds
SILENCE_S = 12.0  # imports hold Python's lock for seconds
LOOK_S = 0.02
# Once one is lost, others may tell more of it within a second; the gravest words are about the one that is to blame.
REST_S = 1.0
_GRAVITY = ("ended", "silent", "failed", "late")


class Lost(Exception):
    """Ranks that ended, are silent, failed or are late, each with the words for it: the check ends without them."""

    def __init__(self, task: str, ranks: dict[int, str]) -> None:
        super().__init__(f"{task}: {ranks}")
        self.task, self.ranks = task, ranks


@dataclass
class Member:
    """A rank as the coordinator sees it."""

    writer: asyncio.StreamWriter
    host: str
    heard_s: float = field(default_factory=time.monotonic)
    answer: dict[str, Any] | None = None
    ended: bool = False

    def problem(self, late_s: float | None) -> str | None:
        """Return what is wrong with a rank that has a task; `late_s`: its time, if that is up."""
        if self.answer is not None:
            return f"failed: {self.answer['error']}" if "error" in self.answer else None
        if self.ended:
            return "ended without an answer"
        if (silent_s := time.monotonic() - self.heard_s) > SILENCE_S:
            return f"silent for {silent_s:.0f} s: stopped, or its node hangs"
        return f"late: not done after {late_s:.0f} s" if late_s else None


class Coordinator:
    """The server's end; `async with` it."""

    def __init__(self, world_size: int, port: int, limit_s: float) -> None:
        self.world_size, self.port, self.members = world_size, port, dict[int, Member]()
        self._end_s = time.monotonic() + limit_s

    @property
    def left_s(self) -> float:
        """Time left for the whole."""
        return self._end_s - time.monotonic()

    async def __aenter__(self) -> Coordinator:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a connection a rank
        backlog = max(128, self.world_size)
        self._server = await asyncio.start_server(self._hear, port=self.port, backlog=backlog, limit=1 << 24)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for member in self.members.values():
            member.writer.close()

    async def join(self) -> list[str]:
        """Return the host of each rank once all are there; raise Lost for those that are not in time."""
        limit_s = self.left_s - TASK_S
        while missing := set(range(self.world_size)) - set(self.members):
            if self.left_s < TASK_S:
                raise Lost("start", dict.fromkeys(sorted(missing), f"not there after {limit_s:.0f} s"))
            await asyncio.sleep(LOOK_S)
        return [self.members[rank].host for rank in range(self.world_size)]

    async def ask(self, task: str, argument: Callable[[int], Any]) -> list[Any]:
        """Give each rank a task with its argument, and return all answers by rank; raise Lost without one."""
        for rank, member in self.members.items():
            member.answer = None
            member.writer.write(as_line({"task": task, "argument": argument(rank)}))
        within_s, end, lost = min(TASK_S, self.left_s), 0.0, dict[int, str]()
        deadline = time.monotonic() + within_s
        while any(member.answer is None for member in self.members.values()) and not (lost and time.monotonic() > end):
            await asyncio.sleep(LOOK_S)
            late_s = within_s if time.monotonic() > deadline else None
            end = end if lost else time.monotonic() + REST_S
            lost = {rank: why for rank, member in self.members.items() if (why := member.problem(late_s))}
        if lost:
            gravest = min((why.split(maxsplit=1)[0].rstrip(":") for why in lost.values()), key=_GRAVITY.index)
            raise Lost(task, {rank: why for rank, why in sorted(lost.items()) if why.startswith(gravest)})
        return [(self.members[rank].answer or {})["result"] for rank in range(self.world_size)]

    async def _hear(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        member = None
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            while line := await reader.readline():
                content = json.loads(line)
                if member is None:
                    member = self.members[content["rank"]] = Member(writer, content["host"])
                elif content:
                    member.answer = content
                member.heard_s = time.monotonic()
        if member is not None:
            member.ended = True


class Seat:
    """A rank's end: iterate over it for the tasks, and answer each."""

    def __init__(self, address: tuple[str, int], rank: int, host: str, within_s: float) -> None:
        deadline = time.monotonic() + within_s
        while True:
            try:
                self._socket = socket.create_connection(address, timeout=within_s)
                break
            except OSError:  # the coordinator is about to start
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
        self._lock = threading.Lock()
        self.send({"rank": rank, "host": host})
        threading.Thread(target=self._beat, daemon=True).start()

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Yield each task and its argument until the coordinator ends; raise TimeoutError where it is silent."""
        with self._socket.makefile("rb") as lines, contextlib.suppress(ConnectionError):
            for line in lines:
                content = json.loads(line)
                yield content["task"], content["argument"]

    def send(self, content: dict[str, Any]) -> None:
        """Send `{"result": ...}` or `{"error": ...}`."""
        with self._lock:
            self._socket.sendall(as_line(content))

    def _beat(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                time.sleep(BEAT_S)
                self.send({})


def as_line(content: dict[str, Any]) -> bytes:
    return json.dumps(content).encode() + b"\n"
