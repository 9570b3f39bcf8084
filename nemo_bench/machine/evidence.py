"""What the ranks of a machine check have measured, and what of it is slow beside its peers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from nemo_bench.machine.coordination import Lost

# Below this share of its peers' middle a rate is slow. GPUs of a kind differ by 0.7% (estimate/constants.yaml). Ranks
# on CPUs share cores, and a message between two that wait for cores takes up to ten times as long.
SLOW = {
    "cuda": {"bf16_tflops": 0.95, "fp8_tflops": 0.95, "memory_gb_s": 0.93, "to_device_gb_s": 0.75, "link": 0.8},
    "cpu": {"fp32_tflops": 0.5, "link": 0.05},
}
Link = tuple[str, tuple[int, ...]]  # its kind (in_node, network, a group's operation and size), and the ranks it joins


@dataclass
class Evidence:
    """All answers by rank; those of `compute` by try and rank."""

    device: str
    hosts: list[str] = field(default_factory=list)
    facts: list[dict[str, Any]] = field(default_factory=list)
    compute: list[list[dict[str, Any]]] = field(default_factory=list)
    networks: list[list[str]] = field(default_factory=list)
    links: dict[Link, tuple[float, ...]] = field(default_factory=dict)  # GB/s by direction, the best of all tries
    latencies_us: dict[str, list[float]] = field(default_factory=dict)
    lost: Lost | None = None

    def rates(self, name: str) -> dict[int, float]:
        """Return the best of all tries, by rank."""
        tries = [(rank, answer["rates"].get(name)) for one in self.compute for rank, answer in enumerate(one)]
        return dict(sorted(((rank, rate) for rank, rate in tries if rate), key=lambda each: each[1]))

    def slow_ranks(self) -> dict[str, set[int]]:
        """Return by rate the ranks that were slow in every try."""
        slow = {}
        for name, share in SLOW[self.device].items():
            tries = [{rank: answer["rates"].get(name) for rank, answer in enumerate(one)} for one in self.compute]
            if tries:
                slow[name] = set.intersection(*(_below(rates, share * middle(rates.values())) for rates in tries))
        return {name: ranks for name, ranks in slow.items() if ranks}

    def add_link(self, kind: str, ranks: tuple[int, ...], *rates: float) -> None:
        """Keep the best of all tries of each direction: noise only makes them slower."""
        before = self.links.get((kind, ranks), rates)
        self.links[kind, ranks] = tuple(map(max, rates, before))

    def of_kind(self, kind: str) -> dict[Link, float]:
        """Return the slower direction of each link of a kind."""
        return {link: min(rates) for link, rates in self.links.items() if link[0] == kind}

    @property
    def kinds(self) -> list[str]:
        """The kinds of links in the order in which they were measured."""
        return list(dict.fromkeys(kind for kind, _ in self.links))

    def slow_links(self) -> list[Link]:
        """Return the links that are slow beside three quarters of their kind: of a slow node among four, half are."""
        slow = set[Link]()
        for kind in self.kinds:
            rates = self.of_kind(kind)
            slow |= _below(rates, SLOW[self.device]["link"] * middle(rates.values(), 0.75))
        return [link for link in self.links if link in slow]

    def blame(self) -> tuple[list[tuple[str, int]], list[Link]]:
        """Return the ranks that are slow with most others, by kind, and the links that are slow for themselves.

        What a rank that was named already does to its links is not told again.
        """
        named = set().union(*self.slow_ranks().values())
        slow = [link for link in self.slow_links() if not named & set(link[1])]
        played = Counter((kind, rank) for kind, ranks in self.links for rank in ranks)
        guilty, alone = list[tuple[str, int]](), list[Link]()
        while slow:
            (who, number), *_ = Counter((kind, rank) for kind, ranks in slow for rank in ranks).most_common(1)
            if number < 2 or number <= played[who] / 2:
                break
            guilty.append(who)
            named.add(who[1])
            slow = [link for link in slow if not named & set(link[1])]
        for link in slow:
            if not named & set(link[1]):
                alone.append(link)
                named |= set(link[1])
        return guilty, alone

    def content(self) -> dict[str, Any]:
        """Return all of it for a file."""
        links = [{"kind": kind, "ranks": ranks, "gb_s": rates} for (kind, ranks), rates in self.links.items()]
        return {**vars(self), "links": links, "lost": self.lost and vars(self.lost)}


def middle(values: Collection[float | None], share: float = 0.5) -> float:
    """Return the value that this share of the others does not exceed, the higher of two; 0 of none."""
    known = sorted(value for value in values if value is not None)
    return known[math.ceil(share * (len(known) - 1))] if known else 0.0


def _below(values: Mapping[Any, float | None], least: float) -> set[Any]:
    return {key for key, value in values.items() if value is not None and value < least}
