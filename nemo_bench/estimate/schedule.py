"""Megatron's 1F1B schedule, interleaved or not, event by event."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """A pass of one micro-batch through one chunk of layers."""

    stage: int
    forward: bool
    chunk: int
    micro_batch: int
    start_ms: float
    end_ms: float


@dataclass(frozen=True)
class Pipeline:
    """A pipeline's sizes and the time of each pass."""

    stages: int
    chunks: int  # of layers on each stage (virtual pipeline)
    micro_batches: int
    forward_ms: Sequence[Sequence[float]]  # by stage, chunk
    backward_ms: Sequence[Sequence[float]]
    p2p_ms: float = 0.0
    # The last stage's last chunk leaves the output layer's weight gradient of its first micro-batches for the end.
    deferred: int = 0
    deferred_ms: float = 0.0  # of each

    def run(self) -> Timeline:
        """Return when each pass ends."""
        program = _program(self.stages, self.chunks, self.micro_batches, self.deferred)
        kinds = [time for times in (self.forward_ms, self.backward_ms) for stage in times for time in stage]
        kinds.append(self.backward_ms[-1][-1] - self.deferred_ms)
        free, ends, p2p = [0.0] * self.stages, [0.0], self.p2p_ms
        for stage, kind, needs, sent in program.steps:
            start = ends[needs] + p2p if sent else ends[needs]
            if start < free[stage]:
                start = free[stage]
            free[stage] = end = start + kinds[kind]
            ends.append(end)
        free[-1] += self.deferred * self.deferred_ms
        return Timeline(self, tuple(free), ends)

    def busy_ms(self, stage: int) -> float:
        """Return the work of a stage in a step."""
        return self.micro_batches * (sum(self.forward_ms[stage]) + sum(self.backward_ms[stage]))


@dataclass(frozen=True)
class Timeline:
    """A pipeline's passes in time."""

    pipeline: Pipeline
    stage_ends_ms: tuple[float, ...]  # with deferred weight gradients
    ends_ms: list[float]  # by event of the program, from the second

    @property
    def end_ms(self) -> float:
        return max(self.stage_ends_ms)

    def last_backward_ms(self, stage: int) -> list[float]:
        """Return when each chunk's gradients are complete."""
        p = self.pipeline
        program = _program(p.stages, p.chunks, p.micro_batches, p.deferred)
        return [self.ends_ms[event] for event in program.last_backward[stage]]

    def events(self) -> list[Event]:
        """Return every pass, in the order in which its inputs are there."""
        p = self.pipeline
        passes = _program(p.stages, p.chunks, p.micro_batches, p.deferred).passes
        result = []
        for (stage, forward, chunk, micro_batch), end in zip(passes, self.ends_ms[1:]):
            time = (p.forward_ms if forward else p.backward_ms)[stage][chunk]
            if not forward and stage == p.stages - 1 and chunk == p.chunks - 1 and micro_batch < p.deferred:
                time -= p.deferred_ms
            result.append(Event(stage, forward, chunk, micro_batch, end - time, end))
        return result


@dataclass(frozen=True)
class _Program:
    # Each step: stage, index of its time, the event that it needs (0: none), whether that one is on another stage.
    steps: list[tuple[int, int, int, bool]]
    passes: list[tuple[int, bool, int, int]]  # stage, forward, chunk, micro-batch
    last_backward: list[list[int]]  # event, by stage and chunk


def stage_order(stages: int, chunks: int, micro_batches: int, stage: int) -> list[tuple[bool, int, int]]:
    """Return a stage's passes in Megatron's order: forward or not, chunk, micro-batch.

    Source: megatron-core 0.15.3, `pipeline_parallel/schedules.py`: `get_pp_rank_microbatches`, `get_schedule_table`.
    """
    table = [
        (chunk, micro_batch)
        for first in range(0, micro_batches, stages)
        for chunk in range(chunks)
        for micro_batch in range(first, min(first + stages, micro_batches))
    ]
    if chunks > 1:
        warm_up = (stages - stage - 1) * 2 + (chunks - 1) * stages
    else:
        table, warm_up = [(0, micro_batch) for micro_batch in range(micro_batches)], stages - stage - 1
    warm_up = min(warm_up, len(table))
    forward = [(True, chunk, micro_batch) for chunk, micro_batch in table]
    backward = [(False, chunks - 1 - chunk, micro_batch) for chunk, micro_batch in table]
    steady = [step for pair in zip(forward[warm_up:], backward) for step in pair]
    return forward[:warm_up] + steady + backward[len(table) - warm_up :]


@functools.lru_cache(maxsize=64)
def _program(stages: int, chunks: int, micro_batches: int, deferred: int) -> _Program:
    """Return the passes of all stages in an order in which each comes after the one that it needs."""
    orders = [stage_order(stages, chunks, micro_batches, stage) for stage in range(stages)]
    position = [0] * stages
    slots = stages * chunks
    # The event that ended a micro-batch's forward (backward) pass in each chunk of the whole model, 0: not yet.
    done_forward = [[0] * micro_batches for _ in range(slots)]
    done_backward = [[0] * micro_batches for _ in range(slots)]
    steps: list[tuple[int, int, int, bool]] = []
    passes: list[tuple[int, bool, int, int]] = []
    last_backward = [[0] * chunks for _ in range(stages)]
    waiting = list(range(stages))
    while waiting:
        for stage in waiting:
            order = orders[stage]
            while position[stage] < len(order):
                forward, chunk, micro_batch = order[position[stage]]
                slot = chunk * stages + stage
                sent = True
                if forward:
                    needs = done_forward[slot - 1][micro_batch] if slot else 0
                    sent = slot > 0
                elif slot == slots - 1:
                    needs, sent = done_forward[slot][micro_batch], False
                else:
                    needs = done_backward[slot + 1][micro_batch]
                if not needs and (slot or not forward):
                    break
                kind = stage * chunks + chunk + (0 if forward else slots)
                if not forward and slot == slots - 1 and micro_batch < deferred:
                    kind = 2 * slots
                steps.append((stage, kind, needs, sent and stages > 1))
                passes.append((stage, forward, chunk, micro_batch))
                (done_forward if forward else done_backward)[slot][micro_batch] = len(steps)
                if not forward:
                    last_backward[stage][chunk] = len(steps)
                position[stage] += 1
        waiting = [stage for stage in waiting if position[stage] < len(orders[stage])]
    return _Program(steps, passes, last_backward)
