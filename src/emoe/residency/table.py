"""Which expert is in which slot, and each slot's state. Pure bookkeeping: no torch, no threads, no clock.

The engine and the simulator share it, so the same sequence of visits gives the same hits in both.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import numpy.typing as npt

from emoe.residency.budget import PoolPlan
from emoe.residency.eviction import Counts, Eviction, Now, Uses

Key = tuple[int, int]
"""An expert key: (layer, expert)."""

_NONE: Counts = np.empty(0, dtype=np.int64)


class SlotState(Enum):
    """What a slot holds."""

    EMPTY = "empty"
    LOADING = "loading"
    READY = "ready"
    PINNED = "pinned"


LEGAL_MOVES: frozenset[tuple[SlotState, SlotState]] = frozenset(
    {
        (SlotState.EMPTY, SlotState.LOADING),  # a load starts
        (SlotState.LOADING, SlotState.READY),  # it ended well
        (SlotState.LOADING, SlotState.EMPTY),  # it failed or was cancelled
        (SlotState.READY, SlotState.PINNED),  # the running layer uses it
        (SlotState.PINNED, SlotState.READY),  # the running layer is done with it
        (SlotState.READY, SlotState.EMPTY),  # evicted
    }
)


class IllegalMove(RuntimeError):
    """A slot was moved between states that do not follow each other: a defect in emoe, never a user's error."""


@dataclass(slots=True)
class LayerCounters:
    """Counts of one layer. A hit or a miss is one routed expert key in one visit of the layer (not one token).

    `loads` counts demand loads and prefetches alike. Every prefetch that was issued ends as used (run before it was
    evicted), unused (evicted before it was run) or cancelled (its load did not end well); until then it waits.
    `bytes_read` came from disk; where the device is reached by copies, `bytes_copied` went over the link, and
    `host_hits` of the loads needed no read.
    """

    hits: int = 0
    misses: int = 0
    loads: int = 0
    bytes_read: int = 0
    rerouted: int = 0
    tokens: int = 0
    prefetches: int = 0
    prefetches_used: int = 0
    prefetches_unused: int = 0
    prefetches_cancelled: int = 0
    host_hits: int = 0
    bytes_copied: int = 0

    @property
    def prefetches_waiting(self) -> int:
        """Prefetches under way, or there and neither run nor evicted yet."""
        return self.prefetches - self.prefetches_used - self.prefetches_unused - self.prefetches_cancelled


@dataclass(slots=True)
class _Slot:
    state: SlotState = SlotState.EMPTY
    key: Key | None = None
    transient: bool = False
    prefetched: bool = False


@dataclass(slots=True)
class ResidencyTable:
    """Slots of one bank, the keys in them, and the choice of what to evict.

    A *transient* slot holds an expert that a prefill streamed through; transient slots are reused before any other
    resident expert is touched, and at most `max_transient` exist (0: the plan's `passing`), so that decode's
    residency survives a prefill.
    A transient expert that decode hits becomes an ordinary resident. With a lane (`plan.lane`) transient slots are
    those and no others, so that no resident is ever touched by a prefill.
    """

    plan: PoolPlan
    experts: dict[int, int]
    eviction: Eviction
    max_transient: int = 0
    pass_no: int = 0
    tick: int = 0
    slots: list[_Slot] = field(init=False)
    counters: dict[int, LayerCounters] = field(init=False)
    evicted: Key | None = field(init=False, default=None)
    _where: dict[Key, int] = field(init=False, default_factory=dict)
    _free: list[int] = field(init=False)
    _by_layer: dict[int, set[int]] = field(init=False)
    _kept: dict[int, int] = field(init=False)
    _rank: dict[int, int] = field(init=False)
    _layers: list[int] = field(init=False)
    _layer: int = field(init=False)
    _passing: set[int] = field(init=False, default_factory=set)
    _first: dict[int, int] = field(init=False)
    _past: Uses = field(init=False)
    _ready: npt.NDArray[np.bool_] = field(init=False)
    _transient: npt.NDArray[np.bool_] = field(init=False)
    _champions: Counts = field(init=False)
    _stale: set[int] = field(init=False)
    _quotas: bool = field(init=False)

    def __post_init__(self) -> None:
        layers = sorted(self.experts)
        self.slots = [_Slot() for _ in range(self.plan.slots)]
        self.counters = {layer: LayerCounters() for layer in layers}
        self._free = list(range(self.plan.slots - 1, -1, -1))
        self._by_layer = {layer: set() for layer in layers}
        self._kept = dict.fromkeys(layers, 0)
        self._rank = {layer: rank for rank, layer in enumerate(layers)}
        self._layers, self._layer = layers, layers[0]
        self.max_transient = max(1, min(self.plan.lane or self.max_transient or self.plan.passing, self.plan.slots))
        # Key (layer, e) is number first[layer] + e of all statistics.
        sizes = [self.experts[layer] for layer in layers]
        self._first = dict(zip(layers, np.cumsum([0, *sizes[:-1]]).tolist(), strict=True))
        never = np.full(sum(sizes), -1, dtype=np.int64)
        ranks = np.repeat(np.arange(len(layers)), sizes)
        self._past = Uses(never, never.copy(), np.zeros_like(never), ranks, np.arange(len(never)))
        self._ready, self._transient = np.zeros((2, len(never)), dtype=np.bool_)
        self._quotas = any(self.plan.quotas.values())
        # Of each layer, by rank, the number that the rule would evict first, -1 for none; unknown of `stale` layers.
        self._champions = np.full(len(layers), -1, dtype=np.int64)
        self._stale = set(layers)

    # -- time ---------------------------------------------------------------------------------------------

    def begin_pass(self) -> None:
        """Note that a forward pass of the model starts."""
        self.pass_no += 1

    def visit(self, layer: int) -> None:
        """Note that `layer` runs now."""
        self.tick += 1
        self._layer = layer

    # -- queries ------------------------------------------------------------------------------------------

    def find(self, key: Key) -> int | None:
        """Return the slot that holds or is loading `key`, or None."""
        return self._where.get(key)

    def is_resident(self, key: Key) -> bool:
        """Return whether `key` can be run now."""
        slot = self._where.get(key)
        return slot is not None and self.slots[slot].state in (SlotState.READY, SlotState.PINNED)

    def resident(self, layer: int) -> list[int]:
        """Return the experts of `layer` that can be run now, ascending."""
        return sorted(
            key[1]
            for slot in self._by_layer[layer]
            if (key := self.slots[slot].key) is not None and self.slots[slot].state is not SlotState.LOADING
        )

    def ready(self, layer: int) -> npt.NDArray[np.bool_]:
        """bool [experts]: which experts of `layer` can be run now and are not being run."""
        return self._ready[self._span(layer)].copy()

    @property
    def occupied(self) -> int:
        """Slots that hold or are loading an expert."""
        return len(self._where)

    @property
    def all_fit(self) -> bool:
        """Whether every expert has a slot of its own."""
        return self.plan.slots >= sum(self.experts.values())

    # -- moves --------------------------------------------------------------------------------------------

    def _move(self, slot: int, to: SlotState) -> None:
        entry = self.slots[slot]
        if (entry.state, to) not in LEGAL_MOVES:
            raise IllegalMove(f"slot {slot} ({entry.key}) cannot go from {entry.state.value} to {to.value}")
        if entry.key is not None and SlotState.READY in (entry.state, to):
            self._ready[self._number(entry.key)] = to is SlotState.READY
            self._stale.add(entry.key[0])
        entry.state = to

    def use(self, key: Key, *, keep: bool) -> None:
        """Note that `key` is routed to in this visit; `keep` makes a transient expert an ordinary resident."""
        number = self._number(key)
        self._stale.add(key[0])
        self._past.last_tick[number] = self.tick
        self._past.last_pass[number] = self.pass_no
        self._past.uses[number] += 1
        slot = self._where.get(key)
        if slot is None:
            return
        entry = self.slots[slot]
        if keep and entry.transient and not self.plan.lane:
            self._mark(slot, False)
        if entry.prefetched and entry.state is not SlotState.LOADING:
            self.count_used(slot)

    def count_used(self, slot: int) -> None:
        """Note that the prefetch in `slot` is run: at its first hit, or when the layer that waited for it has it."""
        entry = self.slots[slot]
        if entry.prefetched and entry.key is not None:
            entry.prefetched = False
            self.counters[entry.key[0]].prefetches_used += 1

    def pin(self, slot: int) -> None:
        """Protect a ready slot while the running layer uses it."""
        self._move(slot, SlotState.PINNED)

    def unpin(self, slot: int) -> None:
        """End the protection."""
        self._move(slot, SlotState.READY)

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
        slot = self._pick(key, transient, protect)
        if slot is None:
            return None
        self.evicted = self.slots[slot].key
        if self.evicted is not None:
            self.evict(slot)
            self._free.pop()
        entry = self.slots[slot]
        self._move(slot, SlotState.LOADING)
        entry.key = key
        self._where[key] = slot
        self._by_layer[key[0]].add(slot)
        self._kept[key[0]] += 1
        self._mark(slot, transient)
        entry.prefetched = prefetch
        self.counters[key[0]].prefetches += prefetch
        return slot

    def commit(self, slot: int, nbytes: int) -> None:
        """Note that the load into `slot` ended; `nbytes` were read for it."""
        self._move(slot, SlotState.READY)
        key = self.slots[slot].key
        if key is not None:
            counters = self.counters[key[0]]
            counters.loads += 1
            counters.bytes_read += nbytes

    def abort(self, slot: int) -> None:
        """Note that the load into `slot` failed or was cancelled: the slot is empty again."""
        self._move(slot, SlotState.EMPTY)
        key = self.slots[slot].key
        if self.slots[slot].prefetched and key is not None:
            self.counters[key[0]].prefetches_cancelled += 1
        self._forget(slot)

    def evict(self, slot: int) -> None:
        """Empty a ready slot."""
        self._move(slot, SlotState.EMPTY)
        key = self.slots[slot].key
        if self.slots[slot].prefetched and key is not None:
            self.counters[key[0]].prefetches_unused += 1
        self._forget(slot)

    def _forget(self, slot: int) -> None:
        entry = self.slots[slot]
        if entry.key is not None:
            self._mark(slot, False)
            del self._where[entry.key]
            self._by_layer[entry.key[0]].discard(slot)
            self._kept[entry.key[0]] -= 1
        entry.key = None
        entry.prefetched = False
        self._free.append(slot)

    def _mark(self, slot: int, transient: bool) -> None:
        entry = self.slots[slot]
        if entry.transient == transient or entry.key is None:
            return
        entry.transient = transient
        self._transient[self._number(entry.key)] = transient
        self._kept[entry.key[0]] += -1 if transient else 1
        (self._passing.add if transient else self._passing.discard)(slot)

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
        """Let residents of `layer` that are not `wanted` pass, as many as are `coming`: they leave when used."""
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
        quota = self.plan.quotas[layer] or max(1, self.plan.slots // len(self._rank))
        return bool(self._free) and self._kept[layer] < quota

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

    def _number(self, key: Key) -> int:
        return self._first[key[0]] + key[1]

    def _span(self, layer: int) -> slice:
        return slice(self._first[layer], self._first[layer] + self.experts[layer])

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
