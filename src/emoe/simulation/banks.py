"""Per-layer banks, served token by token for all capacities at once.

The rules: each layer has a bank of its own; the experts of one token and layer are looked up together and none of them
may be evicted for another; every miss is loaded. Which experts a token uses does not depend on what is resident, so the
statistics that eviction rules read, and the scores, are common to all capacities. The eviction rules are the engine's
own objects (`emoe.residency.eviction`); a property test holds the hits against those of `ResidencyTable`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Protocol

import numpy as np

from emoe.errors import UsageError
from emoe.prediction.protocol import RoutingShape
from emoe.residency.contest import RECENCY, Contest
from emoe.residency.eviction import Eviction, Now, Uses
from emoe.routing.trace import Array
from emoe.simulation.bindings import Waits
from emoe.simulation.lookups import Lookups

REPORT_TOKENS = 1000
Report = Callable[[int, int], None]
"""Called now and then with (tokens done, tokens in all)."""


class Policy(Protocol):
    """What decides: an eviction rule over all keys, kept up to date token by token."""

    @property
    def name(self) -> str:
        """As in `--policy`."""
        ...

    @property
    def rule(self) -> Eviction:
        """The order of eviction; there once `start` was called."""
        ...

    @property
    def contested(self) -> bool:
        """Whether recency takes over where it loads less (`emoe.residency.contest`)."""
        ...

    def start(self, lookups: Lookups) -> None:
        """Note what will be looked up. A policy other than Belady's must not read ahead in it."""
        ...

    def before(self, token: int) -> Array | None:
        """Bring the rule up to date for this token.

        Returns:
            None, or float [layers, experts]: the keys with most of it, as many as a layer has slots, are to be resident
            before the token runs.
        """
        ...


@dataclass(frozen=True, slots=True)
class Prefetch:
    """Keys that were loaded before a token because a policy asked for them."""

    token: int
    keys: Array


@dataclass(eq=False)
class Tally:
    """What one capacity's banks did.

    Attributes:
        slots: slots of each layer's bank.
        missed: uint16 [tokens, layers] misses.
        rerouted: those of them that were not loaded (lossy bindings), the same shape; None: all were.
        prefetches: what was loaded ahead, in the order of layers.
        wasted: prefetched experts that were evicted, or left at the end, unused.
    """

    slots: int
    missed: Array
    prefetches: list[Prefetch] = field(default_factory=list)
    wasted: int = 0
    rerouted: Array | None = None

    @property
    def waited(self) -> Array:
        """[tokens, layers] misses that were loaded and waited for."""
        found: Array = self.missed if self.rerouted is None else self.missed - self.rerouted
        return found

    @property
    def misses(self) -> int:
        """Looked-up keys that were not resident."""
        return int(self.missed.sum(dtype=np.int64))

    @property
    def loads(self) -> int:
        """Demand loads and prefetches."""
        return int(self.waited.sum(dtype=np.int64)) + sum(len(each.keys) for each in self.prefetches)


def slots_for(capacity: float, shape: RoutingShape) -> int:
    """Slots of a layer's bank that holds this share of its experts: rounded down, but one token's at least.

    Raises:
        UsageError: the share is not above 0 and at most 1.
    """
    if not 0 < capacity <= 1:
        raise UsageError(f"a capacity is a share of each layer's experts, above 0 and at most 100 %, not {capacity:g}.")
    # 0.29 * 100 is 28.999...96 as floats, and 29 slots as meant.
    return max(shape.top_k, int(Fraction(repr(float(capacity))) * shape.experts))


def serve(
    lookups: Lookups, slots: Sequence[int], policy: Policy, report: Report | None = None, waits: Waits | None = None
) -> list[Tally]:
    """Serve every look-up under one policy, with banks of each of these sizes; one tally for each size.

    `waits` says for each sequence in which layers a miss is loaded (None: in all); elsewhere it is rerouted.
    """
    return _Banks(lookups, slots, policy, waits).run(report)


class _Banks:
    """[capacities, layers * experts + 1] booleans: which keys are resident. The last key stands for none."""

    def __init__(self, lookups: Lookups, slots: Sequence[int], policy: Policy, waits: Waits | None) -> None:
        self.waits = waits
        shape = lookups.shape
        self.lookups = lookups
        self.layers, self.experts, self.top_k = shape.layers, shape.experts, shape.top_k
        self.keys = self.layers * self.experts
        self.slots = list(slots)
        self.policy = policy
        sizes = len(self.slots)
        self.resident = np.zeros((sizes, self.keys + 1), dtype=bool)
        self.resident[:, self.keys] = True
        self.occupied = np.zeros((sizes, self.layers), dtype=np.int16)
        self.room = np.repeat(np.array(self.slots, dtype=np.int16)[:, None], self.layers, axis=1)
        self.unused = np.zeros_like(self.resident)
        self.planned = False
        # A layer comes round once in a pass, so ticks and passes count the same; one array serves for both.
        self.last = np.full(self.keys + 1, -1, dtype=np.int64)
        self.uses = np.zeros(self.keys + 1, dtype=np.int64)
        # Candidates are always of the layer that runs, so its rank says nothing: 0 for all.
        self.past = Uses(
            self.last[:-1],
            self.last[:-1],
            self.uses[:-1],
            np.zeros(self.keys, dtype=np.int64),
            np.arange(self.keys),
        )
        self.base = np.arange(self.layers)[:, None] * self.experts
        self.missed = np.zeros((len(lookups), sizes, self.layers), dtype=np.uint16)
        self.tallies = [Tally(size, self.missed[:, i]) for i, size in enumerate(self.slots)]
        if waits is not None:
            self.rerouted = np.zeros_like(self.missed)
            for i, tally in enumerate(self.tallies):
                tally.rerouted = self.rerouted[:, i]
        self.contests = [Contest([size] * self.layers, self.experts) for size in self.slots if policy.contested]

    def run(self, report: Report | None) -> list[Tally]:
        lookups, policy, resident, tallies = self.lookups, self.policy, self.resident, self.tallies
        last, uses = self.last, self.uses
        shape = (len(self.slots), self.layers, self.top_k)
        policy.start(lookups)
        for token, ids in enumerate(lookups.keys):
            plan = policy.before(token)
            if plan is not None:
                self._load_plan(token, plan)
            last[ids] = token + 1
            uses[ids] += 1
            if self.contests:
                self._contest(token, ids)
            miss = ~resident[:, ids]
            if self.planned:
                self.unused[:, ids] = False
            if miss.any():
                count = miss.reshape(shape).sum(axis=2, dtype=np.int16)
                self.missed[token] = count
                loaded = ids
                if self.waits is not None:
                    where = self.waits(int(lookups.sequence[token]))
                    self.rerouted[token] = count * ~where
                    loaded, count = ids[np.repeat(where, self.top_k)], count * where
                self._make_room(token, loaded, count)
                resident[:, loaded] = True
            if report is not None and token % REPORT_TOKENS == 0:
                report(token, len(lookups))
        for i, tally in enumerate(tallies):
            tally.wasted += int(self.unused[i].sum())
        if report is not None:
            report(len(lookups), len(lookups))
        return tallies

    def _make_room(self, token: int, ids: Array, coming: Array) -> None:
        """Evict so that each layer's bank holds what comes; keys in `ids` stay."""
        held = self.occupied + coming
        np.minimum(held, self.room, out=self.occupied)
        excess = held - self.room
        rows = np.flatnonzero((excess > 0).any(axis=0))
        if not rows.size:
            return
        self.resident[:, ids] = False
        recent = np.array([contest.lead == RECENCY for contest in self.contests] or [False] * len(self.slots))
        if not recent.all():
            score = self.policy.rule.score(self.past, Now(token + 1, token + 1, 0, self.layers))
            self._evict(np.flatnonzero(~recent), rows, score, excess)
        if recent.any():
            self._evict(np.flatnonzero(recent), rows, self.last[:-1], excess)
        resident = self.resident
        if self.planned:
            gone = self.unused & ~resident
            if gone.any():
                for i, tally in enumerate(self.tallies):
                    tally.wasted += int(gone[i].sum())
                self.unused &= resident

    def _evict(self, banks: Array, rows: Array, score: Array, excess: Array) -> None:
        """Empty `excess` [banks, layers] slots of these layers in some of the banks, the lowest scores first."""
        order = score.reshape(self.layers, self.experts)[rows].argsort(axis=1, kind="stable")
        order += self.base[rows]
        at = np.ix_(banks, order.ravel()) if len(banks) < len(self.slots) else (slice(None), order.ravel())
        candidates = self.resident[at].reshape(len(banks), len(rows), self.experts)
        nth = candidates.cumsum(axis=2, dtype=np.int16)
        stays = candidates & (nth > excess[banks][:, rows, None])
        self.resident[at] = stays.reshape(len(banks), -1)

    def _contest(self, token: int, ids: Array) -> None:
        flat = np.zeros(self.keys + 1, dtype=bool)
        flat[ids] = True
        used = flat[:-1].reshape(self.layers, self.experts)
        now = Now(token + 1, token + 1, 0, self.layers)
        layers = np.arange(self.layers)
        found: list[Array] = []

        def values() -> Array:
            if not found:
                found.append(self.policy.rule.score(self.past, now).reshape(self.layers, self.experts))
            return found[0]

        for contest in self.contests:
            contest.begin_token()
            contest.visit(layers, used, values)

    def _load_plan(self, token: int, plan: Array) -> None:
        """Make the keys with the largest values resident, as many as each layer has slots (ties: the lowest key)."""
        order = np.argsort(-plan, axis=1, kind="stable")
        wanted = np.zeros(self.resident.shape, dtype=bool)
        for i, size in enumerate(self.slots):
            wanted[i, (order[:, :size] + self.base).ravel()] = True
        new = wanted & ~self.resident
        for i, tally in enumerate(self.tallies):
            # Of the layers in turn, the likeliest first.
            ranked = (order + self.base).ravel()
            tally.prefetches.append(Prefetch(token, ranked[new[i, ranked]]))
        self.planned = True
        self.unused |= new
        coming = new[:, :-1].reshape(len(self.slots), self.layers, self.experts).sum(axis=2, dtype=np.int16)
        # `wanted` differs between capacities, so each makes room on its own.
        self._make_room_each(token, wanted, coming)
        self.resident |= new

    def _make_room_each(self, token: int, kept: Array, coming: Array) -> None:
        held = self.occupied + coming
        excess = held - self.room
        np.minimum(held, self.room, out=self.occupied)
        score = self.policy.rule.score(self.past, Now(token, token, 0, self.layers))
        order = score.reshape(self.layers, self.experts).argsort(axis=1, kind="stable") + self.base
        for i, tally in enumerate(self.tallies):
            candidates = (self.resident[i] & ~kept[i])[order]
            evicted = order[candidates & (candidates.cumsum(axis=1) <= excess[i][:, None])]
            tally.wasted += int(self.unused[i, evicted].sum())
            self.unused[i, evicted] = False
            self.resident[i, evicted] = False
