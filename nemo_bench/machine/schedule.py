"""Which ranks measure a link together: a tournament of pairs, and the process groups of the layout."""

from __future__ import annotations

import math

from nemo_bench.config import TrainConfig

Round = tuple[str, list[int | None]]  # in_node or network (between nodes), and each rank's opponent, if it has one


def matches(players: int) -> list[list[int | None]]:
    """Return rounds in which a player meets one other at most, and never one twice: each player's opponent, by round.

    The circle method would take `players - 1` rounds for all pairs. Two more than log2(players) of them tell a slow
    player, who is slow against everybody, from a slow link between two.
    """
    seats = players + players % 2  # with an odd number, one sits out
    number = min(seats - 1, 2 + math.ceil(math.log2(players))) if players > 1 else 0
    rounds = []
    for turn in range(number):
        opponents: list[int | None] = [None] * players
        for player in range(seats - 1):
            other = (turn * (seats - 1) // number - player) % (seats - 1)
            other = seats - 1 if other == player else other
            if player < players and other < players:
                opponents[player], opponents[other] = other, player
        rounds.append(opponents)
    return rounds


def tournament(nodes: int, devices: int) -> list[Round]:
    """Return all rounds: GPUs against GPUs of their node, then node against node, each GPU with the other's same."""
    rounds: list[Round] = []
    for opponents in matches(devices):
        ranks = [None if o is None else node * devices + o for node in range(nodes) for o in opponents]
        rounds.append(("in_node", ranks))
    for opponents in matches(nodes):
        ranks = [None if o is None else o * devices + device for o in opponents for device in range(devices)]
        rounds.append(("network", ranks))
    return rounds


def layout_groups(cfg: TrainConfig) -> dict[str, list[list[int]]]:
    """Return the ranks of each process group of the layout, as Megatron lays them out: TP, CP, DP, PP outermost."""
    m = cfg.model
    sizes = {"TP": m.tensor_model_parallel_size, "CP": m.context_parallel_size, "DP": cfg.data_parallel_size}
    groups, stride = {}, 1
    for name, size in {**sizes, "PP": m.pipeline_model_parallel_size}.items():
        blocks = range(0, cfg.world_size, size * stride)
        firsts = [block + place for block in blocks for place in range(stride)]
        if size > 1:
            groups[name] = [[*range(first, first + size * stride, stride)] for first in firsts]
        stride *= size
    return groups
