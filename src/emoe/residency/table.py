"""Which expert is in which slot, and which goes when another comes. Pure: no torch, no threads, no clock.

The engine and the simulator share it, so the same sequence of visits gives the same hits in both.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from emoe.residency.books import LEGAL_MOVES, IllegalMove, Key, LayerCounters, SlotBooks, SlotState
from emoe.residency.eviction import Counts, Eviction, Now, Uses

__all__ = ["LEGAL_MOVES", "IllegalMove", "Key", "LayerCounters", "ResidencyTable", "SlotState"]

_NONE: Counts = np.empty(0, dtype=np.int64)


@dataclass(slots=True)
class ResidencyTable(SlotBooks):
    """Slots of one bank, the keys in them, and the choice of what to evict.

    A *transient* slot holds an expert that a prefill streamed through; transient slots are reused before any other
    resident expert is touched, and at most `max_transient` exist (0: the plan's `passing`), so that decode's
    residency survives a prefill.
    A transient expert that decode hits becomes an ordinary resident. With a lane (`plan.lane`) transient slots are
    those and no others, so that no resident is ever touched by a prefill.
    """

    eviction: Eviction
    max_transient: int = 0
    _champions: Counts = field(init=False)
    _quotas: bool = field(init=False)

    def __post_init__(self) -> None:
        SlotBooks.__post_init__(self)  # super() does not know a dataclass with slots, which is another class
        self.max_transient = max(1, min(self.plan.lane or self.max_transient or self.plan.passing, self.plan.slots))
        self._quotas = any(self.plan.quotas.values())
        # Of each layer, by rank, the number that the rule would evict first, -1 for none; unknown of `stale` layers.
        self._champions = np.full(len(self._layers), -1, dtype=np.int64)

    def reserve(
        self, key: Key, *, transient: bool = False, protect: frozenset[Key] = frozenset(), prefetch: bool = False
    ) -> int | None:
        """Take a slot for loading `key` into, evicting if need be; the slot is then `loading`.

        Args:
            key: the expert to load.
            transient: it only passes through (prefill).
            protect: keys that must not be evicted for it, beside those pinned and loading.
            prefetch: nothing waits for it; it is counted as a prefetch.

        Returns:
            The slot, or None when no slot may be taken now (all are pinned, loading or protected). `evicted` is the
            key that had to go for it, or None.
        """
        self._open += 1  # a slot that was picked is nobody's until it is taken
        slot = self._pick(key, transient, protect)
        if slot is not None:
            self._take(slot, key, transient=transient, prefetch=prefetch)
        self._open -= 1
        return slot

    def adopt(self, key: Key, protect: frozenset[Key]) -> None:
        """Make a transient expert a resident; one of its layer's own that is not in `protect` then passes instead.

        That one may be pinned: it leaves when it has been used.
        """
        slot = self._where[key]
        if not self.slots[slot].transient:
            return
        if self._kept[key[0]] >= self.plan.quotas[key[0]]:
            own = self._parting(key[0], protect)
            if not own.size:
                return
            self._mark(self._lowest(own), True)
        self._mark(slot, False)

    def make_way(self, layer: int, coming: int, wanted: frozenset[int]) -> None:
        """Let residents of `layer` that are not `wanted` pass, as many as are `coming`: they leave when used.

        Until the pass ends no prefetch takes the place of one that is wanted.
        """
        self.wished[layer] = wanted
        for _ in range(coming - max(0, self.plan.quotas[layer] - self._kept[layer])):
            own = self._parting(layer, frozenset((layer, expert) for expert in wanted))
            if own.size:
                self._mark(self._lowest(own), True)

    def _parting(self, layer: int, protect: frozenset[Key]) -> Counts:
        """Numbers of the residents of `layer` that are not in `protect`, whether they are in use or not, ascending."""
        own = (self.slots[slot].key for slot in self._by_layer[layer] - self._passing)
        return np.array(sorted(self._number(key) for key in own if key and key not in protect), dtype=np.int64)

    # -- choice -------------------------------------------------------------------------------------------

    def staying(self, layer: int) -> int:
        """How many experts of `layer` may stay: its quota, or of a shared pool what it has now."""
        return self.plan.quotas[layer] or self._kept[layer]

    def below_quota(self, layer: int) -> bool:
        """Whether `layer` may take a free slot for good: it has less than its quota, or than its even share."""
        return bool(self._free) and self._kept[layer] < self.share(layer)

    def share(self, layer: int) -> int:
        """The slots that are `layer`'s: its quota, or of a shared pool an even part."""
        return self.plan.quotas[layer] or max(1, self.plan.slots // len(self._rank))

    def _pick(self, key: Key, transient: bool, protect: frozenset[Key]) -> int | None:
        if self.all_fit:
            return self._free.pop() if self._free else None
        quota = self.plan.quotas[key[0]]
        at_quota = bool(quota) and self._kept[key[0]] >= quota
        if transient:
            if (ready := self._evictable_passing(None, protect)).size:
                return self._lowest(ready)
            if len(self._passing) >= self.max_transient:
                return None
        elif at_quota:
            # None when the layer's own are all in use: they come free as it runs, and other layers keep theirs.
            own = self._evictable(key[0], protect, passing=not self.plan.lane)
            return self._lowest(own) if own.size else None
        if self._free:
            return self._free.pop()
        candidates = self._evictable(key[0], protect) if at_quota else _NONE
        if not candidates.size:
            candidates = self._others(protect)
        return self._lowest(candidates) if candidates.size else None

    def _evictable(self, layer: int, protect: frozenset[Key], *, passing: bool = True) -> Counts:
        """Numbers of `layer` that may be evicted, ascending; `passing` False leaves transient ones out."""
        ready = self.ready(layer)
        ready[[key[1] for key in protect if key[0] == layer]] = False
        if not passing:
            ready &= ~self._transient[self._span(layer)]
        return np.flatnonzero(ready) + self._first[layer]

    def _evictable_passing(self, layers: set[int] | None, protect: frozenset[Key]) -> Counts:
        """Transient ones that may be evicted, of all layers or of some, ascending."""
        found = [
            self._number(key)
            for slot in self._passing
            if (key := self.slots[slot].key) is not None
            and key not in protect
            and self.slots[slot].state is SlotState.READY
            and (layers is None or key[0] in layers)
        ]
        return np.array(sorted(found), dtype=np.int64)

    def _others(self, protect: frozenset[Key]) -> Counts:
        """What may be evicted of layers above their quotas, else of all: at least the one that goes first."""
        if self._quotas:
            over = {layer for layer, kept in self._kept.items() if kept > self.plan.quotas[layer] > 0}
            if over and (found := self._first_to_go(over, protect)).size:
                return found
        return self._first_to_go(None, protect)

    def _first_to_go(self, layers: set[int] | None, protect: frozenset[Key]) -> Counts:
        """Of these layers (None: all), transient ones if any may go, else few that hold what the rule evicts first.

        Looking at every slot for every miss would make a token's cost grow with layers x slots: at 100,000 keys more
        than all the rest (`bench/scale.py`). Only a layer in which something moved or was used is looked through again.
        """
        if self._passing and (passing := self._evictable_passing(layers, protect)).size:
            return passing
        ranks = list(range(len(self._layers))) if layers is None else sorted(self._rank[layer] for layer in layers)
        if not self.eviction.steady:
            return np.concatenate([_NONE, *(self._evictable(self._layers[rank], protect) for rank in ranks)])
        guarded = {layer for layer, _ in protect}
        for layer in self._stale - guarded:
            own = self._evictable(layer, frozenset())
            self._champions[self._rank[layer]] = self._best(own) if own.size else -1
        self._stale &= guarded
        apart = sorted(guarded if layers is None else guarded & layers)
        guarded_ranks = [self._rank[layer] for layer in apart]
        champions = self._champions.copy() if layers is None else self._champions[ranks]
        champions[[ranks.index(rank) for rank in guarded_ranks]] = -1
        found = np.concatenate([champions[champions >= 0], *(self._evictable(layer, protect) for layer in apart)])
        found.sort()
        return found

    def _lowest(self, numbers: Counts) -> int:
        """The slot of what goes first: a transient one where there is any, else the rule's choice."""
        if self._passing and (found := numbers[self._transient[numbers]]).size:
            numbers = found
        number = self._best(numbers)
        layer = self._layers[self._past.rank[number]]
        return self._where[layer, number - self._first[layer]]

    def _best(self, numbers: Counts) -> int:
        """The rule's choice among ascending numbers.

        Between equal scores the lowest key goes, so that which slot a key happens to lie in decides nothing.
        """
        past = self._past
        chosen = Uses(past.last_tick[numbers], past.last_pass[numbers], past.uses[numbers], past.rank[numbers], numbers)
        now = Now(self.tick, self.pass_no, self._rank[self._layer], len(self._rank))
        return int(numbers[self.eviction.score(chosen, now).argmin()])
