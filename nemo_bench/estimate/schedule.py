"""Megatron's 1F1B schedule, interleaved or not, event by event."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Event(NamedTuple):
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
        steps, step_of = _program(self.stages, self.chunks, self.micro_batches, self.deferred)
        slots = [(stage, chunk) for chunk in range(self.chunks) for stage in range(self.stages)]
        times = [self.forward_ms[stage][chunk] for stage, chunk in slots]
        times += [self.backward_ms[stage][chunk] for stage, chunk in reversed(slots)]
        times.append(times[len(slots)] - self.deferred_ms)
        free, starts, ends, p2p = [0.0] * self.stages, [0.0], [0.0], self.p2p_ms
        for stage, time, needs, sent in steps:
            start = ends[needs] + p2p if sent else ends[needs]
            if start < free[stage]:
                start = free[stage]
            free[stage] = end = start + times[time]
            starts.append(start)
            ends.append(end)
        free[-1] += self.deferred * self.deferred_ms
        return Timeline(self, step_of, free, starts, ends)

    def busy_ms(self, stage: int) -> float:
        """Return the work of a stage in a step."""
        return self.micro_batches * (sum(self.forward_ms[stage]) + sum(self.backward_ms[stage]))


@dataclass(frozen=True)
class Timeline:
    """A pipeline's passes in time."""

    pipeline: Pipeline
    step_of: list[list[int]]  # see _program
    stage_ends_ms: list[float]  # with deferred weight gradients
    starts_ms: list[float]  # of each step
    ends_ms: list[float]

    @property
    def end_ms(self) -> float:
        return max(self.stage_ends_ms)

    def last_backward_ms(self, stage: int) -> list[float]:
        """Return when each chunk's gradients are complete."""
        stages, chunks = self.pipeline.stages, self.pipeline.chunks
        return [self.ends_ms[self.step_of[-1 - chunk * stages - stage][-1]] for chunk in range(chunks)]

    def events(self) -> list[Event]:
        """Return every pass."""
        events, slots = [], self.pipeline.stages * self.pipeline.chunks
        for position, steps in enumerate(self.step_of):
            forward = position < slots
            chunk, stage = divmod(position if forward else 2 * slots - 1 - position, self.pipeline.stages)
            for micro_batch, step in enumerate(steps):
                events.append(Event(stage, forward, chunk, micro_batch, self.starts_ms[step], self.ends_ms[step]))
        return events


def stage_order(stages: int, chunks: int, micro_batches: int, stage: int) -> list[tuple[bool, int, int]]:
    """Return a stage's passes in Megatron's order: forward or not, chunk, micro-batch.

    Source: megatron-core 0.15.3, `pipeline_parallel/schedules.py`: `get_pp_rank_microbatches`, `get_schedule_table`.
    """
    group = stages if chunks > 1 else micro_batches
    table = [
        (chunk, micro_batch)
        for first in range(0, micro_batches, group)
        for chunk in range(chunks)
        for micro_batch in range(first, min(first + group, micro_batches))
    ]
    warm_up = (stages - stage - 1) * 2 + (chunks - 1) * stages if chunks > 1 else stages - stage - 1
    warm_up = min(warm_up, len(table))
    forward = [(True, chunk, micro_batch) for chunk, micro_batch in table]
    backward = [(False, chunks - 1 - chunk, micro_batch) for chunk, micro_batch in table]
    steady = [step for pair in zip(forward[warm_up:], backward) for step in pair]
    return forward[:warm_up] + steady + backward[len(table) - warm_up :]


@functools.lru_cache(maxsize=64)
def _program(
    stages: int, chunks: int, micro_batches: int, deferred: int
) -> tuple[list[tuple[int, int, int, bool]], list[list[int]]]:
    """Return the passes of all stages in an order in which each comes after the one that it needs.

    Each step: stage, index of its time, the step that it needs (0: none), whether that one is on another stage. Then
    the number of each step, by position on a micro-batch's way (forward through all chunks, and back) and micro-batch.
    """
    orders = [iter(stage_order(stages, chunks, micro_batches, stage)) for stage in range(stages)]
    slots, steps = stages * chunks, list[tuple[int, int, int, bool]]()
    step_of = [[0] * micro_batches for _ in range(2 * slots)]
    following = [next(order, None) for order in orders]
    while any(following):
        for stage in range(stages):
            while step := following[stage]:
                forward, chunk, micro_batch = step
                slot = chunk * stages + stage
                position = slot if forward else 2 * slots - 1 - slot
                needs = step_of[position - 1][micro_batch] if position else 0
                if position and not needs:
                    break
                time = 2 * slots if position == slots and micro_batch < deferred else position
                steps.append((stage, time, needs, stages > 1 and position not in (0, slots)))
                step_of[position][micro_batch] = len(steps)
                following[stage] = next(orders[stage], None)
    return steps, step_of
