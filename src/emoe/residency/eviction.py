"""Eviction rules: which resident expert goes first. Pure; shared by the engine and the simulator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from emoe.errors import UsageError


@dataclass(slots=True)
class UseStats:
    """What is known of one expert key's past: ticks count layer visits, passes count forward passes of the model."""

    layer: int
    last_tick: int = -1
    last_pass: int = -1
    uses: int = 0


@dataclass(slots=True)
class Now:
    """The moment of an eviction: the running pass, the layer being run, and the number of MoE layers in a pass."""

    tick: int
    pass_no: int
    layer_rank: int
    layers: int


class Eviction(Protocol):
    """An eviction rule. `score` orders candidates; the lowest goes first."""

    name: str

    def score(self, stats: UseStats, rank: int, now: Now) -> tuple[float, ...]:
        """Score one candidate.

        Args:
            stats: its past.
            rank: its layer's position among the MoE layers (0 is nearest the input).
            now: the moment.
        """
        ...


class LRU:
    """Least recently used."""

    name = "lru"

    def score(self, stats: UseStats, rank: int, now: Now) -> tuple[float, ...]:
        """Score by the last visit that used the expert."""
        return (float(stats.last_tick),)


class LFU:
    """Least frequently used over the whole run, ties by recency."""

    name = "lfu"

    def score(self, stats: UseStats, rank: int, now: Now) -> tuple[float, ...]:
        """Score by the number of uses, then by the last."""
        return (float(stats.uses), float(stats.last_tick))


class LeastStale:
    """Experts of earlier passes first (the Least-Stale rule of SpecMD), ties by the farthest next visit.

    Staleness counts how often an expert's layer came by without using it. A layer ahead of the running one has not
    had its turn in this pass, so its experts are not blamed for it: recency alone (LRU) would evict exactly those,
    the ones needed next, because layers are visited cyclically.
    """

    name = "least-stale"

    def score(self, stats: UseStats, rank: int, now: Now) -> tuple[float, ...]:
        """Score by visits missed (most first), then by layers until the next visit (farthest first)."""
        visited = 1 if rank < now.layer_rank else 0
        missed = now.pass_no - 1 - stats.last_pass + visited
        distance = (rank - now.layer_rank - 1) % now.layers
        return (-float(missed), -float(distance), float(stats.uses))


EVICTION_RULES: dict[str, Callable[[], Eviction]] = {rule.name: rule for rule in (LRU, LFU, LeastStale)}
"""Rules by name. Adding one is one class and one entry here."""


def make_eviction(name: str) -> Eviction:
    """Return a new rule by name.

    Raises:
        UsageError: no rule has that name.
    """
    if name not in EVICTION_RULES:
        raise UsageError(f"no eviction rule is called {name!r}: choose one of {', '.join(sorted(EVICTION_RULES))}.")
    return EVICTION_RULES[name]()
