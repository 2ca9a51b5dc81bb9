"""Eviction rules: which resident expert goes first. Pure; shared by the engine and the simulator."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from emoe.errors import named
from emoe.plugins import Registry, check_conforms

Counts = npt.NDArray[np.int64]
Scores = npt.NDArray[np.int64] | npt.NDArray[np.float64]


@dataclass(slots=True)
class Uses:
    """What is known of the past of some expert keys, one entry each.

    Ticks count layer visits, passes count forward passes of the model; `rank` is the layer's position among the MoE
    layers (0 is nearest the input); `number` counts keys layer by layer: rank * experts + expert where all layers have
    equally many.
    """

    last_tick: Counts
    last_pass: Counts
    uses: Counts
    rank: Counts
    number: Counts


@dataclass(slots=True)
class Now:
    """The moment of an eviction: the running pass, the layer being run, and the number of MoE layers in a pass."""

    tick: int
    pass_no: int
    layer_rank: int
    layers: int


class Eviction(Protocol):
    """An eviction rule. `score` orders candidates; the lowest goes first, of equal ones that of the lowest number.

    A score depends on its own entry and the moment alone, so that the simulator may score every key of all layers at
    once, in arrays of any shape, where the engine scores the candidates for one slot.

    `shared_from` says from how many slots per layer, as a multiple of one token's experts, one pool over all layers
    beats even quotas under this rule (below, layers that come late in a pass lose what they need to the early ones).
    `steady` says that the order of one layer's keys changes only when one of them is used.
    """

    name: str
    shared_from: float
    steady: bool

    def score(self, past: Uses, now: Now) -> Scores:
        """Score candidates, one number for each entry of `past`."""
        ...


class LRU:
    """Least recently used."""

    name = "lru"
    steady = True
    shared_from = 4.0  # on gpt-oss-20b (docs/log.md): quotas win at 2.8, one pool at 4.0; equal at 3.2

    def score(self, past: Uses, now: Now) -> Counts:
        """Score by the last visit that used the expert."""
        return past.last_tick


class LFU:
    """Least frequently used over the whole run, ties by recency."""

    name = "lfu"
    steady = True
    shared_from = math.inf  # a pool is filled by the layers whose routing is most skewed

    def score(self, past: Uses, now: Now) -> Counts:
        """Score by the number of uses, then by the last."""
        return (past.uses << 32) + past.last_tick


class LeastStale:
    """Experts of earlier passes first (the Least-Stale rule of SpecMD), ties by the farthest next visit.

    Staleness counts how often an expert's layer came by without using it. A layer ahead of the running one has not
    had its turn in this pass, so its experts are not blamed for it: recency alone (LRU) would evict exactly those,
    the ones needed next, because layers are visited cyclically.
    """

    name = "least-stale"
    steady = True
    shared_from = 2.5  # on gpt-oss-20b (docs/log.md): quotas win at 2.0, one pool at 2.8, equal at 2.4

    def score(self, past: Uses, now: Now) -> Counts:
        """Score by visits missed (most first), then layers until the next visit (farthest first), then fewest uses."""
        missed = now.pass_no - 1 - past.last_pass + (past.rank < now.layer_rank)
        distance = (past.rank - now.layer_rank - 1) % now.layers
        order: Counts = np.minimum(past.uses, (1 << 24) - 1) - ((missed * now.layers + distance) << 24)
        return order


class Scored:
    """Keys by values that something else keeps up to date (a scorer of the prediction room), ties by recency."""

    steady = False
    shared_from = math.inf  # values are comparable within a layer only

    def __init__(self, name: str, keys: int) -> None:
        """Start with equal values for `keys` expert keys, which is LRU."""
        self.name = name
        self.values: npt.NDArray[np.float32] = np.zeros(keys, dtype=np.float32)

    def score(self, past: Uses, now: Now) -> Counts:
        """Score by value; between equal ones the least recently used goes first. Values must not be NaN."""
        # A float's bits, those below the sign flipped where it is negative, order as integers as the floats do.
        bits = np.add(self.values[past.number], 0, dtype=np.float32).view(np.int32)  # + 0: -0.0 equals 0.0
        order: Counts = ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int64) << 32) + past.last_tick
        return order


EVICTION_RULES: Registry[Callable[[], Eviction]] = Registry(
    "eviction rule", "policy", {rule.name: rule for rule in (LRU, LFU, LeastStale)}
)
"""Rules by name. Adding one is one class and one entry here."""


def make_eviction(name: str) -> Eviction:
    """Return a new rule by name.

    Raises:
        UsageError: no rule has that name, or what bears it lacks something that `Eviction` asks for.
    """
    made = named("eviction rule", name, EVICTION_RULES)()
    check_conforms(made, Eviction, "eviction rule", name)
    return made
