"""What is in each slot of a bank, the states that slots go through, and what is counted. Pure: no torch, no clock.

Which slot is taken next is the choice of `emoe.residency.table`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import numpy.typing as npt

from emoe.residency.budget import PoolPlan
from emoe.residency.eviction import Uses

Key = tuple[int, int]
"""An expert key: (layer, expert)."""


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
class SlotBooks:
    """Slots of one bank and the keys in them; a *transient* slot holds an expert that only passes through.

    An interrupt may come between any two steps. What a slot's own `state` says is always true: it is `ready` only once
    its key is noted and its bytes are there, and no more before anything is forgotten. All else follows from that
    (`mend`). `mender`, where there is one, is called as a pass begins and not all slots are empty or ready, or the
    books were left in the middle of something. `wished`: what the prompt read in this pass wants of a layer.
    """

    plan: PoolPlan
    experts: dict[int, int]
    pass_no: int = field(init=False, default=0)
    tick: int = field(init=False, default=0)
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
    mender: Callable[[], None] | None = field(init=False, default=None)
    wished: dict[int, frozenset[int]] = field(init=False, default_factory=dict)
    _past: Uses = field(init=False)
    _ready: npt.NDArray[np.bool_] = field(init=False)
    _transient: npt.NDArray[np.bool_] = field(init=False)
    _stale: set[int] = field(init=False)
    _held: set[int] = field(init=False, default_factory=set)
    _open: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        layers = sorted(self.experts)
        self.slots = [_Slot() for _ in range(self.plan.slots)]
        self.counters = {layer: LayerCounters() for layer in layers}
        self._free = list(range(self.plan.slots - 1, -1, -1))
        self._by_layer = {layer: set() for layer in layers}
        self._kept = dict.fromkeys(layers, 0)
        self._rank = {layer: rank for rank, layer in enumerate(layers)}
        self._layers, self._layer = layers, layers[0]
        # Key (layer, e) is number first[layer] + e of all statistics.
        sizes = [self.experts[layer] for layer in layers]
        self._first = dict(zip(layers, np.cumsum([0, *sizes[:-1]]).tolist(), strict=True))
        never = np.full(sum(sizes), -1, dtype=np.int64)
        ranks = np.repeat(np.arange(len(layers)), sizes)
        self._past = Uses(never, never.copy(), np.zeros_like(never), ranks, np.arange(len(never)))
        self._ready, self._transient = np.zeros((2, len(never)), dtype=np.bool_)
        # Layers in which something moved or was used since what they would give up was found.
        self._stale = set(layers)

    # -- time ---------------------------------------------------------------------------------------------

    def begin_pass(self) -> None:
        """Note that a forward pass of the model starts."""
        self.pass_no += 1
        self.wished.clear()
        if self.mender is not None and (self._held or self._open):
            self.mender()

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

    def _number(self, key: Key) -> int:
        return self._first[key[0]] + key[1]

    def _span(self, layer: int) -> slice:
        return slice(self._first[layer], self._first[layer] + self.experts[layer])

    # -- moves --------------------------------------------------------------------------------------------

    def _move(self, slot: int, to: SlotState) -> None:
        entry = self.slots[slot]
        if (entry.state, to) not in LEGAL_MOVES:
            raise IllegalMove(f"slot {slot} ({entry.key}) cannot go from {entry.state.value} to {to.value}")
        self._held.add(slot)
        if entry.key is not None and SlotState.READY in (entry.state, to):
            self._ready[self._number(entry.key)] = to is SlotState.READY
            self._stale.add(entry.key[0])
        entry.state = to
        if to is SlotState.READY:
            self._held.discard(slot)  # of one that is emptied, `evict` does

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

    def _take(self, slot: int, key: Key, *, transient: bool, prefetch: bool) -> None:
        """Begin loading `key` into `slot`: one taken off the free ones, or one that is ready, whose key is evicted."""
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
        self.evict(slot)

    def evict(self, slot: int) -> None:
        """Empty a slot that is ready, or whose load did not end well (`abort`)."""
        entry = self.slots[slot]
        arrived = entry.state is SlotState.READY
        self._move(slot, SlotState.EMPTY)
        if entry.key is not None:
            self.counters[entry.key[0]].prefetches_unused += entry.prefetched and arrived
            self.counters[entry.key[0]].prefetches_cancelled += entry.prefetched and not arrived
            self._mark(slot, False)
            del self._where[entry.key]
            self._by_layer[entry.key[0]].discard(slot)
            self._kept[entry.key[0]] -= 1
        entry.key = None
        entry.prefetched = False
        self._free.append(slot)
        self._held.discard(slot)

    def _mark(self, slot: int, transient: bool) -> None:
        entry = self.slots[slot]
        if entry.transient == transient or entry.key is None:
            return
        self._open += 1
        entry.transient = transient
        self._transient[self._number(entry.key)] = transient
        self._kept[entry.key[0]] += -1 if transient else 1
        (self._passing.add if transient else self._passing.discard)(slot)
        self._open -= 1

    # -- after interrupts ---------------------------------------------------------------------------------

    def settled(self, loading: set[int]) -> bool:
        """Whether the books are in order, no slot is pinned and none is loading but `loading`."""
        return not self._open and self._held <= loading

    def mend(self) -> None:
        """Make every slot ready or empty, as its state says, and write everything else anew; no load is under way.

        Prefetches that are lost count as cancelled. Interrupted, it can be called again.
        """
        self._open += 1
        full: dict[int, Key] = {}
        for slot, entry in enumerate(self.slots):
            if entry.key is not None and entry.state in (SlotState.READY, SlotState.PINNED):
                entry.state = SlotState.READY
                full[slot] = entry.key
            else:
                entry.state = SlotState.EMPTY
                entry.key, entry.transient, entry.prefetched = None, False, False
        self._where = {key: slot for slot, key in full.items()}
        self._by_layer = {layer: {slot for slot, key in full.items() if key[0] == layer} for layer in self._layers}
        self._passing = {slot for slot in full if self.slots[slot].transient}
        self._kept = {layer: len(slots - self._passing) for layer, slots in self._by_layer.items()}
        self._free = [slot for slot in reversed(range(len(self.slots))) if slot not in full]
        self._ready[:] = self._transient[:] = False
        self._ready[[self._number(key) for key in full.values()]] = True
        self._transient[[self._number(full[slot]) for slot in self._passing]] = True
        self._stale = set(self._layers)
        for layer, counters in self.counters.items():
            waiting = sum(self.slots[slot].prefetched for slot in self._by_layer[layer])
            counters.prefetches_cancelled += counters.prefetches_waiting - waiting
        self._held.clear()
        self._open = 0
